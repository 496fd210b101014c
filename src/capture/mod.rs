//! Capture: the shim in the app's process moves what it binds to a loopback address and says so; the proxy takes the same port on
//! the addresses that the app had asked for.

pub mod listeners;
pub mod object;
pub mod place;
pub mod run;
pub mod watch;
pub mod word;
