//! The command line as clap types, one struct per heading of `--help`.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use clap::{Arg, Args, Command, CommandFactory, Parser, Subcommand, value_parser};
use hyper::header::{HeaderName, HeaderValue};

use super::clients::{ControlArgs, DrainArgs, HoldArgs, LeaseArgs, StatusArgs, SwapArgs, SwitchArgs};
use super::inject::{self, AuditArgs, FileArgs, InjectArgs};
use super::log::LogArgs;
use super::surroundings::Surroundings;
use super::webhook::{self, WebhookArgs};
use crate::config::values::{self, OptionalListener, PortOrLink};
use crate::config::{
    AppProbe, AppUrl, CaptureSettings, Cidr, ClientAuth, ControlAddr, DrainSettings, Forwarded, HealthCheck,
    Limits, LongPolls, ReadySettings, Sidecar, TcpRoute, TellSettings, UpstreamAddr, UpstreamProtocol,
    parse_listen,
};

const EXIT_CODES: &str = "\
Exit codes: 0 = done, 1 = failed, 2 = the command line or the environment is wrong.
  proxy, drain: 3 = drained, but something was cut
  swap:   130 = interrupted; the held requests were released
  lease:  the command's; 75 = not run, because a drain accepts no new work
  status: 1 = not ready, with --ready
  run:    the app's own code (128 + N when signal N ended it)
  webhook: 3 = a second signal came before the last review was done
  inject, uninject: 1 = with --check, something would change; 2 = also: a file is not understood
  audit:  1 = a pod lacks the sidecar or has another version of it";

/// A sidecar proxy that makes unmodified apps shut down gracefully.
#[derive(Debug, Parser)]
#[command(name = "lameduck", version, after_help = EXIT_CODES, max_term_width = 110)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub command: Sub,
}

/// The flags of `proxy` that no annotation sets: the injection sets them itself, has an annotation of another name for
/// them, or does not mount the files that they need.
const NOT_ANNOTATED: [&str; 24] = [
    "after-drain",
    "after-drain-header",
    "app-probe",
    "capture",
    "capture-as",
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

/// The whole command line. It adds an environment variable to each flag of `proxy`, `run` and `webhook`, and lists the
/// flags that annotations can set in the help of `inject`.
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

/// The flags of `proxy` that an annotation of the same name sets, sorted.
pub fn annotated_flags() -> &'static [String] {
    static FLAGS: LazyLock<Vec<String>> = LazyLock::new(|| {
        let proxy = ProxyArgs::augment_args(Command::new("proxy"));
        let flags = proxy.get_arguments().filter_map(|arg| arg.get_long());
        let mut flags: Vec<_> =
            flags.filter(|flag| !NOT_ANNOTATED.contains(flag)).map(str::to_owned).collect();
        flags.sort_unstable();
        flags
    });
    &FLAGS
}

