//! The parsed command line.

use std::ffi::OsString;
use std::time::Duration;

use tracing::Level;

use super::log::LogFormat;
use super::webhook::WebhookSettings;
use crate::config::{ControlPlaces, Settings, UpstreamAddr};
use crate::inject::command::{AuditTask, FileTask};

/// The command to run.
#[derive(Debug)]
pub enum Command {
    /// `lameduck proxy`.
    Proxy {
        /// Checked.
        settings: Box<Settings>,
        /// For `telemetry`.
        log: LogSettings,
    },
    /// `lameduck run`.
    Run {
        /// Checked. The upstream is `localhost` with the port of `--app-port`, or with port 0 if the port has yet to be
        /// chosen or found.
        settings: Box<Settings>,
        /// For `telemetry`.
        log: LogSettings,
        /// The app.
        app: AppCommand,
    },
    /// `lameduck drain`.
    Drain {
        /// Where the proxy is.
        control: ControlPlaces,
        /// Time from now to Forcing; `None` sets no limit.
        timeout: Option<Duration>,
        /// Whether to wait for the end of the drain.
        wait: bool,
    },
    /// `lameduck drain --app-hook`.
    AppHook {
        /// Where the proxy is.
        control: ControlPlaces,
        /// Command of the app's own preStop hook; empty if it has none.
        command: Vec<OsString>,
    },
    /// `lameduck resume`.
    Resume {
        /// Where the proxy is.
        control: ControlPlaces,
    },
    /// `lameduck hold`.
    Hold {
        /// Where the proxy is.
        control: ControlPlaces,
        /// How to hold requests.
        how: HoldLimits,
        /// Whether to wait until nothing is running any more.
        until_idle: bool,
    },
    /// `lameduck swap`.
    Swap {
        /// Where the proxy is.
        control: ControlPlaces,
        /// How to hold requests meanwhile.
        how: HoldLimits,
        /// Time limit for the app to answer after the command has ended.
        timeout: Duration,
        /// Command that replaces the app, with its arguments; not empty.
        command: Vec<OsString>,
    },
    /// `lameduck lease`.
    Lease {
        /// Where the proxy is.
        control: ControlPlaces,
        /// Name of the lease; by default the command's.
        name: Option<String>,
        /// The command and its arguments; not empty.
        command: Vec<OsString>,
    },
    /// `lameduck switch`.
    Switch {
        /// Where the proxy is.
        control: ControlPlaces,
        /// Upstream for new requests; `None` is `--upstream`.
        to: Option<UpstreamAddr>,
        /// Time limit for it to answer.
        timeout: Duration,
        /// Whether to wait until the old upstream has no requests left.
        wait: bool,
    },
    /// `lameduck status`.
    Status {
        /// Where the proxy is.
        control: ControlPlaces,
        /// What to show.
        view: StatusView,
    },
    /// `lameduck inject` and `lameduck uninject`.
    Inject(FileTask),
    /// `lameduck audit`.
    Audit(AuditTask),
    /// `lameduck webhook`.
    Webhook {
        /// Checked.
        settings: Box<WebhookSettings>,
        /// For `telemetry`.
        log: LogSettings,
    },
}

/// How `lameduck hold` and `lameduck swap` hold new requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldLimits {
    /// The longest time that a request is held.
    pub max: Duration,
    /// Keep WebSockets, event streams and long polls, and don't wait for them.
    pub keep_streams: bool,
}

/// The app that `lameduck run` starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppCommand {
    /// `--app-port`: the app listens on this port, and keeps it.
    pub port: Option<u16>,
    /// Time limit for the app to listen.
    pub start_timeout: Duration,
    /// The program and its arguments; not empty.
    pub command: Vec<OsString>,
}

/// What `lameduck status` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusView {
    /// Text for people, with the oldest requests in flight.
    Human {
        /// Update every second.
        watch: bool,
    },
    /// One JSON object per line.
    Json {
        /// Update every second.
        watch: bool,
    },
    /// Nothing but the exit code.
    Ready,
}

/// How logs are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogSettings {
    /// `--log-format`.
    pub format: LogFormat,
    /// `--log-level`: less severe lines are dropped.
    pub level: Level,
}
