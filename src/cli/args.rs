//! What can be typed: clap's types, one struct per heading of `--help`.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use clap::{Arg, Args, Command, CommandFactory, Parser, Subcommand, value_parser};
use hyper::header::{HeaderName, HeaderValue};

use super::clients::{ControlArgs, DrainArgs, HoldArgs, StatusArgs, SwapArgs, SwitchArgs};
use super::inject::{self, FileArgs, InjectArgs};
use super::log::LogArgs;
use super::surroundings::Surroundings;
use super::webhook::{self, WebhookArgs};
use crate::config::values::{self, PortOrLink, Switch};
use crate::config::{
    AfterDrain, AppProbe, Cidr, ClientAuth, ControlAddr, DrainSettings, Forwarded, HealthCheck, Limits,
    LongPolls, ReadySettings, Sidecar, TcpRoute, UpstreamAddr, UpstreamProtocol, parse_listen,
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

/// The flags of the proxy that no annotation sets: the injection sets them itself or has an annotation of another name,
/// or they need files that it mounts nowhere.
const NOT_ANNOTATED: [&str; 22] = [
    "after-drain",
    "after-drain-header",
    "app-probe",
    "control",
    "grace",
    "help",
    "listen",
    "probe-listen",
    "reuseport",
    "share-dir",
    "sidecar",
    "termination-log",
    "tls-client-auth",
    "tls-client-ca",
    "tls-dir",
    "tls-handshake-timeout",
    "tls-listen",
    "token",
    "upstream",
    "upstream-ca",
    "upstream-name",
    "version",
];

/// The whole command line, with what follows from its flags: each flag of `proxy`, `run` and `webhook` has a variable, and
/// most of the proxy's have an annotation.
pub(super) fn command(around: &Surroundings) -> Command {
    let lame_duck = if around.in_pod { "5s" } else { "0s" };
    let with_env = |arg: Arg| match arg.get_long().filter(|long| !["help", "version"].contains(long)) {
        Some(long) => {
            let variable = format!("LAMEDUCK_{}", long.to_uppercase().replace('-', "_"));
            arg.env(variable)
        }
        None => arg,
    };
    let flags = annotated_flags().join(", ");
    Cli::command()
        .mut_subcommand("proxy", |proxy| {
            proxy.mut_args(with_env).mut_arg("lame_duck", |arg| arg.default_value(lame_duck))
        })
        .mut_subcommand("run", |run| {
            run.mut_args(with_env).mut_arg("lame_duck", |arg| arg.default_value(lame_duck))
        })
        .mut_subcommand("webhook", |webhook| webhook.mut_args(with_env))
        .mut_subcommand("inject", |inject| inject.after_help(inject::ANNOTATIONS.replace("{flags}", &flags)))
}

/// The proxy's flags that an annotation of the same name sets, in order.
pub(super) fn annotated_flags() -> Vec<String> {
    let proxy = ProxyArgs::augment_args(Command::new("proxy"));
    let flags = proxy.get_arguments().filter_map(|arg| arg.get_long());
    let mut flags: Vec<_> = flags.filter(|flag| !NOT_ANNOTATED.contains(flag)).map(str::to_owned).collect();
    flags.sort_unstable();
    flags
}

/// Whether an annotation of this name sets a flag of the proxy.
pub fn is_annotated_flag(name: &str) -> bool {
    static FLAGS: LazyLock<Vec<String>> = LazyLock::new(annotated_flags);
    FLAGS.iter().any(|flag| flag == name)
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
    #[arg(long, value_name = "ADDR", help_heading = "App")]
    pub upstream: UpstreamAddr,
    /// What SIGTERM means to this proxy
    #[arg(long, value_name = "MODE", value_enum, default_value = "none", help_heading = "Drain")]
    pub sidecar: Sidecar,
    /// Write preload.js and this program there, for the app's container: named in NODE_OPTIONS (--require), the one
    /// lets Node end at SIGTERM as PID 1; the other is for a preStop exec, as `lameduck drain --app-hook`
    #[arg(long, value_name = "DIR", help_heading = "App")]
    pub share_dir: Option<PathBuf>,
    /// A GET to send once drained, before the app's preStop hook has its answer: a /PATH of the app, or
    /// http(s)://HOST:PORT/PATH; it takes from the reserve
    #[arg(long, value_name = "URL", help_heading = "Drain")]
    pub after_drain: Option<AfterDrain>,
    /// A header field of that GET, as in 'Name: value'; repeat it, or separate by line breaks
    #[arg(long, value_name = "FIELD", value_delimiter = '\n',
          hide_env_values = true, value_parser = values::field, help_heading = "Drain")]
    pub after_drain_header: Vec<(HeaderName, HeaderValue)>,
    /// A path of the app that the probe port passes on, as /app-probe/PATH; repeat it, or separate by line
    /// breaks. For the probes of an app on a unix socket, which the kubelet can't reach
    #[arg(long, value_name = "PATH", value_delimiter = '\n', help_heading = "Readiness")]
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
    #[arg(long, value_name = "PORT", help_heading = "App",
          value_parser = values::port_or_link)]
    pub app_port: Option<PortOrLink>,
    /// The app must listen within this time; else it is ended, and the exit code is 1
    #[arg(long, value_name = "TIME", help_heading = "App",
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
    pub drain: DrainSettings,
    #[command(flatten)]
    pub long_polls: LongPolls,
    /// What is a health check besides those known by their agent (kubelet, AWS, Google, Azure, Envoy, Consul, Prometheus, …):
    /// a /PATH, or agent:TEXT for a part of the User-Agent; repeat it, or separate by commas. A drain waits neither for
    /// it nor for its coming to end, and a hold lets it pass. HAProxy's bare HTTP/1.0 check is known; Traefik's, curl's and
    /// wget's look like anybody's, so name their path
    #[arg(long, value_name = "/PATH|agent:TEXT", value_delimiter = ',', help_heading = "Drain")]
    pub health_check: Vec<HealthCheck>,
    #[command(flatten)]
    pub ready: ReadySettings,
    #[command(flatten)]
    pub app: AppArgs,
    #[command(flatten)]
    pub limits: Limits,
    /// Data-plane threads [default: the cores that this process may use]
    #[arg(long, help_heading = "Limits", value_name = "N", value_parser = value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    #[command(flatten)]
    pub log: LogArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Addresses")]
