//! What can be typed: clap's types, one struct per heading of `--help`.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, value_parser};
use hyper::header::{HeaderName, HeaderValue};

use super::clients::{ControlArgs, DrainArgs, HoldArgs, StatusArgs, SwapArgs, SwitchArgs};
use super::inject::{self, FileArgs, InjectArgs};
use super::log::LogArgs;
use super::values::{self, PortOrLink, Switch};
use super::webhook::{self, WebhookArgs};
use crate::config::{
    AfterDrain, AppProbe, Cidr, ClientAuth, ControlAddr, DrainReadiness, Forwarded, HealthCheck, Limits,
    LongPoll, LongPollAnswer, ReadyCheck, Sidecar, TcpRoute, UpstreamAddr, UpstreamProtocol, WarmUp,
    parse_listen,
};

const EXIT_CODES: &str = "\
Exit codes: 0 = done, 1 = failed, 2 = the command line or the environment is wrong.
  proxy, drain: 3 = drained, but something was cut
  swap:   130 = interrupted; the held requests went on
  status: 1 = not ready, with --ready
  run:    the app's own code (128 + N when signal N ended it)
  webhook: 3 = a second signal came before the last review was done
  inject, uninject: 1 = with --check, something would change; 2 = also: a file is not understood";

/// A sidecar proxy that makes unmodified apps shut down gracefully.
#[derive(Debug, Parser)]
#[command(name = "lameduck", version, after_help = EXIT_CODES, max_term_width = 110)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub command: Sub,
}

#[derive(Debug, Subcommand)]
pub(super) enum Sub {
    /// Stand in front of an app: a sidecar, or the front door
    ///
    /// Every flag can also be set by its environment variable; the flag wins. Durations are written 5s or 1m30s.
    #[command(after_help = EXIT_CODES)]
    Proxy(Box<ProxyArgs>),
    /// Start an app and stand in front of it, in one container
    ///
    /// Listens on the inherited PORT, gives the app a free one as its PORT, and waits until it listens. SIGTERM, SIGINT
    /// and SIGQUIT drain first; then the app gets its SIGTERM. Other signals are the app's, and so is the terminal. Every
    /// flag can also be set by its environment variable; the flag wins. Durations are written 5s or 1m30s.
    #[command(after_help = EXIT_CODES)]
    Run(Box<RunArgs>),
    /// Drain a running proxy and wait until nothing is in flight
    #[command(after_help = EXIT_CODES)]
    Drain(DrainArgs),
    /// Hold new requests while what runs may finish, until resume or --max
    ///
    /// What the app itself asks for through the proxy goes on. It is told by its address, so whoever shares that counts
    /// as the app; on loopback, by a unix socket or through a published port it can't be told and waits too, as does
    /// what waits for it. Streams and long polls end as in a drain; their clients are held when they come again.
    #[command(after_help = EXIT_CODES)]
    Hold(HoldArgs),
    /// Hold new requests, run a command that replaces the app, and let them go once it answers
    #[command(after_help = EXIT_CODES)]
    Swap(SwapArgs),
    /// Send new requests to another upstream once it answers, and wait until the old one has run dry
    ///
    /// Only the app of --listen moves; what comes by --tcp stays where it is. It outranks --upstream until it is undone
    /// by --back, and is remembered beside the control socket: put that into a volume to keep it. The app of run is its
    /// own child, so there a switch ends with the process.
    #[command(after_help = EXIT_CODES)]
    Switch(SwitchArgs),
    /// End a drain or a hold: serve on
    #[command(after_help = EXIT_CODES)]
    Resume(ControlArgs),
    /// Show what a running proxy does and who is in flight
    #[command(after_help = EXIT_CODES)]
    Status(StatusArgs),
    /// Put the sidecar into Kubernetes manifests
    ///
    /// Prints all manifests, those that it leaves alone byte for byte; comments, order and quoting stay. Every
    /// workload is injected unless its lameduck.dev/inject annotation is disabled; other lameduck.dev annotations of
    /// its pods set the details. Doing it again changes nothing.
    #[command(after_help = inject::ANNOTATIONS)]
    Inject(InjectArgs),
    /// Take the sidecar out of manifests that inject has changed
    #[command(after_help = inject::EXIT_CODES)]
    Uninject(FileArgs),
    /// Put the sidecar into pods as they are created: the mutating admission webhook
    ///
    /// It gives the same sidecar as inject to the pods that the webhook configuration's selectors send to it. It
    /// refuses no pod: what it doesn't understand it leaves alone, and warns. Every flag can also be set by its
    /// environment variable; the flag wins.
    #[command(after_help = webhook::AFTER_HELP)]
    Webhook(Box<WebhookArgs>),
}

