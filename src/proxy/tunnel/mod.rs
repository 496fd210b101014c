//! Connections that are bytes both ways: WebSockets, other upgrades and `--tcp`.

mod directions;
pub mod relay;
pub mod tcp;
pub mod websocket;
