//! Validated settings, limits and deadlines, and the flags that set them.

mod addresses;
mod app_url;
mod capture;
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

pub use self::addresses::{Cidr, TcpRoute, UpstreamAddr, parse_listen};
pub use self::app_url::{AfterDrain, AppUrl, BusyUrl, TellSettings};
pub use self::capture::{APP_IP, CaptureProtocol, CaptureRule, CaptureSettings};
pub use self::control::{ControlAddr, ControlPlaces, MAX_SOCKETS};
pub use self::health_check::HealthCheck;
pub use self::limits::Limits;
pub use self::long_poll::{LongPollAnswer, LongPollRoute, LongPolls};
use self::target::is_target;

/// Everything a running proxy needs to know, checked once at start-up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Addresses on which clients connect without TLS. Empty if there are TLS listeners only.
    pub listen: Vec<SocketAddr>,
    /// TLS listeners and their certificates, if there are any.
    pub tls: Option<TlsSettings>,
    /// Let another proxy listen on the same addresses (`SO_REUSEPORT`).
    pub reuse_port: bool,
    /// The app's address.
    pub upstream: UpstreamAddr,
    /// Listeners whose connections are forwarded byte for byte, and their destinations.
    pub tcp: Vec<TcpRoute>,
    /// Capture of the app's ports.
    pub capture: CaptureSettings,
    /// Networks of load balancers that send the client's address in a PROXY protocol header.
    pub proxy_protocol_from: Vec<Cidr>,
    /// File of authorities that sign the certificate of an `https://` app; `None` uses the system's authorities.
    pub upstream_ca: Option<PathBuf>,
    /// Address for `/livez`, `/readyz`, `/metrics` and `/drain`; `None` if switched off.
    pub probe_listen: Option<SocketAddr>,
    /// Possible places of the control socket.
    pub control: ControlPlaces,
    /// File that remembers the upstream chosen by `switch`; without one the choice is lost when the process ends.
    pub switched: Option<PathBuf>,
    /// Address for control over TCP, for the other containers of a pod; loopback only.
    pub control_listen: Option<SocketAddr>,
    /// Token that `GET /drain` on the probe port must carry; without one every such call is refused.
    pub token: Option<String>,
    /// What a signal to this process means.
    pub sidecar: Sidecar,
    /// Folder for the preload and a copy of this program, for the app's container; `None` writes neither.
    pub share_dir: Option<PathBuf>,
    /// The app's own preStop `httpGet`, called after the drain.
    pub after_drain: Option<AfterDrain>,
    /// How the app learns of a drain, and says when it has nothing more to do.
    pub tell: TellSettings,
    /// Targets of the app that `/app-probe` on the probe port forwards.
    pub app_probes: Vec<AppProbe>,
    /// Durations of the drain.
    pub drain: DrainSettings,
    /// Requests that are health checks, in addition to the well-known ones.
    pub health_checks: Vec<HealthCheck>,
    /// Requests that are long polls.
    pub long_polls: LongPolls,
    /// Readiness and warm-up.
    pub ready: ReadySettings,
    /// How long a request waits for an app whose port is closed; beyond it: 503.
    pub upstream_wait: Duration,
    /// The protocol that the app speaks.
    pub upstream_protocol: UpstreamProtocol,
    /// How to treat `X-Forwarded-*`.
    pub forwarded: Forwarded,
    /// Log one line per request on stdout.
    pub access_log: bool,
    /// Limits on what clients and the app may send.
    pub limits: Limits,
    /// Number of data-plane threads.
    pub threads: usize,
    /// File to which the verdict is written for the kubelet (`/dev/termination-log`), if that file exists.
    pub termination_log: PathBuf,
}

impl Settings {
    /// All TCP addresses that the proxy listens on, each with its flag.
    pub fn own_addresses(&self) -> impl Iterator<Item = (&'static str, SocketAddr)> {
        let listen = self.listen.iter().map(|addr| ("--listen", *addr));
        let tls = self.tls.iter().flat_map(|tls| &tls.listen).map(|addr| ("--tls-listen", *addr));
        let tcp = self.tcp.iter().map(|route| ("--tcp", route.listen));
        let probe = self.probe_listen.map(|addr| ("--probe-listen", addr));
        let control = self.control_listen.map(|addr| ("--control-listen", addr));
        listen.chain(tls).chain(tcp).chain(probe).chain(control)
    }
}

/// `--tls-listen` and its related flags.
#[derive(Clone, Debug)]
pub struct TlsSettings {
    /// Addresses on which clients connect with TLS; at least one.
    pub listen: Vec<SocketAddr>,
    /// Folder with `tls.crt` and `tls.key`, and subfolders with further pairs.
    pub dir: PathBuf,
    /// File of authorities that sign client certificates; `None` requests no client certificate.
    pub client_ca: Option<PathBuf>,
    /// How to treat a client without a certificate.
    pub client_auth: ClientAuth,
    /// Time limit from the accept to the end of the handshake; beyond it the connection is closed.
    pub handshake_timeout: Duration,
}

/// `--tls-client-auth`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ClientAuth {
    /// Refuse a client without a certificate
    #[default]
    Require,
    /// Serve it; the app then gets no certificate subject
    Request,
}

/// `--app-probe`: path and query of one of the app's own probes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppProbe(pub String);

