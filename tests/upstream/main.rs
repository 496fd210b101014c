//! The app behind the proxy: its connections, its restarts, and its replacement.

#[path = "../common/mod.rs"]
mod common;

mod app_closes_connections;
mod app_dies_under_load;
mod app_is_swapped;
mod app_on_a_unix_socket;
mod app_restart_loses_nothing;
mod requests_are_held;
mod upstream_connections;
mod upstream_is_switched;
