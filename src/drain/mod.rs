//! The pure part of the drain: the state machine, the gate that counts, and the ledger of what is in flight. It has no
//! sockets and reads no wall clock.

pub mod gate;
pub mod ledger;
pub mod machine;
pub mod quiet;

mod atomic {
    pub use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
}