#[derive(Debug, Args)]
pub(super) struct ProxyArgs {
    /// The app: host:port, https://host:port or unix:/path; a name is looked up each second, several addresses are
    /// balanced
    #[arg(long, env = "LAMEDUCK_UPSTREAM", value_name = "ADDR", help_heading = "App")]
    pub upstream: UpstreamAddr,
    /// What SIGTERM means to this proxy
    #[arg(
        long,
        env = "LAMEDUCK_SIDECAR",
        value_name = "MODE",
        value_enum,
        default_value = "none",
        help_heading = "Drain"
    )]
    pub sidecar: Sidecar,
    /// Write preload.js and this program there, for the app's container: named in NODE_OPTIONS (--require), the one
    /// lets Node end at SIGTERM as PID 1; the other is for a preStop exec, as `lameduck drain --app-hook`
    #[arg(long, env = "LAMEDUCK_SHARE_DIR", value_name = "DIR", help_heading = "App")]
    pub share_dir: Option<PathBuf>,
    /// A GET to send once drained, before the app's preStop hook has its answer: a /PATH of the app, or
    /// http(s)://HOST:PORT/PATH; it takes from the reserve
    #[arg(long, env = "LAMEDUCK_AFTER_DRAIN", value_name = "URL", help_heading = "Drain")]
    pub after_drain: Option<AfterDrain>,
    /// A header field of that GET, as in 'Name: value'; repeat it, or separate by line breaks
    #[arg(long, env = "LAMEDUCK_AFTER_DRAIN_HEADER", value_name = "FIELD", value_delimiter = '\n',
          hide_env_values = true, value_parser = values::field, help_heading = "Drain")]
    pub after_drain_header: Vec<(HeaderName, HeaderValue)>,
    /// A path of the app that the probe port passes on, as /app-probe/PATH; repeat it, or separate by line
    /// breaks. For the probes of an app on a unix socket, which the kubelet can't reach
    #[arg(
        long,
        env = "LAMEDUCK_APP_PROBE",
        value_name = "PATH",
        value_delimiter = '\n',
        help_heading = "Readiness"
    )]
    pub app_probe: Vec<AppProbe>,
    #[command(flatten)]
    pub upstream_tls: UpstreamTlsArgs,
    #[command(flatten)]
    pub common: CommonArgs,
}

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// The app's port, for an app that doesn't read PORT [default: a free port, given to the app as PORT]
    #[arg(long, env = "LAMEDUCK_APP_PORT", value_name = "PORT", help_heading = "App",
          value_parser = values::port_or_link)]
    pub app_port: Option<PortOrLink>,
    /// The app must listen within this time; else it is ended, and the exit code is 1
    #[arg(long, env = "LAMEDUCK_START_TIMEOUT", value_name = "TIME", help_heading = "App",
          default_value = "60s", value_parser = values::time_over_zero)]
    pub start_timeout: Duration,
    /// The app and its arguments, after lameduck's own; -- before it is optional
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD", help_heading = "App")]
    pub command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(super) struct CommonArgs {
    #[command(flatten)]
    pub addresses: AddressArgs,
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub drain: DrainTimes,
    #[command(flatten)]
    pub ready: ReadyArgs,
    #[command(flatten)]
    pub app: AppArgs,
    #[command(flatten)]
    pub limits: LimitArgs,
    #[command(flatten)]
    pub log: LogArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Addresses")]
pub(super) struct AddressArgs {
    /// Where clients come in, as in :4880 or 127.0.0.1:4880; repeat it, or separate by commas
    /// [default: :4880; run: the inherited PORT, if set; none with --tls-listen]
    #[arg(long, env = "LAMEDUCK_LISTEN", value_name = "ADDR", value_delimiter = ',', value_parser = parse_listen)]
    pub listen: Vec<SocketAddr>,
    /// Pass connections on byte for byte, as in :6379=redis:6379 or :3306=unix:/run/db.sock; repeat it, or separate by
    /// commas. Each is work in flight until it closes: a drain lets it run to its deadline, then resets it, and hold
    /// and swap hold new ones. switch doesn't move them
    #[arg(long, env = "LAMEDUCK_TCP", value_name = "ADDR=UPSTREAM", value_delimiter = ',')]
    pub tcp: Vec<TcpRoute>,
    /// Networks of load balancers that begin each connection to --listen and --tcp with a PROXY protocol header
    /// (version 1 or 2), as in 10.0.0.0/8,fd00::/8: the address in it is the client's. From these a header is
    /// required, from others it is not read
    #[arg(long, env = "LAMEDUCK_PROXY_PROTOCOL_FROM", value_name = "CIDR", value_delimiter = ',')]
    pub proxy_protocol_from: Vec<Cidr>,
    /// Another lameduck of the same user may listen there too, so that one front door takes over from another
    #[arg(long, env = "LAMEDUCK_REUSEPORT")]
    pub reuseport: bool,
    /// Where the kubelet and Prometheus ask: /livez, /readyz, /metrics and /drain; or 'off'. run takes another port when
    /// this one is in use
    #[arg(long, env = "LAMEDUCK_PROBE_LISTEN", value_name = "ADDR", default_value = ":4881",
          value_parser = values::listen_or_off)]
    pub probe_listen: Switch,
    /// The control socket, which the commands drain, resume, status and so on
    /// talk to; @NAME is one without a file. Its default is the first of these folders that belongs to this user alone, or
    /// else @lameduck-UID. run takes the next free one, as in control-2.sock
    /// [default: control.sock in /run/lameduck, $XDG_RUNTIME_DIR/lameduck or /tmp/lameduck-UID]
    #[arg(long, env = "LAMEDUCK_CONTROL", value_name = "PATH")]
    pub control: Option<ControlAddr>,
    /// Control by TCP for the pod's other containers, on loopback only; or 'off'
    /// [default: 127.0.0.1:4882 in a pod, else off]
    #[arg(long, env = "LAMEDUCK_CONTROL_LISTEN", value_name = "ADDR", value_parser = values::loopback_or_off)]
    pub control_listen: Option<Switch>,
    /// What GET /drain on the probe port must show in its Lameduck-Token header; without it every such call is
    /// refused; better set by its variable, as other users can read a command line
    #[arg(long, env = "LAMEDUCK_TOKEN", value_name = "TEXT", hide_env_values = true, value_parser = values::token)]
    pub token: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "TLS")]
