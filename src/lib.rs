//! lameduck: a sidecar proxy that makes unmodified apps shut down gracefully.

pub mod admin;
pub mod cli;
pub mod config;
pub mod drain;
pub mod metrics;
pub mod proxy;
pub mod upstream;
pub mod readiness;
pub mod telemetry;
pub mod supervise;
