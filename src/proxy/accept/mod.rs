//! From a listener to a connection that can be served.

pub mod first_speaker;
pub mod listener;
pub mod prepare;
pub mod proxy_protocol;
pub mod syn_drain;
pub mod tls;