pub(super) struct TlsArgs {
    /// Where clients come in by TLS 1.2 or 1.3, as in :4443; repeat it, or separate by commas. --listen has no default
    /// then
    #[arg(long, env = "LAMEDUCK_TLS_LISTEN", value_name = "ADDR", value_delimiter = ',',
          value_parser = parse_listen)]
    pub tls_listen: Vec<SocketAddr>,
    /// The folder of tls.crt (the certificate and its chain) and tls.key, as a Secret is mounted, and of subfolders with
    /// such pairs: a client that asks for one of a certificate's DNS names gets that one, any other the folder's own.
    /// Changes are seen within seconds; no connection ends by them
    #[arg(long, env = "LAMEDUCK_TLS_DIR", value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// The authorities (PEM) of clients' certificates, which are asked for then; the app is told the verified
    /// certificate's subject in X-Client-Cert-Subject, and never one that a client has sent itself
    #[arg(long, env = "LAMEDUCK_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// What becomes of a client without a certificate, with --tls-client-ca [default: require]
    #[arg(long, env = "LAMEDUCK_TLS_CLIENT_AUTH", value_name = "MODE", value_enum)]
    pub tls_client_auth: Option<ClientAuth>,
    /// How long a TLS handshake may take; past it the connection is closed
    #[arg(long, env = "LAMEDUCK_TLS_HANDSHAKE_TIMEOUT", value_name = "TIME", default_value = "10s",
          value_parser = values::time_over_zero)]
    pub tls_handshake_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "TLS")]
