//! Validated settings, limits and deadlines. Nothing else reads the environment.

mod addresses;
mod control;
mod health_check;
mod limits;
mod long_poll;
mod target;
pub(crate) mod values;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, value_parser};
use hyper::header::{HeaderName, HeaderValue};

pub use self::addresses::{Cidr, TcpRoute, UpstreamAddr, parse_listen};
pub use self::control::{ControlAddr, ControlPlaces, SOCKETS};
pub use self::health_check::HealthCheck;
pub use self::limits::Limits;
pub use self::long_poll::{LongPoll, LongPollAnswer, LongPolls};
use self::target::is_target;

/// Everything a running proxy needs to know, checked once at start-up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where clients come in; at least one.
    pub listen: Vec<SocketAddr>,
    /// Where clients come in by TLS.
    pub tls: Option<TlsSettings>,
    /// Another proxy may listen at the same addresses.
    pub reuse_port: bool,
    /// The app.
    pub upstream: UpstreamAddr,
    /// Where connections come in that are passed on byte for byte, and to whom.
    pub tcp: Vec<TcpRoute>,
    /// Peers that say for whom they connect, by a PROXY protocol header.
    pub proxy_protocol_from: Vec<Cidr>,
    /// Authorities that sign the certificate of an app with `https://`; none is the system's.
    pub upstream_ca: Option<PathBuf>,
    /// `/livez`, `/readyz`, `/metrics`, `/drain`; none when switched off.
    pub probe_listen: Option<SocketAddr>,
    /// Where the control socket may be.
    pub control: ControlPlaces,
    /// The file that remembers which upstream `switch` has chosen; without one the choice ends with the process.
    pub switched: Option<PathBuf>,
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
    /// Which requests are health checks, besides those that are known.
    pub health_checks: Vec<HealthCheck>,
    /// Requests that wait for news.
    pub long_polls: LongPolls,
    /// Readiness and warm-up.
    pub ready: ReadySettings,
    /// How long a request waits for an app whose port is closed.
    pub upstream_wait: Duration,
    /// What the app speaks.
    pub upstream_protocol: UpstreamProtocol,
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

impl Settings {
    /// Every address that the proxy listens on by TCP, with the flag that names it.
    pub fn own_addresses(&self) -> impl Iterator<Item = (&'static str, SocketAddr)> {
        let listen = self.listen.iter().map(|addr| ("--listen", *addr));
        let tls = self.tls.iter().flat_map(|tls| &tls.listen).map(|addr| ("--tls-listen", *addr));
        let tcp = self.tcp.iter().map(|route| ("--tcp", route.listen));
        let probe = self.probe_listen.map(|addr| ("--probe-listen", addr));
        let control = self.control_listen.map(|addr| ("--control-listen", addr));
        listen.chain(tls).chain(tcp).chain(probe).chain(control)
    }
}

/// `--tls-listen` and what belongs to it.
#[derive(Clone, Debug)]
pub struct TlsSettings {
    /// Where clients come in by TLS; at least one.
    pub listen: Vec<SocketAddr>,
    /// The folder of `tls.crt` and `tls.key`, and of subfolders with such pairs.
    pub dir: PathBuf,
    /// Authorities that sign clients' certificates; none asks for no certificate.
    pub client_ca: Option<PathBuf>,
    /// What becomes of a client without one.
    pub client_auth: ClientAuth,
    /// From the accept to the handshake's end; past it the connection is closed.
    pub handshake_timeout: Duration,
}

