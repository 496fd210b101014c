//! What a command line asks for: the outcome of reading it.

use std::ffi::OsString;
use std::time::Duration;

use tracing::Level;

use super::log::LogFormat;
use super::webhook::WebhookSettings;
use crate::config::{ControlPlaces, Settings, UpstreamAddr};
use crate::inject::command::FileTask;

/// What is to be done.
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
        /// Checked. The upstream is `localhost` with `--app-port`, or port 0: a free one is still to be chosen.
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
        /// From now to Forcing; none waits for as long as it takes.
        timeout: Option<Duration>,
        /// Whether to wait for the drain's end.
        wait: bool,
    },
    /// `lameduck drain --app-hook`.
    AppHook {
        /// Where the proxy is.
        control: ControlPlaces,
        /// The app's own preStop hook; empty if it has none.
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
        /// How.
        how: Hold,
        /// Whether to wait until nothing runs any more.
        until_idle: bool,
    },
    /// `lameduck swap`.
    Swap {
        /// Where the proxy is.
        control: ControlPlaces,
        /// How requests are held meanwhile.
        how: Hold,
        /// How long the app may take to answer once the command has ended.
        timeout: Duration,
        /// What replaces the app, and its arguments; at least one.
        command: Vec<OsString>,
    },
    /// `lameduck switch`.
    Switch {
        /// Where the proxy is.
        control: ControlPlaces,
        /// Where new requests go; none for `--upstream`.
        to: Option<UpstreamAddr>,
        /// How long it may take to answer.
        timeout: Duration,
        /// Whether to wait until the old one has run dry.
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
pub struct Hold {
    /// The longest time that a request is held.
    pub max: Duration,
    /// WebSockets and event streams stay, and aren't waited for.
    pub keep_streams: bool,
}

/// The app that `lameduck run` starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppCommand {
    /// `--app-port`: the app listens there whatever its `PORT` says.
    pub port: Option<u16>,
    /// How long it may take until it listens.
    pub start_timeout: Duration,
    /// The program and its arguments; at least one.
    pub command: Vec<OsString>,
}

/// What `lameduck status` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusView {
    /// For people, with the oldest requests in flight.
    Human {
        /// Anew each second.
        watch: bool,
    },
    /// One JSON object per line.
    Json {
        /// Anew each second.
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
    /// `--log-level`: lines less severe than this are left out.
    pub level: Level,
}
