//! Below HTTP: tunnels, connections of --tcp, the PROXY protocol.

#[path = "../common/mod.rs"]
mod common;

mod opaque_tcp;
mod proxy_protocol;
mod proxy_protocol_survives_anything;
mod silent_tunnels_are_parked;
