//! Validated settings, limits and deadlines. Nothing else reads the environment.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use hyper::header::{HeaderName, HeaderValue};

/// Everything a running proxy needs to know, checked once at start-up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where clients come in; at least one.
    pub listen: Vec<SocketAddr>,
    /// Another proxy may listen at the same addresses.
    pub reuse_port: bool,
    /// The app.
    pub upstream: UpstreamAddr,
    /// `/livez`, `/readyz`, `/metrics`, `/drain`; none when switched off.
    pub probe_listen: Option<SocketAddr>,
    /// The control socket's path.
    pub control: PathBuf,
    /// Control over TCP, for the other containers of a pod; loopback only.
    pub control_listen: Option<SocketAddr>,
    /// What `GET /drain` on the probe port must show; none refuses every such call.
    pub token: Option<String>,
    /// How the sidecar's own signals are meant.
    pub sidecar: Sidecar,
    /// Where the app's container finds the preload and this program; none writes neither.
    pub share_dir: Option<PathBuf>,
    /// The app's own preStop `httpGet`, called once drained.
    pub after_drain: Option<AfterDrain>,
    /// Targets of the app that `/app-probe` on the probe port passes on.
    pub app_probes: Vec<AppProbe>,
    /// The drain's times.
    pub drain: DrainSettings,
    /// Readiness and warm-up.
    pub ready: ReadySettings,
    /// How long a request waits for an app whose port is closed.
    pub upstream_wait: Duration,
    /// What happens to `X-Forwarded-*`.
    pub forwarded: Forwarded,
    /// One line per request on stdout.
    pub access_log: bool,
    /// Bounds on what may come from outside.
    pub limits: Limits,
    /// Data-plane threads.
    pub threads: usize,
    /// Where the verdict goes for the kubelet to show (`/dev/termination-log`), if that file exists.
    pub termination_log: PathBuf,
}

/// The app's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpstreamAddr {
    /// `host:port`; a name is looked up each second.
    Tcp {
        /// A name or an address.
        host: String,
        /// The app's port.
        port: u16,
    },
    /// `unix:/path`.
    Unix(PathBuf),
}

impl FromStr for UpstreamAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            if !path.starts_with('/') {
                return Err(format!(
                    "'{text}': a unix socket needs an absolute path, as in unix:/run/app.sock"
                ));
            }
            return Ok(Self::Unix(path.into()));
        }
        let bad = || format!("'{text}' is neither host:port nor unix:/path");
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(v6) => v6,
            None if host.contains(':') => {
                return Err(format!("'{text}': write an IPv6 address in brackets, as in [::1]:3000"));
            }
            None => host,
        };
        let host = if host.is_empty() { "127.0.0.1" } else { host };
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

impl fmt::Display for UpstreamAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// `--after-drain` and its headers: one GET.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AfterDrain {
    /// Whom it goes to; none is the app.
    pub at: Option<UpstreamAddr>,
    /// Path and query.
    pub target: String,
    /// Header fields.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

impl FromStr for AfterDrain {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is neither a path that begins with / nor http://HOST:PORT/PATH");
        let (at, target) = match text.strip_prefix("http://") {
            None => (None, text),
            Some(rest) => {
                let (host, target) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                let bare = host.strip_suffix(']').map_or(!host.contains(':'), |_| true);
                let addr = if bare { format!("{host}:80") } else { host.to_owned() };
                (Some(addr.parse().map_err(|_| bad())?), if target.is_empty() { "/" } else { target })
            }
        };
        is_target(target).then(|| Self { at, target: target.to_owned(), headers: vec![] }).ok_or_else(bad)
    }
}

/// `--app-probe`: path and query of one of the app's own probes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppProbe(pub String);

impl FromStr for AppProbe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = is_target(text).then(|| Self(text.to_owned()));
        path.ok_or_else(|| format!("'{text}' is no path that begins with /"))
    }
}

/// Parses `:4880`, `4880`, `127.0.0.1:4880` or `[::1]:4880`. A bare port listens on IPv6 and IPv4.
pub fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let any = |port: &str| {
        port.parse().ok().map(|port: u16| SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port))
    };
    let parsed = match text.strip_prefix(':') {
        Some(port) => any(port),
        None => text.parse().ok().or_else(|| any(text)),
    };
    parsed.ok_or_else(|| {
        format!("'{text}' is no address to listen on: write :4880, 127.0.0.1:4880 or [::1]:4880")
    })
}

/// How the process's own SIGTERM is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Sidecar {
    /// Not a sidecar: SIGTERM starts the drain, and the proxy leaves when it is over.
    #[default]
    None,
    /// A native sidecar: SIGTERM comes after the app has gone, or with the grace used up: end at once.
    Native,
    /// An ordinary sidecar: SIGTERM comes at the same time as everyone's: drain, stay until the hooks have their answer.
    Ordinary,
}

