//! Control of a running proxy: the task that runs the drain's state machine against the data plane, and the handle for
//! its callers.
//!
//! ```text
//! runner      feeds the machine, carries out its effects, answers the callers
//! app_stop    the end of the app: its own preStop hook, and whether it outlives its SIGTERM
//! handle      what admin, signals and `run` call
//! leases      work of the app that is no request
//! switch      change the upstream and remember it
//! data_plane  what the others need from the data plane, which implements it
//! telling     tells the app of a drain, and asks it whether it is busy
//! verdict     what a drain lost
//! clock       the time, which a test can pause
//! ```

mod app_stop;
pub mod clock;
pub mod data_plane;
pub mod handle;
pub mod leases;
pub mod runner;
pub mod switch;
mod telling;
pub mod verdict;
