//! The operator's side: the probe port, control, and the commands that use it.

#[path = "../common/mod.rs"]
mod common;

mod cli_clients;
mod control_socket;
mod control_socket_is_our_own;
mod listeners_end;
mod open_files;
mod probe_listener;
