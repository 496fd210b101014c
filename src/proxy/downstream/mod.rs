//! A client's connection, by the protocol that it speaks.

pub mod http1;
pub mod http2;
mod stream;
mod streams;
