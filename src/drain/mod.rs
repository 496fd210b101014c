//! The drain, pure: its machine, the gate that counts, and the ledger of who is in flight. No sockets, no clock.

pub mod gate;
pub mod ledger;
pub mod machine;
pub mod quiet;

mod atomic {
    pub use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
}
