//! lameduck: a sidecar proxy that makes unmodified apps shut down gracefully.

pub mod config;
pub mod drain;
pub mod supervise;
