//! A client's connection, by protocol.

pub mod http1;
pub mod http2;
mod stream;
mod streams;
