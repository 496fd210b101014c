//! Capture: the shim in the app's process moves what it binds to 127.77.0.1 and says so; the proxy takes the same port on
//! the pod's addresses.

pub mod listeners;
pub mod watch;
pub mod word;