/// `--tls-client-auth`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ClientAuth {
    /// A client without a certificate is refused.
    #[default]
    Require,
    /// It is served, and the app sees no subject.
    Request,
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
        let bad = || {
            format!("'{text}' is neither a path that begins with / nor http://HOST:PORT/PATH (or https://)")
        };
        let (at, target) = match text.split_once("://").filter(|_| !text.starts_with('/')) {
            None => (None, text),
            Some((_, rest)) => {
                let (_, target) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                let place = &text[..text.len() - target.len()];
                (Some(place.parse().map_err(|_| bad())?), if target.is_empty() { "/" } else { target })
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
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Drain")]
pub struct DrainSettings {
    /// The least time that new connections are still served after a drain began; 0: until a second without new ones
    /// [default: 5s in a pod, else 0s]
    #[arg(long, value_name = "TIME", default_value = "0s", hide_default_value = true, value_parser = values::time)]
    pub lame_duck: Duration,
    /// From the drain's begin to the kill: the pod's terminationGracePeriodSeconds, compose's stop_grace_period
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = values::time)]
    pub grace: Duration,
    /// What of the grace is left to the app after the drain: its own preStop hook and SIGTERM handling; running work
    /// is cut at grace - reserve
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = values::time)]
    pub reserve: Duration,
    /// How long running requests may finish when only the app restarts
    #[arg(long, value_name = "TIME", default_value = "10s",
          value_parser = values::time)]
    pub restart_grace: Duration,
    /// WebSockets, event streams and long polls end at random within this time, so that not all clients return at once
    #[arg(long, value_name = "TIME", default_value = "5s",
          value_parser = values::time)]
    pub stream_spread: Duration,
    /// /readyz during a drain [default: kept while a pod is deleted, failed for an operator and outside Kubernetes]
    #[arg(long = "drain-readiness", value_name = "MODE", value_enum)]
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
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Readiness")]
pub struct ReadySettings {
    /// How the app is asked: 'connect', or a path that must answer 2xx or 3xx
    #[arg(long = "ready-check", value_name = "connect|/PATH", default_value = "connect")]
    pub check: ReadyCheck,
    /// How long one check may take
    #[arg(long = "ready-timeout", value_name = "TIME", default_value = "1s",
          value_parser = values::time_over_zero)]
    pub timeout: Duration,
    /// A request to send to the app before the first ready, as in 'GET /'; repeat it, or separate by commas (write
    /// a comma in a path as %2C)
    #[arg(long, value_name = "REQUEST", value_delimiter = ',')]
    pub warm_up: Vec<WarmUp>,
    /// How often each warm-up request is sent
    #[arg(long, value_name = "N", default_value = "1",
          value_parser = value_parser!(u32).range(1..=100_000))]
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

/// `--upstream-protocol`: what the app speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum UpstreamProtocol {
    /// gRPC over HTTP/2 without TLS (h2c), all else over HTTP/1.1.
    #[default]
    Auto,
    /// HTTP/1.1 only: gRPC calls are refused as UNIMPLEMENTED.
    Http1,
    /// HTTP/2 only, without TLS (h2c, with prior knowledge).
    Http2,
}

/// `--forwarded`: what happens to `X-Forwarded-For`, `-Proto`, `-Host` and `-Port`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Forwarded {
    /// One more proxy: add the peer to `-For`, and those of the others that are missing.
    #[default]
    Append,
    /// As if there were no proxy here: pass them on as they came, and add all four only where none of them came.
    IfNone,
    /// Trust nobody: replace all four, and take out `Forwarded`.
    Replace,
    /// Pass them on as they came and add nothing.
    Keep,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_holds_its_own_addresses_and_no_others() {
        let holds = |cidr: &str, ip: &str| cidr.parse::<Cidr>().unwrap().contains(ip.parse().unwrap());
        for (cidr, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
            ("10.0.0.77/30", "10.0.0.79", "10.0.0.80"),
            ("192.0.2.7", "::ffff:192.0.2.7", "192.0.2.8"),
            ("0.0.0.0/0", "255.1.2.3", "::1"),
            ("fd00::/8", "fdff::1", "fe00::1"),
            ("::/0", "2001:db8::1", "10.0.0.1"),
            ("2001:db8::7", "2001:db8::7", "2001:db8::8"),
        ] {
            assert!(holds(cidr, inside) && !holds(cidr, outside), "{cidr}");
        }
        for bad in [
            "",
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "10.0.0.0/",
            "10.0.0.0/-1",
            "example.org",
            "10.0.0.1:80",
        ] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_tcp_route_is_an_address_and_an_upstream() {
        let route: TcpRoute = "127.0.0.1:6379=redis:6380".parse().unwrap();
        assert_eq!(
            (route.listen.to_string(), route.upstream.to_string()),
            ("127.0.0.1:6379".into(), "redis:6380".into())
        );
        let unix: TcpRoute = ":3306=unix:/run/a=b.sock".parse().unwrap();
        assert_eq!(unix.upstream.to_string(), "unix:/run/a=b.sock");
        for bad in [":6379", "=redis:6379", ":6379=", ":6379=redis", "x=redis:6379"] {
            assert!(bad.parse::<TcpRoute>().is_err(), "{bad}");
        }
    }
}