pub(super) struct UpstreamTlsArgs {
    /// The authorities (PEM) that sign the certificate of an app with https://; one that they didn't sign is 502
    /// [default: the system's, as in /etc/ssl/certs/ca-certificates.crt]
    #[arg(long, env = "LAMEDUCK_UPSTREAM_CA", value_name = "FILE")]
    pub upstream_ca: Option<PathBuf>,
    /// The name that the certificate of an app with https:// has to be for [default: the host of --upstream]
    #[arg(long, env = "LAMEDUCK_UPSTREAM_NAME", value_name = "NAME", value_parser = values::server_name)]
    pub upstream_name: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Drain")]
pub(super) struct DrainTimes {
    /// The least time that new connections are still served after a drain began; 0: until a second without new ones
    /// [default: 5s in a pod, else 0s]
    #[arg(long, env = "LAMEDUCK_LAME_DUCK", value_name = "TIME", value_parser = values::time)]
    pub lame_duck: Option<Duration>,
    /// From the drain's begin to the kill: the pod's terminationGracePeriodSeconds, compose's stop_grace_period
    #[arg(long, env = "LAMEDUCK_GRACE", value_name = "TIME", default_value = "30s", value_parser = values::time)]
    pub grace: Duration,
    /// What of the grace is left to the app after the drain: its own preStop hook and SIGTERM handling; running work
    /// is cut at grace - reserve
    #[arg(long, env = "LAMEDUCK_RESERVE", value_name = "TIME", default_value = "5s", value_parser = values::time)]
    pub reserve: Duration,
    /// How long running requests may finish when only the app restarts
    #[arg(long, env = "LAMEDUCK_RESTART_GRACE", value_name = "TIME", default_value = "10s",
          value_parser = values::time)]
    pub restart_grace: Duration,
    /// WebSockets, event streams and long polls end at random within this time, so that not all clients return at once
    #[arg(long, env = "LAMEDUCK_STREAM_SPREAD", value_name = "TIME", default_value = "5s",
          value_parser = values::time)]
    pub stream_spread: Duration,
    /// A request that waits for news and is no work, as in /poll, /rooms/* or 'POST /connect'; repeat it, or separate by
    /// commas. One that still waits when streams end is answered. socket.io's need no naming: their session is closed
    #[arg(long, env = "LAMEDUCK_LONG_POLL", value_name = "[METHOD ]/PATH", value_delimiter = ',')]
    pub long_poll: Vec<LongPoll>,
    /// How: a status, and perhaps a Content-Type and a body, as in '200 application/json []' [default: 204]
    #[arg(long, env = "LAMEDUCK_LONG_POLL_ANSWER", value_name = "ANSWER")]
    pub long_poll_answer: Option<LongPollAnswer>,
    /// /readyz during a drain [default: kept while a pod is deleted, failed for an operator and outside Kubernetes]
    #[arg(long, env = "LAMEDUCK_DRAIN_READINESS", value_name = "MODE", value_enum)]
    pub drain_readiness: Option<DrainReadiness>,
    /// What is a health check besides those known by their agent (kubelet, AWS, Google, Azure, Envoy, Consul, Prometheus, …):
    /// a /PATH, or agent:TEXT for a part of the User-Agent; repeat it, or separate by commas. A drain waits neither for
    /// it nor for its coming to end, and a hold lets it pass. HAProxy's bare HTTP/1.0 check is known; Traefik's, curl's and
    /// wget's look like anybody's, so name their path
    #[arg(long, env = "LAMEDUCK_HEALTH_CHECK", value_name = "/PATH|agent:TEXT", value_delimiter = ',')]
    pub health_check: Vec<HealthCheck>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Readiness")]
