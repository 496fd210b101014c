//! HTTP/2.

pub mod relay;
