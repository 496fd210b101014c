//! The drain: a pure machine, the gate that counts, the task that runs both, and the ledger of who is in flight.

pub mod control;
pub mod machine;
