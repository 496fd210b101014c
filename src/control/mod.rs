//! Steering a running proxy: the task that runs the drain's machine against the data plane, and its callers' handle.
//!
//! ```text
//! runner    feeds the machine, carries its effects out, answers who waits
//! app_stop  the app's end: its own preStop hook, and whether it has outlived its SIGTERM
//! handle    what admin, signals and `run` call
//! switch    another upstream, remembered
//! verdict   what a drain lost
//! ```

mod app_stop;
pub mod handle;
pub mod runner;
pub mod switch;
pub mod verdict;
