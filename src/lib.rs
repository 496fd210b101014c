//! lameduck: a sidecar proxy that makes unmodified apps shut down gracefully.

pub mod admin;
pub mod cli;
pub mod client;
pub mod config;
pub mod drain;
pub mod readiness;
pub mod telemetry;
