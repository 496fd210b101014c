//! HTTP/2 (RFC 9113) on either side, around the `h2` crate, which is the protocol's engine.
//!
//! ```text
//! wire, frames  what goes over a client's connection, followed frame by frame
//! head          the rules for a request's fields, and trailers
//! typed         a head as fields, whatever the message came as
//! adapter       a client's stream as the HTTP/1.1 side of a request
//! app           a stream to an app that speaks HTTP/2, likewise
//! grpc          which requests are calls, and how one is answered
//! ```

pub mod adapter;
pub mod app;
pub mod frames;
pub mod grpc;
pub mod head;
pub mod typed;
pub mod wire;