#[derive(Debug, Subcommand)]
pub(super) enum Sub {
    /// Run the proxy in front of an app, as a sidecar or as the front door
    ///
    /// Every flag can also be set by its environment variable; the flag takes precedence. Durations are written as 5s
    /// or 1m30s.
    #[command(after_help = EXIT_CODES)]
    Proxy(Box<ProxyArgs>),
    /// Start an app and run the proxy in front of it, in one container
    ///
    /// Serves every port that the app opens under its own number. With --listen or an inherited PORT it listens there, and
    /// gives the app a free port as its PORT. It waits until the app listens. SIGTERM,
    /// SIGINT and SIGQUIT start a drain; after it the app gets SIGTERM. Other signals are forwarded to the app, and the
    /// terminal belongs to the app. Every flag can also be set by its environment variable; the flag takes precedence.
    /// Durations are written as 5s or 1m30s.
    #[command(after_help = EXIT_CODES)]
    Run(Box<RunArgs>),
    /// Drain a running proxy and wait until nothing is in flight
    #[command(after_help = EXIT_CODES)]
    Drain(DrainArgs),
    /// Hold new requests while running ones finish, until resume or --max
    ///
    /// Requests that the app itself makes through the proxy are not held. The proxy recognises the app by its address,
    /// so every client with the same address counts as the app. On loopback, by a unix socket or through a published
    /// port it can't be recognised: its requests are held too, and running requests that depend on them wait.
    /// Streams and long polls end as in a drain; their clients are held when they reconnect.
    #[command(after_help = EXIT_CODES)]
    Hold(HoldArgs),
    /// Hold new requests, run a command that replaces the app, and release them once it answers
    #[command(after_help = EXIT_CODES)]
    Swap(SwapArgs),
    /// Run a command that a drain waits for, as for a request
    ///
    /// The command counts as in flight until it ends. It is not run once a drain accepts no new work. SIGTERM is passed on
    /// to it.
    #[command(after_help = EXIT_CODES)]
    Lease(LeaseArgs),
    /// Send new requests to another upstream once it answers, and wait until the old one has no requests left
    ///
    /// Only the upstream of --listen changes; --tcp is unaffected. The choice takes precedence over --upstream until
    /// --back undoes it. It is remembered beside the control socket: put that in a volume to keep it. With run, the app
    /// is its own child, so the choice ends with the process.
    #[command(after_help = EXIT_CODES)]
    Switch(SwitchArgs),
    /// End a drain or a hold and continue serving
    #[command(after_help = EXIT_CODES)]
    Resume(ControlArgs),
    /// Show the state of a running proxy and the requests in flight
    #[command(after_help = EXIT_CODES)]
    Status(StatusArgs),
    /// Add the sidecar to Kubernetes manifests
    ///
    /// Prints all manifests. Those that need no change are printed byte for byte; comments, order and quoting are kept.
    /// Every workload gets the sidecar unless its lameduck.dev/inject annotation is disabled; other lameduck.dev
    /// annotations of its pods set the details. Running it again changes nothing.
    Inject(InjectArgs),
    /// Remove the sidecar from manifests that inject has changed
    #[command(after_help = inject::EXIT_CODES)]
    Uninject(FileArgs),
    /// List running pods that should have the sidecar and don't, or have another version of it
    ///
    /// Reads what kubectl get namespaces,pods -A -o json prints. A pod should have the sidecar if it or its namespace has
    /// the label lameduck.dev/inject: enabled. Each workload is listed with the number of its pods, the reason, and how to
    /// replace them.
    #[command(after_help = inject::AUDIT_EXIT_CODES)]
    Audit(AuditArgs),
    /// Run the mutating admission webhook, which adds the sidecar to pods as they are created
    ///
    /// It adds the same sidecar as inject to the pods that the webhook configuration selects. It never refuses a pod:
    /// it leaves pods that it does not understand unchanged, and warns. Every flag can also be set by its environment
    /// variable; the flag takes precedence.
    #[command(after_help = webhook::AFTER_HELP)]
    Webhook(Box<WebhookArgs>),
}

