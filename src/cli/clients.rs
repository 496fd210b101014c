//! Arguments of the commands that control a running proxy.

use std::ffi::OsString;
use std::time::Duration;

use clap::Args;

use super::command::HoldLimits;
use crate::config::values;
use crate::config::{ControlAddr, UpstreamAddr};

#[derive(Debug, Args)]
pub(super) struct ControlArgs {
    /// Control socket of the proxy, or its --control-listen address [default: the first of the default sockets on which
    /// a proxy answers]
    #[arg(long, env = "LAMEDUCK_CONTROL", value_name = "PATH")]
    pub control: Option<ControlAddr>,
}

#[derive(Debug, Args)]
pub(super) struct DrainArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// Cut requests that are still running after this time. For a drain in progress it can only bring the deadline
    /// forward [default: no time limit, or the deadline of the drain in progress]
    #[arg(long, value_name = "TIME", value_parser = values::time_over_zero)]
    pub timeout: Option<Duration>,
    /// Begin the drain and return at once
    #[arg(long)]
    pub no_wait: bool,
    /// Act as the preStop hook of the app's container; without the sidecar's hook it means that only the app restarts
    #[arg(long, conflicts_with_all = ["timeout", "no_wait"])]
    pub app_hook: bool,
    /// With --app-hook: command to run afterwards, whatever the result of the drain
    #[arg(last = true, requires = "app_hook", value_name = "CMD")]
    pub command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(super) struct HoldOptions {
    /// Release the held requests after this time in any case
    #[arg(long = "max", value_name = "TIME", default_value = "60s", value_parser = values::time_over_zero)]
    pub max: Duration,
    /// Keep WebSockets, event streams and long polls, and don't wait for them
    #[arg(long)]
    pub keep_streams: bool,
}

impl HoldOptions {
    pub(super) fn settings(self) -> HoldLimits {
        HoldLimits { max: self.max, keep_streams: self.keep_streams }
    }
}

#[derive(Debug, Args)]
pub(super) struct HoldArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub hold: HoldOptions,
    /// Return only once nothing is running any more
    #[arg(long)]
    pub until_idle: bool,
}

#[derive(Debug, Args)]
pub(super) struct SwapArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub hold: HoldOptions,
    /// Time limit for the app to answer after the command has ended
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = values::time_over_zero)]
    pub timeout: Duration,
    /// Command that replaces the app, as in: docker compose up -d app
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(super) struct LeaseArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// Name in the status: letters, digits and -._~:/@ [default: the command's]
    #[arg(long, value_name = "NAME", value_parser = values::lease_name)]
    pub name: Option<String>,
    /// Command to run, as in: python import.py
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(super) struct SwitchArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// The new upstream: host:port, https://host:port or unix:/path
    #[arg(value_name = "ADDR", required_unless_present = "back")]
    pub to: Option<UpstreamAddr>,
    /// Go back to the proxy's --upstream
    #[arg(long, conflicts_with = "to")]
    pub back: bool,
    /// Time limit for the new upstream to answer. Beyond it nothing is changed
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = values::time_over_zero)]
    pub timeout: Duration,
    /// Don't wait until the old upstream has no requests left
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// Update the output every second, until Ctrl-C
    #[arg(long, conflicts_with = "ready")]
    pub watch: bool,
    /// Print JSON, one object per line
    #[arg(long, conflicts_with = "ready")]
    pub json: bool,
    /// Print nothing; exit with 0 if ready, else with 1 (for a compose healthcheck)
    #[arg(long)]
    pub ready: bool,
}
