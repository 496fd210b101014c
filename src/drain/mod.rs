//! The drain: a pure machine, the gate that counts, the task that runs both, and the ledger of who is in flight.

pub mod control;
pub mod gate;
pub mod ledger;
pub mod machine;
pub mod quiet;
pub mod runner;
pub mod switch;

mod atomic {
    pub use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
}
