//! HTTP/1.1 (RFC 9112): heads and bodies. Pure; no sockets.

pub mod body;
pub mod head;
pub mod health_check;
