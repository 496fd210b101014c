//! The command line and the environment.
//!
//! ```text
//! meaning      parsed arguments → checked command
//! args         the flags of proxy and run; clients, inject, webhook, log: the flags of the others
//! surroundings the environment that the defaults depend on
//! ```

mod args;
mod clients;
mod command;
mod inject;
mod log;
mod meaning;
mod surroundings;
mod webhook;

#[cfg(test)]
mod tests;

pub use self::args::annotated_flags;
pub use self::command::{AppCommand, Command, HoldLimits, LogSettings, StatusView};
pub use self::log::LogFormat;
pub use self::meaning::{check_proxy, parse};
pub use self::surroundings::in_pod;
pub use self::webhook::{Cluster, WebhookSettings};
