//! lameduck: a sidecar proxy that makes unmodified apps shut down gracefully.

pub mod admin;
pub mod app;
pub mod cli;
pub mod client;
pub mod config;
pub mod drain;
pub mod inject;
pub mod metrics;
pub mod proxy;
pub mod readiness;
pub mod signal;
pub mod supervise;
pub mod telemetry;
pub mod upstream;