pub(super) struct AddressArgs {
    /// Where clients come in, as in :4880 or 127.0.0.1:4880; repeat it, or separate by commas
    /// [default: :4880; run: the inherited PORT, if set; none with --tls-listen]
    #[arg(long, value_name = "ADDR", value_delimiter = ',', value_parser = parse_listen)]
    pub listen: Vec<SocketAddr>,
    /// Pass connections on byte for byte, as in :6379=redis:6379 or :3306=unix:/run/db.sock; repeat it, or separate by
    /// commas. Each is work in flight until it closes: a drain lets it run to its deadline, then resets it, and hold
    /// and swap hold new ones. switch doesn't move them
    #[arg(long, value_name = "ADDR=UPSTREAM", value_delimiter = ',')]
    pub tcp: Vec<TcpRoute>,
    /// Networks of load balancers that begin each connection to --listen and --tcp with a PROXY protocol header
    /// (version 1 or 2), as in 10.0.0.0/8,fd00::/8: the address in it is the client's. From these a header is
    /// required, from others it is not read
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub proxy_protocol_from: Vec<Cidr>,
    /// Another lameduck of the same user may listen there too, so that one front door takes over from another
    #[arg(long)]
    pub reuseport: bool,
    /// Where the kubelet and Prometheus ask: /livez, /readyz, /metrics and /drain; or 'off'. run takes another port when
    /// this one is in use
    #[arg(long, value_name = "ADDR", default_value = ":4881",
          value_parser = values::listen_or_off)]
    pub probe_listen: Switch,
    /// The control socket, which the commands drain, resume, status and so on
    /// talk to; @NAME is one without a file. Its default is the first of these folders that belongs to this user alone, or
    /// else @lameduck-UID. run takes the next free one, as in control-2.sock
    /// [default: control.sock in /run/lameduck, $XDG_RUNTIME_DIR/lameduck or /tmp/lameduck-UID]
    #[arg(long, value_name = "PATH")]
    pub control: Option<ControlAddr>,
    /// Control by TCP for the pod's other containers, on loopback only; or 'off'
    /// [default: 127.0.0.1:4882 in a pod, else off]
    #[arg(long, value_name = "ADDR", value_parser = values::loopback_or_off)]
    pub control_listen: Option<Switch>,
    /// What GET /drain on the probe port must show in its Lameduck-Token header; without it every such call is
    /// refused; better set by its variable, as other users can read a command line
    #[arg(long, value_name = "TEXT", hide_env_values = true, value_parser = values::token)]
    pub token: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "TLS")]
pub(super) struct TlsArgs {
    /// Where clients come in by TLS 1.2 or 1.3, as in :4443; repeat it, or separate by commas. --listen has no default
    /// then
    #[arg(long, value_name = "ADDR", value_delimiter = ',',
          value_parser = parse_listen)]
    pub tls_listen: Vec<SocketAddr>,
    /// The folder of tls.crt (the certificate and its chain) and tls.key, as a Secret is mounted, and of subfolders with
    /// such pairs: a client that asks for one of a certificate's DNS names gets that one, any other the folder's own.
    /// Changes are seen within seconds; no connection ends by them
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// The authorities (PEM) of clients' certificates, which are asked for then; the app is told the verified
    /// certificate's subject in X-Client-Cert-Subject, and never one that a client has sent itself
    #[arg(long, value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// What becomes of a client without a certificate, with --tls-client-ca [default: require]
    #[arg(long, value_name = "MODE", value_enum)]
    pub tls_client_auth: Option<ClientAuth>,
    /// How long a TLS handshake may take; past it the connection is closed
    #[arg(long, value_name = "TIME", default_value = "10s",
          value_parser = values::time_over_zero)]
    pub tls_handshake_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "TLS")]
pub(super) struct UpstreamTlsArgs {
    /// The authorities (PEM) that sign the certificate of an app with https://; one that they didn't sign is 502
    /// [default: the system's, as in /etc/ssl/certs/ca-certificates.crt]
    #[arg(long, value_name = "FILE")]
    pub upstream_ca: Option<PathBuf>,
    /// The name that the certificate of an app with https:// has to be for [default: the host of --upstream]
    #[arg(long, value_name = "NAME", value_parser = values::server_name)]
    pub upstream_name: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "App")]
pub(super) struct AppArgs {
    /// How long a request or --tcp connection waits for an app whose port is closed (it crashed, or restarts); past it
    /// 503, or a reset. Where compose replaces the app, that is its stop and its boot together: 60s, say
    #[arg(long, value_name = "TIME", default_value = "10s",
          value_parser = values::time)]
    pub upstream_wait: Duration,
    /// What the app speaks
    #[arg(long, value_name = "PROTOCOL", value_enum, default_value = "auto")]
    pub upstream_protocol: UpstreamProtocol,
    /// What the app gets to see as X-Forwarded-For, -Proto, -Host and -Port
    /// [default: if-none in a sidecar and under run, where the number of proxies stays what it was without us; append
    /// in a front door, and with --tls-listen]
    #[arg(long, value_name = "MODE", value_enum)]
    pub forwarded: Option<Forwarded>,
}
