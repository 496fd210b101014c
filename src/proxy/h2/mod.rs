//! HTTP/2 (RFC 9113) on either side. The `h2` crate is the protocol's engine.
//!
//! ```text
//! connection   a client's connection: the task that runs it, and a drain's GOAWAY
//! stream       one of its streams: a request like any other    ← adapter, as HTTP/1.1; relay, frame by frame to the app
//! streams      which of them run, until their last frame is in the socket
//! wire, frames what goes over the connection, followed frame by frame
//! app          a stream to an app that speaks HTTP/2, as HTTP/1.1
//! head         heads and trailers between the two versions
//! ```

mod adapter;
pub mod app;
pub mod connection;
pub mod frames;
mod head;
mod relay;
mod stream;
mod streams;
mod wire;
