//! Capture: the app keeps its port number, and lameduck listens in front of it.

#[path = "../common/mod.rs"]
mod common;

mod captured_ports;