#[derive(Debug, Args)]
pub(super) struct ProxyArgs {
    /// Address of the app: host:port, https://host:port or unix:/path. A name is resolved every second; requests are
    /// balanced over all its addresses. Required unless --capture finds the app's ports
    #[arg(
        long,
        value_name = "ADDR",
        help_heading = "App",
        required_unless_present = "capture",
        conflicts_with = "capture"
    )]
    pub upstream: Option<UpstreamAddr>,
    /// What SIGTERM means to this proxy
    #[arg(long, value_name = "MODE", value_enum, default_value = "none", help_heading = "Drain")]
    pub sidecar: Sidecar,
    /// Folder to which preload.js and this program are written, for the app's container. With preload.js in
    /// NODE_OPTIONS (--require), Node as PID 1 exits on SIGTERM; the program is for a preStop exec, as `lameduck drain
    /// --app-hook`
    #[arg(long, value_name = "DIR", help_heading = "App")]
    pub share_dir: Option<PathBuf>,
    /// GET to send after the drain, before the app's preStop hook is answered: a /PATH of the app, or
    /// http(s)://HOST:PORT/PATH. It uses part of the reserve
    #[arg(long, value_name = "URL", help_heading = "Drain")]
    pub after_drain: Option<AppUrl>,
    /// Header field of the --after-drain request, as in 'Name: value'. Repeat the flag or separate by line breaks
    #[arg(long, value_name = "FIELD", value_delimiter = '\n',
          hide_env_values = true, value_parser = values::field, help_heading = "Drain")]
    pub after_drain_header: Vec<(HeaderName, HeaderValue)>,
    /// Path of the app that the probe port forwards, as /app-probe/PATH. Repeat the flag or separate by line breaks.
    /// For the probes of an app on a unix socket, which the kubelet can't reach
    #[arg(long, value_name = "PATH", value_delimiter = '\n', help_heading = "Readiness")]
    pub app_probe: Vec<AppProbe>,
    #[command(flatten)]
    pub capture: CaptureSettings,
    #[command(flatten)]
    pub upstream_tls: UpstreamTlsArgs,
    #[command(flatten)]
    pub common: CommonArgs,
}

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// Port of the app, which also gets it as PORT, for an app that can't give up its port to lameduck because it is
    /// statically linked. Other apps are found on the port that they open
    #[arg(long, value_name = "PORT", help_heading = "App",
          value_parser = values::port_or_link)]
    pub app_port: Option<PortOrLink>,
    /// Time limit for the app to listen. Beyond it the app is stopped, and the exit code is 1
    #[arg(long, value_name = "TIME", help_heading = "App",
          default_value = "60s", value_parser = values::time_over_zero)]
    pub start_timeout: Duration,
    /// The app and its arguments, after lameduck's own flags; a -- before it is optional
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
    pub tell: TellSettings,
    #[command(flatten)]
    pub long_polls: LongPolls,
    /// Request that is a health check: a /PATH, or agent:TEXT for a part of the User-Agent. Repeat the flag or separate
    /// by commas. Those of kubelet, AWS, Google, Azure, Envoy, Consul, Prometheus and others are recognised by their
    /// User-Agent; HAProxy's bare HTTP/1.0 check is recognised too. Those of Traefik, curl and wget look like any
    /// request, so give their path. A drain does not wait for health checks or for them to stop arriving, and a hold
    /// does not hold them
    #[arg(long, value_name = "/PATH|agent:TEXT", value_delimiter = ',', help_heading = "Drain")]
    pub health_check: Vec<HealthCheck>,
    #[command(flatten)]
    pub ready: ReadySettings,
    #[command(flatten)]
    pub app: AppArgs,
    #[command(flatten)]
    pub limits: Limits,
    /// Number of data-plane threads [default: the number of cores that this process may use]
    #[arg(long, help_heading = "Limits", value_name = "N", value_parser = value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    #[command(flatten)]
    pub log: LogArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Addresses")]
