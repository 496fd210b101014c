//! Arguments for the log.

use std::path::PathBuf;

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use tracing::Level;

use crate::config::values;

/// `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// human when stdout is a terminal, else json
    Auto,
    /// one JSON object per line
    Json,
    /// text for people
    Human,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Logging")]
pub(super) struct LogArgs {
    /// Log one line per request and --tcp connection
    #[arg(long, value_parser = BoolishValueParser::new())]
    pub access_log: bool,
    #[command(flatten)]
    pub lines: LineArgs,
    /// File to which the drain's verdict and the bypassed ports are written for the kubelet to show, if that file exists
    #[arg(long, value_name = "PATH", default_value = "/dev/termination-log")]
    pub termination_log: PathBuf,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Logging")]
pub(super) struct LineArgs {
    /// Format of log lines
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "auto")]
    pub log_format: LogFormat,
    /// Lowest level to log: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info",
          value_parser = values::level)]
    pub log_level: Level,
}
