//! Connections relayed byte for byte: WebSockets, other upgrades and `--tcp`.

mod directions;
pub mod relay;
pub mod tcp;
pub mod websocket;