pub(super) struct AddressArgs {
    /// Address on which clients connect, as in :4880 or 127.0.0.1:4880. Repeat the flag or separate by commas
    /// [default: :4880; run: the inherited PORT, else :4880 with --app-port and none without; none with --tls-listen]
    #[arg(long, value_name = "ADDR", value_delimiter = ',', value_parser = parse_listen)]
    pub listen: Vec<SocketAddr>,
    /// Address to listen on and destination for connections that are forwarded byte for byte, as in :6379=redis:6379 or
    /// :3306=unix:/run/db.sock. Repeat the flag or separate by commas. A connection is in flight until it closes: a
    /// drain lets it run until the deadline, then resets it; hold and swap hold new ones; switch does not affect them
    #[arg(long, value_name = "ADDR=UPSTREAM", value_delimiter = ',')]
    pub tcp: Vec<TcpRoute>,
    /// Networks of load balancers that begin each connection to --listen and --tcp with a PROXY protocol header
    /// (version 1 or 2), as in 10.0.0.0/8,fd00::/8. The header gives the client's address. It is required from these
    /// networks and not read from others
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub proxy_protocol_from: Vec<Cidr>,
    /// Let another lameduck of the same user listen on the same addresses, so that a new front door can take over from
    /// an old one
    #[arg(long)]
    pub reuseport: bool,
    /// Address for the kubelet and Prometheus, with /livez, /readyz, /metrics and /drain; or 'off'. run uses another
    /// port if this one is in use
    #[arg(long, value_name = "ADDR", default_value = ":4881",
          value_parser = values::listen_or_off)]
    pub probe_listen: OptionalListener,
    /// The control socket, which drain, resume, status and the other commands connect to. @NAME is a socket without a
    /// file. The default is in the first of the folders below that belongs to this user alone, or else @lameduck-UID.
    /// run uses the next free name, as in control-2.sock [default: control.sock in /run/lameduck,
    /// $XDG_RUNTIME_DIR/lameduck or /tmp/lameduck-UID]
    #[arg(long, value_name = "PATH")]
    pub control: Option<ControlAddr>,
    /// Address for control over TCP, for the other containers of the pod, on loopback only; or 'off'
    /// [default: 127.0.0.1:4882 in a pod, else off]
    #[arg(long, value_name = "ADDR", value_parser = values::loopback_or_off)]
    pub control_listen: Option<OptionalListener>,
    /// Token that GET /drain on the probe port must carry in its Lameduck-Token header. Without this flag every such
    /// call is refused. Prefer the environment variable, because other users can read a command line
    #[arg(long, value_name = "TEXT", hide_env_values = true, value_parser = values::token)]
    pub token: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "TLS")]
pub(super) struct TlsArgs {
    /// Address on which clients connect with TLS 1.2 or 1.3, as in :4443. Repeat the flag or separate by commas.
    /// --listen then has no default
    #[arg(long, value_name = "ADDR", value_delimiter = ',',
          value_parser = parse_listen)]
    pub tls_listen: Vec<SocketAddr>,
    /// Folder with tls.crt (the certificate and its chain) and tls.key, as in a mounted Secret, and subfolders with
    /// further pairs. A client that asks for a DNS name of a certificate gets that certificate, any other client that
    /// of the folder itself. Changes take effect within seconds and close no connection
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// File of authorities (PEM) that sign client certificates. With it, clients are asked for a certificate, and the
    /// app gets its verified subject in X-Client-Cert-Subject, never one that a client has sent itself
    #[arg(long, value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// How to treat a client without a certificate, with --tls-client-ca [default: require]
    #[arg(long, value_name = "MODE", value_enum)]
    pub tls_client_auth: Option<ClientAuth>,
    /// Time limit for a TLS handshake. Beyond it the connection is closed
    #[arg(long, value_name = "TIME", default_value = "10s",
          value_parser = values::time_over_zero)]
    pub tls_handshake_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "TLS")]
pub(super) struct UpstreamTlsArgs {
    /// File of authorities (PEM) that sign the certificate of an https:// app. Any other certificate: 502
    /// [default: the system's, as in /etc/ssl/certs/ca-certificates.crt]
    #[arg(long, value_name = "FILE")]
    pub upstream_ca: Option<PathBuf>,
    /// Name that the certificate of an https:// app must be valid for [default: the host of --upstream]
    #[arg(long, value_name = "NAME", value_parser = values::server_name)]
    pub upstream_name: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "App")]
pub(super) struct AppArgs {
    /// How long a request or --tcp connection waits for an app whose port is closed because it crashed or restarts.
    /// Beyond it: 503, or a reset for --tcp. If compose replaces the app, it must cover the app's stop and start, for
    /// example 60s
    #[arg(long, value_name = "TIME", default_value = "10s",
          value_parser = values::time)]
    pub upstream_wait: Duration,
    /// Protocol that the app speaks
    #[arg(long, value_name = "PROTOCOL", value_enum, default_value = "auto")]
    pub upstream_protocol: UpstreamProtocol,
    /// How to set X-Forwarded-For, -Proto, -Host and -Port for the app [default: if-none in a sidecar and with run, so
    /// that the app sees the same number of proxies as without lameduck; append in a front door and with --tls-listen]
    #[arg(long, value_name = "MODE", value_enum)]
    pub forwarded: Option<Forwarded>,
}