pub(super) struct ReadyArgs {
    /// How the app is asked: 'connect', or a path that must answer 2xx or 3xx
    #[arg(long, env = "LAMEDUCK_READY_CHECK", value_name = "connect|/PATH", default_value = "connect")]
    pub ready_check: ReadyCheck,
    /// How long one check may take
    #[arg(long, env = "LAMEDUCK_READY_TIMEOUT", value_name = "TIME", default_value = "1s",
          value_parser = values::time_over_zero)]
    pub ready_timeout: Duration,
    /// A request to send to the app before the first ready, as in 'GET /'; repeat it, or separate by commas (write
    /// a comma in a path as %2C)
    #[arg(long, env = "LAMEDUCK_WARM_UP", value_name = "REQUEST", value_delimiter = ',')]
    pub warm_up: Vec<WarmUp>,
    /// How often each warm-up request is sent
    #[arg(long, env = "LAMEDUCK_WARM_UP_COUNT", value_name = "N", default_value = "1",
          value_parser = value_parser!(u32).range(1..=100_000))]
    pub warm_up_count: u32,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "App")]
pub(super) struct AppArgs {
    /// How long a request or --tcp connection waits for an app whose port is closed (it crashed, or restarts); past it
    /// 503, or a reset. Where compose replaces the app, that is its stop and its boot together: 60s, say
    #[arg(long, env = "LAMEDUCK_UPSTREAM_WAIT", value_name = "TIME", default_value = "10s",
          value_parser = values::time)]
    pub upstream_wait: Duration,
    /// What the app speaks
    #[arg(
        long,
        env = "LAMEDUCK_UPSTREAM_PROTOCOL",
        value_name = "PROTOCOL",
        value_enum,
        default_value = "auto"
    )]
    pub upstream_protocol: UpstreamProtocol,
    /// What the app gets to see as X-Forwarded-For, -Proto, -Host and -Port
    /// [default: if-none in a sidecar and under run, where the number of proxies stays what it was without us; append
    /// in a front door, and with --tls-listen]
    #[arg(long, env = "LAMEDUCK_FORWARDED", value_name = "MODE", value_enum)]
    pub forwarded: Option<Forwarded>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(super) struct LimitArgs {
    /// Bytes of a request's or an answer's head, 8KiB to 16MiB; past it 431, or 502 for the app's
    #[arg(long, env = "LAMEDUCK_MAX_HEAD", value_name = "BYTES", default_value = "64KiB",
          value_parser = values::head_bytes)]
    pub max_head: usize,
    /// Fields of a request's or an answer's head, 1 to 16384; past it 431, or 502 for the app's. Node takes 2000
    #[arg(long, env = "LAMEDUCK_MAX_FIELDS", value_name = "N", default_value = "2000",
          value_parser = value_parser!(u16).range(1..=16_384))]
    pub max_fields: u16,
    /// Bytes of a request's target (its path and query); past it 414
    #[arg(long, env = "LAMEDUCK_MAX_URI", value_name = "BYTES", default_value = "16KiB",
          value_parser = values::uri_bytes)]
    pub max_uri: usize,
    /// From a request's first byte to its head's last; past it 408. Also for a PROXY protocol header, then a close
    #[arg(long, env = "LAMEDUCK_HEAD_TIMEOUT", value_name = "TIME", default_value = "30s",
          value_parser = values::time_over_zero)]
    pub head_timeout: Duration,
    /// How long nothing may move either way while the client has to send of its body or to take of its answer; past it
    /// 408, or a visible cut
    #[arg(long, env = "LAMEDUCK_BODY_TIMEOUT", value_name = "TIME", default_value = "5m",
          value_parser = values::time_over_zero)]
    pub body_timeout: Duration,
    /// How long the app may take to begin its answer, and to go on taking the request; past it 504. 0 is for ever: what
    /// bounds the app then is the drain
    #[arg(long, env = "LAMEDUCK_ANSWER_TIMEOUT", value_name = "TIME", default_value = "0",
          value_parser = values::time)]
    pub answer_timeout: Duration,
    /// How long nothing may move over a WebSocket (then Close 1001), another tunnel or a --tcp connection (then a reset);
    /// 0 is for ever
    #[arg(long, env = "LAMEDUCK_TUNNEL_TIMEOUT", value_name = "TIME", default_value = "0",
          value_parser = values::time)]
    pub tunnel_timeout: Duration,
    /// An idle kept connection is closed after this time, or after a sixtieth of it while --max-connections are open. It
    /// must be longer than a load balancer in front keeps its own idle ones (AWS 60s, Azure 4m, Google 10m): what that
    /// sends over one which is just being closed fails. An idle one costs next to nothing
    #[arg(long, env = "LAMEDUCK_IDLE_TIMEOUT", value_name = "TIME", default_value = "1h",
          value_parser = values::time_over_zero)]
    pub idle_timeout: Duration,
    /// Open client connections; past it new ones wait in the kernel's queue. Cut to what `ulimit -n` has room for, with a
    /// line in the log
    #[arg(long, env = "LAMEDUCK_MAX_CONNECTIONS", value_name = "N", default_value = "50000",
          value_parser = value_parser!(u32).range(1..))]
    pub max_connections: u32,
    /// Requests, tunnels and --tcp connections in flight, held ones included; past it 503 with Retry-After, or a reset.
    /// 0 is any number. As many health checks, but 64 at most, have places of their own
    #[arg(long, env = "LAMEDUCK_MAX_IN_FLIGHT", value_name = "N", default_value = "0")]
    pub max_in_flight: u64,
    /// Requests at once over one HTTP/2 connection; its client is told, and more are refused
    #[arg(long, env = "LAMEDUCK_MAX_STREAMS", value_name = "N", default_value = "100",
          value_parser = value_parser!(u32).range(1..=10_000))]
    pub max_streams: u32,
    /// Requests and --tcp connections held while the app restarts or is replaced; past it 503, or a reset
    #[arg(long, env = "LAMEDUCK_MAX_HELD", value_name = "N", default_value = "1000")]
    pub max_held: u64,
    /// Bytes of held requests; past it 503
    #[arg(long, env = "LAMEDUCK_MAX_HELD_BYTES", value_name = "BYTES", default_value = "64MiB",
          value_parser = values::bytes)]
    pub max_held_bytes: usize,
    /// Data-plane threads [default: the cores that this process may use]
    #[arg(long, env = "LAMEDUCK_THREADS", value_name = "N", value_parser = value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

impl LimitArgs {
    /// The same as settings; the number of threads is none of them.
    pub fn meant(self) -> Limits {
        Limits {
            head: self.max_head,
            head_timeout: self.head_timeout,
            body_timeout: self.body_timeout,
            answer_timeout: self.answer_timeout,
            idle_timeout: self.idle_timeout,
            tunnel_timeout: self.tunnel_timeout,
            fields: self.max_fields.into(),
            uri: self.max_uri,
            streams: self.max_streams,
            connections: self.max_connections.into(),
            files: u64::MAX,
            in_flight: self.max_in_flight,
            held: self.max_held,
            held_bytes: self.max_held_bytes,
        }
    }
}
