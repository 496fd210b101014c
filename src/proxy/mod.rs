//! The data plane: one thread per core, one task per connection.
//!
//! ```text
//! threads      start what serves a connection, and what it becomes (connection)
//! accept       listeners, PROXY protocol, TLS handshakes, the last handshakes of a closing listener
//! downstream   a client's connection: HTTP/1.1, HTTP/2 and its streams
//! tunnel       bytes both ways: WebSockets, other upgrades, --tcp
//! request      one request: forward, retry, deadline, relay, failure
//! http2 http1  the protocols: heads, bodies, frames
//! worker       what one thread has for itself: parking, routes to the app, ledger
//! captured     the app's ports that capture has found
//! shared       what all threads share: settings, gate, phases
//! ```

pub mod accept;
pub mod buffer;
pub mod captured;
pub mod close;
pub mod connection;
pub mod downstream;
pub mod first_bytes;
pub mod hold_queue;
pub mod http1;
pub mod http2;
pub mod parking;
pub mod request;
pub mod request_log;
pub mod route;
pub mod shared;
pub mod socket;
pub mod stream;
pub mod threads;
pub mod tunnel;
pub mod worker;
