//! What the commands that talk to a running proxy take.

use std::ffi::OsString;
use std::time::Duration;

use clap::Args;

use super::command::Hold;
use crate::config::values;
use crate::config::{ControlAddr, UpstreamAddr};

#[derive(Debug, Args)]
pub(super) struct ControlArgs {
    /// The proxy's control socket, or its --control-listen address [default: the first of the proxy's own default
    /// sockets on which one answers]
    #[arg(long, env = "LAMEDUCK_CONTROL", value_name = "PATH")]
    pub control: Option<ControlAddr>,
}

#[derive(Debug, Args)]
pub(super) struct DrainArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// Cut what still runs after this time. The deadline of a drain that runs already comes forward to it, and is never
    /// put off [default: wait for as long as it takes, or to the deadline that is set]
    #[arg(long, value_name = "TIME", value_parser = values::time_over_zero)]
    pub timeout: Option<Duration>,
    /// Only begin the drain
    #[arg(long)]
    pub no_wait: bool,
    /// This is the preStop hook of the app's container: on its own it means that only the app restarts
    #[arg(long, conflicts_with_all = ["timeout", "no_wait"])]
    pub app_hook: bool,
    /// With --app-hook: run this then, whatever came of the drain
    #[arg(last = true, requires = "app_hook", value_name = "CMD")]
    pub command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(super) struct HowToHold {
    /// Let them go after this time whatever happens
    #[arg(long = "max", value_name = "TIME", default_value = "60s", value_parser = values::time_over_zero)]
    pub max: Duration,
    /// WebSockets, event streams and long polls stay, and aren't waited for
    #[arg(long)]
    pub keep_streams: bool,
}

impl HowToHold {
    pub(super) fn meant(self) -> Hold {
        Hold { max: self.max, keep_streams: self.keep_streams }
    }
}

#[derive(Debug, Args)]
pub(super) struct HoldArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub hold: HowToHold,
    /// Return only when nothing runs any more
    #[arg(long)]
    pub until_idle: bool,
}

#[derive(Debug, Args)]
pub(super) struct SwapArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub hold: HowToHold,
    /// The app must answer within this time after the command has ended
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = values::time_over_zero)]
    pub timeout: Duration,
    /// What replaces the app, as in: docker compose up -d app
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
    /// Back to the proxy's --upstream
    #[arg(long, conflicts_with = "to")]
    pub back: bool,
    /// The new upstream must answer within this time; else nothing is changed
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = values::time_over_zero)]
    pub timeout: Duration,
    /// Don't wait until the old one has run dry
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// Show it anew each second, until Ctrl-C
    #[arg(long, conflicts_with = "ready")]
    pub watch: bool,
    /// As JSON, one object per line
    #[arg(long, conflicts_with = "ready")]
    pub json: bool,
    /// Print nothing; exit 0 when ready, else 1 (a compose healthcheck)
    #[arg(long)]
    pub ready: bool,
}