impl FromStr for AppProbe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = is_target(text).then(|| Self(text.to_owned()));
        path.ok_or_else(|| format!("'{text}' is not a path that begins with /"))
    }
}

/// What a SIGTERM to this process means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Sidecar {
    /// Not a sidecar: SIGTERM starts the drain, and the proxy exits when it is over
    #[default]
    None,
    /// A native sidecar: SIGTERM comes after the app has exited or when the grace period is used up, so exit at once
    Native,
    /// An ordinary sidecar: all containers get SIGTERM at the same time, so drain and stay until the hooks are answered
    Ordinary,
}

/// Durations of the drain.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Drain")]
pub struct DrainSettings {
    /// Minimum time that new connections are still accepted after a drain begins; with 0, until one second passes
    /// without new ones [default: 5s in a pod, else 0s]
    #[arg(long, value_name = "TIME", default_value = "0s", hide_default_value = true, value_parser = values::time)]
    pub lame_duck: Duration,
    /// Time from the start of the drain to SIGKILL: the pod's terminationGracePeriodSeconds or compose's
    /// stop_grace_period
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = values::time)]
    pub grace: Duration,
    /// Part of the grace period that is kept for the app's own preStop hook and SIGTERM handling after the drain.
    /// Requests still running at grace - reserve are cut
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = values::time)]
    pub reserve: Duration,
    /// Time for running requests to finish when only the app restarts
    #[arg(long, value_name = "TIME", default_value = "10s",
          value_parser = values::time)]
    pub restart_grace: Duration,
    /// Period over which a drain ends WebSockets, event streams and long polls, each at a random time so that their
    /// clients don't all reconnect at once
    #[arg(long, value_name = "TIME", default_value = "5s",
          value_parser = values::time)]
    pub stream_spread: Duration,
    /// What /readyz reports during a drain [default: keep while a pod is deleted, fail for an operator and outside
    /// Kubernetes]
    #[arg(long = "drain-readiness", value_name = "MODE", value_enum)]
    pub readiness: Option<DrainReadiness>,
}

impl DrainSettings {
    /// Time from T0 to Forcing: `grace − reserve`.
    pub fn deadline(&self) -> Duration {
        self.grace.saturating_sub(self.reserve)
    }

    /// Maximum lame duck: `min(30s, (grace − reserve) / 3)`, but never less than the minimum.
    pub fn lame_duck_max(&self) -> Duration {
        (self.deadline() / 3).min(Duration::from_secs(30)).max(self.lame_duck)
    }

    /// Checks that there is time for running work.
    ///
    /// # Errors
    /// The text for the user if `grace ≤ reserve + lame-duck`.
    pub fn check(&self) -> Result<(), String> {
        let needed = self.reserve + self.lame_duck;
        if self.grace > needed {
            return Ok(());
        }
        Err(format!(
            "--grace {} leaves no time for running work: it must exceed --reserve {} plus --lame-duck {}; \
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
    /// Stay ready (200) until new connections are refused
    Keep,
    /// Not ready (503) from the start of the drain
    Fail,
}

/// Readiness and warm-up.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Readiness")]
pub struct ReadySettings {
    /// How to check the app: 'connect', or a path that must answer 2xx or 3xx
    #[arg(long = "ready-check", value_name = "connect|/PATH", default_value = "connect")]
    pub check: ReadyCheck,
    /// Time limit for one check
    #[arg(long = "ready-timeout", value_name = "TIME", default_value = "1s",
          value_parser = values::time_over_zero)]
    pub timeout: Duration,
    /// Request to send to the app before the proxy first reports ready, as in 'GET /'. Repeat the flag or separate by
    /// commas (write a comma in a path as %2C)
    #[arg(long, value_name = "REQUEST", value_delimiter = ',')]
    pub warm_up: Vec<WarmUp>,
    /// How many times to send each warm-up request
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
    /// Method, such as `GET` or `HEAD`.
    pub method: String,
    /// Path and query of the request.
    pub path: String,
}

impl FromStr for WarmUp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (method, path) = text.split_once(' ').unwrap_or(("GET", text));
        if method.is_empty() || !method.bytes().all(|b| b.is_ascii_uppercase()) || !is_target(path) {
            return Err(format!("'{text}' is not a warm-up request: write 'GET /path'"));
        }
        Ok(Self { method: method.to_owned(), path: path.to_owned() })
    }
}

/// `--upstream-protocol`: the protocol that the app speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum UpstreamProtocol {
    /// gRPC over HTTP/2 without TLS (h2c), everything else over HTTP/1.1
    #[default]
    Auto,
    /// HTTP/1.1 only; gRPC calls are refused as UNIMPLEMENTED
    Http1,
    /// HTTP/2 only, without TLS (h2c with prior knowledge)
    Http2,
}

/// `--forwarded`: how to treat `X-Forwarded-For`, `-Proto`, `-Host` and `-Port`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Forwarded {
    /// Act as one more proxy: add the peer to -For, and add the others where they are missing
    #[default]
    Append,
    /// Act as if there were no proxy here: forward them unchanged, and add all four only if none of them is present
    IfNone,
    /// Trust no client: replace all four, and remove Forwarded
    Replace,
    /// Forward them unchanged and add nothing
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
