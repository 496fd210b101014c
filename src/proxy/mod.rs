//! The data plane: one thread per core, one task per connection.

pub mod body;
pub mod buffer;
pub mod conn;
pub mod error;
pub mod exchange;
pub mod forward;
pub mod frames;
pub mod grpc;
pub mod h2;
mod handshake;
pub mod handshakes;
pub mod headers;
mod line;
pub mod linger;
pub mod listen;
pub mod park;
pub mod plane;
pub mod proxy_protocol;
pub mod record;
pub mod relay;
pub mod sendq;
pub mod stream;
pub mod tcp;
pub mod upgrade;
pub mod welcome;