/// The drain's times.
#[derive(Clone, Debug)]
pub struct DrainSettings {
    /// The least time that new connections are still welcome after the drain began.
    pub lame_duck: Duration,
    /// From the drain's begin to the kill, as the platform counts it.
    pub grace: Duration,
    /// What of the grace belongs to the app after the drain: its own preStop hook, and its SIGTERM handling.
    pub reserve: Duration,
    /// How long running requests may finish when only the app restarts.
    pub restart_grace: Duration,
    /// Long-lived streams end at random within this time, so that their clients don't return all at once.
    pub stream_spread: Duration,
    /// Readiness during a drain.
    pub readiness: Option<DrainReadiness>,
}

impl DrainSettings {
    /// From T0 to Forcing, `grace − reserve`.
    pub fn deadline(&self) -> Duration {
        self.grace.saturating_sub(self.reserve)
    }

    /// The longest lame duck, `min(30s, (grace − reserve) / 3)`, but never under the least one.
    pub fn lame_duck_max(&self) -> Duration {
        (self.deadline() / 3).min(Duration::from_secs(30)).max(self.lame_duck)
    }

    /// Refuses times that leave no room for the work: `grace ≤ reserve + lame-duck`.
    pub fn check(&self) -> Result<(), String> {
        let needed = self.reserve + self.lame_duck;
        if self.grace > needed {
            return Ok(());
        }
        Err(format!(
            "--grace {} leaves no time for running work: it must be over --reserve {} plus --lame-duck {}; \
             raise --grace (and the pod's terminationGracePeriodSeconds) or lower the others",
            humantime::format_duration(self.grace),
            humantime::format_duration(self.reserve),
            humantime::format_duration(self.lame_duck),
        ))
    }
}

/// `--drain-readiness`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DrainReadiness {
    /// `/readyz` stays 200 until Draining.
    Keep,
    /// `/readyz` is 503 from the drain's begin.
    Fail,
}

/// Readiness and warm-up.
#[derive(Clone, Debug)]
pub struct ReadySettings {
    /// How the app is asked.
    pub check: ReadyCheck,
    /// How long one check may take.
    pub timeout: Duration,
    /// Requests (`GET /path`) sent to the app before the first ready.
    pub warm_up: Vec<WarmUp>,
    /// How often each of them is sent.
    pub warm_up_count: u32,
}

/// `--ready-check`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadyCheck {
    /// The app's port accepts a connection.
    Connect,
    /// `GET path` is answered with 2xx or 3xx.
    Path(String),
}

impl FromStr for ReadyCheck {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "connect" => Ok(Self::Connect),
            path if is_target(path) => Ok(Self::Path(path.to_owned())),
            other => Err(format!("'{other}' is neither 'connect' nor a path that begins with /")),
        }
    }
}

/// One `--warm-up` request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WarmUp {
    /// `GET`, `HEAD`, …
    pub method: String,
    /// The request's target.
    pub path: String,
}

impl FromStr for WarmUp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (method, path) = text.split_once(' ').unwrap_or(("GET", text));
        if method.is_empty() || !method.bytes().all(|b| b.is_ascii_uppercase()) || !is_target(path) {
            return Err(format!("'{text}' is no warm-up request: write 'GET /path'"));
        }
        Ok(Self { method: method.to_owned(), path: path.to_owned() })
    }
}

fn is_target(path: &str) -> bool {
    path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic())
}

/// `--forwarded`: what happens to `X-Forwarded-For`, `-Proto` and `-Host`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Forwarded {
    /// Trust what the caller sent: add the peer to `-For`, keep `-Proto` and `-Host` where they are given.
    #[default]
    Append,
    /// Trust nobody: replace all three.
    Replace,
    /// Pass them on as they came and add nothing.
    Keep,
}

/// Bounds on what may come from outside, in bytes, number and time.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of a request's or a response's head; past it 431, or 502 for the app's.
    pub head: usize,
    /// From a request's first byte to its head's last; past it 408.
    pub head_timeout: Duration,
    /// No byte of a body moved for so long: 408 or a visible cut.
    pub body_timeout: Duration,
    /// An idle kept connection is closed after so long.
    pub idle_timeout: Duration,
    /// Open client connections; past it new ones wait in the listening socket's queue.
    pub connections: u64,
    /// Requests held while the app restarts or is replaced; past it 503.
    pub held: u64,
    /// Bytes of held requests; past it 503.
    pub held_bytes: usize,
}
