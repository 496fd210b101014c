//! Turns the parsed command line and the environment into checked settings. It opens no sockets.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use clap::FromArgMatches;
use clap::error::ErrorKind;
use hyper::header::{HeaderName, HeaderValue};
use rustls::pki_types::ServerName;

use super::args::{Cli, CommonArgs, RunArgs, Sub, TlsArgs, UpstreamTlsArgs, annotated_flags, command};
use super::clients::StatusArgs;
use super::command::{AppCommand, Command, LogSettings, StatusView};
use super::surroundings::Surroundings;
use crate::config::{
    APP_IP, AfterDrain, AppUrl, CaptureSettings, ControlAddr, Forwarded, ReadyCheck, Settings, Sidecar,
    TlsSettings, UpstreamAddr, UpstreamProtocol, parse_listen,
};
use crate::inject::manifest::Task;

/// Reads the command line (program name first) and the environment.
///
/// # Errors
/// What clap prints, including `--help` and `--version`. Its `exit()` chooses the stream and the exit code (2 for usage
/// errors).
pub fn parse<I, T>(args: I) -> Result<Command, clap::Error>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    parse_at(args, &Surroundings::of_process())
}

pub(super) fn parse_at<I, T>(args: I, around: &Surroundings) -> Result<Command, clap::Error>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let mut command = command(around);
    let matches = command.try_get_matches_from_mut(args)?;
    let cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
    to_command(cli.command, around).map_err(|why| {
        // Lets each subcommand print its full name, `lameduck proxy`, in the usage line.
        command.build();
        let sub = matches.subcommand_name().and_then(|name| command.find_subcommand_mut(name).cloned());
        sub.unwrap_or(command).error(ErrorKind::ValueValidation, why)
    })
}

fn to_command(typed: Sub, around: &Surroundings) -> Result<Command, String> {
    Ok(match typed {
        Sub::Proxy(args) => {
            let log = log_settings(&args.common);
            // A captured port is served under its own number.
            let by_default = parse_listen(":4880")?;
            let listen: &[_] = if args.capture.capture { &[] } else { &[by_default] };
            let app = || UpstreamAddr::Tcp { host: APP_IP.to_string(), port: 0 };
            let upstream = args.upstream.unwrap_or_else(app);
            let forwarded = match args.sidecar {
                Sidecar::None => Forwarded::Append,
                Sidecar::Native | Sidecar::Ordinary => Forwarded::IfNone,
            };
            let mut settings = settings(args.common, listen, upstream, args.sidecar, forwarded, around)?;
            settings.capture = args.capture;
            let UpstreamTlsArgs { upstream_ca: ca, upstream_name: name } = args.upstream_tls;
            settings.upstream_ca = ca;
            if let Some(name) = name {
                set_certificate_name(&mut settings.upstream, name)?;
            }
            settings.share_dir = args.share_dir;
            settings.after_drain = after_drain(args.after_drain, args.after_drain_header)?;
            settings.app_probes = args.app_probe;
            Command::Proxy { settings: Box::new(settings), log }
        }
        Sub::Run(args) => run(*args, around)?,
        Sub::Drain(args) if args.app_hook => {
            Command::AppHook { control: around.places(args.control.control), command: args.command }
        }
        Sub::Drain(args) => Command::Drain {
            control: around.places(args.control.control),
            timeout: args.timeout,
            wait: !args.no_wait,
        },
        Sub::Resume(args) => Command::Resume { control: around.places(args.control) },
        Sub::Hold(args) => Command::Hold {
            control: around.places(args.control.control),
            how: args.hold.settings(),
            until_idle: args.until_idle,
        },
        Sub::Swap(args) => Command::Swap {
            control: around.places(args.control.control),
            how: args.hold.settings(),
            timeout: args.timeout,
            command: args.command,
        },
        Sub::Lease(args) => Command::Lease {
            control: around.places(args.control.control),
            name: args.name,
            command: args.command,
        },
        Sub::Switch(args) => Command::Switch {
            control: around.places(args.control.control),
            to: args.to,
            timeout: args.timeout,
            wait: !args.no_wait,
        },
        Sub::Status(args) => {
            Command::Status { view: view(&args), control: around.places(args.control.control) }
        }
        Sub::Inject(args) => Command::Inject(args.request(check_proxy, annotated_flags)?),
        Sub::Uninject(args) => Command::Inject(args.request(Task::Uninject)?),
        Sub::Audit(args) => Command::Audit(args.task(check_proxy, annotated_flags)),
        Sub::Webhook(args) => {
            let log = LogSettings { format: args.log.log_format, level: args.log.log_level };
            Command::Webhook { settings: Box::new(args.settings(around.api.clone())?), log }
        }
    })
}

fn view(args: &StatusArgs) -> StatusView {
    match (args.ready, args.json) {
        (true, _) => StatusView::Ready,
        (false, true) => StatusView::Json { watch: args.watch },
        (false, false) => StatusView::Human { watch: args.watch },
    }
}

fn after_drain(
    url: Option<AppUrl>,
    headers: Vec<(HeaderName, HeaderValue)>,
) -> Result<Option<AfterDrain>, String> {
    match url {
        Some(url) => Ok(Some(AfterDrain { url, headers })),
        None if headers.is_empty() => Ok(None),
        None => Err("--after-drain-header needs --after-drain".to_owned()),
    }
}

fn run(args: RunArgs, around: &Surroundings) -> Result<Command, String> {
    let log = log_settings(&args.common);
    let app_port = args.app_port.and_then(|given| given.0);
    let listen = match &around.port {
        Some(port) => match port.parse() {
            Ok(port @ 1..) => vec![SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)],
            Ok(0) | Err(_) => {
                return Err(format!(
                    "PORT is '{port}', which is not a port: set it to a number, or use --listen"
                ));
            }
        },
        None if app_port.is_some() => vec![parse_listen(":4880")?],
        // The ports that the app opens are served under their own numbers.
        None => vec![],
    };
    // Use the name, because an app may listen on ::1 only or on 127.0.0.1 only.
    let upstream = UpstreamAddr::Tcp { host: "localhost".to_owned(), port: app_port.unwrap_or(0) };
    let settings = settings(args.common, &listen, upstream, Sidecar::None, Forwarded::IfNone, around)?;
    let app = AppCommand { port: app_port, start_timeout: args.start_timeout, command: args.command };
    Ok(Command::Run { settings: Box::new(settings), log, app })
}

fn log_settings(common: &CommonArgs) -> LogSettings {
    LogSettings { format: common.log.lines.log_format, level: common.log.lines.log_level }
}

fn settings(
    common: CommonArgs,
    default_listen: &[SocketAddr],
    upstream: UpstreamAddr,
    sidecar: Sidecar,
    forwarded: Forwarded,
    around: &Surroundings,
) -> Result<Settings, String> {
    let CommonArgs { addresses, tls, drain, tell, long_polls, health_check, .. } = common;
    let CommonArgs { ready, app, limits, threads, log, .. } = common;
    let control_listen = around.in_pod.then(|| SocketAddr::from(([127, 0, 0, 1], 4882)));
    let tls = tls_settings(tls)?;
    let by_default = addresses.listen.is_empty() && tls.is_none();
    // A proxy that terminates TLS is the only one that knows that the client used it.
    let forwarded = if tls.is_some() { Forwarded::Append } else { forwarded };
    let settings = Settings {
        listen: if by_default { default_listen.to_vec() } else { addresses.listen },
        reuse_port: addresses.reuseport,
        tls,
        upstream,
        tcp: addresses.tcp,
        capture: CaptureSettings::default(),
        proxy_protocol_from: addresses.proxy_protocol_from,
        upstream_ca: None,
        probe_listen: addresses.probe_listen.0,
        control: around.places(addresses.control),
        switched: None,
        control_listen: addresses.control_listen.map_or(control_listen, |switch| switch.0),
        token: addresses.token,
        sidecar,
        share_dir: None,
        after_drain: None,
        app_probes: vec![],
        drain,
        tell,
        long_polls,
        health_checks: health_check,
        ready,
        upstream_wait: app.upstream_wait,
        upstream_protocol: app.upstream_protocol,
        forwarded: app.forwarded.unwrap_or(forwarded),
        access_log: log.access_log,
        threads: threads.map_or(around.cores, usize::from),
        limits,
        termination_log: log.termination_log,
    };
    settings.drain.check()?;
    check_protocol(&settings)?;
    check_addresses(&settings)?;
    Ok(settings)
}

/// The TLS settings; `None` without `--tls-listen`, in which case the related flags are errors.
fn tls_settings(args: TlsArgs) -> Result<Option<TlsSettings>, String> {
    if args.tls_client_auth.is_some() && args.tls_client_ca.is_none() {
        return Err("--tls-client-auth needs --tls-client-ca".to_owned());
    }
    match (args.tls_listen.is_empty(), args.tls_dir) {
        (false, Some(dir)) => Ok(Some(TlsSettings {
            listen: args.tls_listen,
            dir,
            client_ca: args.tls_client_ca,
            client_auth: args.tls_client_auth.unwrap_or_default(),
            handshake_timeout: args.tls_handshake_timeout,
        })),
        (false, None) => Err("--tls-listen needs --tls-dir, the folder of tls.crt and tls.key".to_owned()),
        (true, None) if args.tls_client_ca.is_none() => Ok(None),
        (true, _) => Err("--tls-dir and --tls-client-ca need --tls-listen".to_owned()),
    }
}

/// Sets the name that the app's certificate must be valid for, in place of the host of `--upstream`.
fn set_certificate_name(upstream: &mut UpstreamAddr, wanted: String) -> Result<(), String> {
    let UpstreamAddr::Tls { name, .. } = upstream else {
        return Err("--upstream-name needs https:// in --upstream".to_owned());
    };
    ServerName::try_from(wanted.as_str()).map_err(|why| format!("--upstream-name '{wanted}': {why}"))?;
    *name = wanted;
    Ok(())
}

/// Refuses checks over HTTP/1.1 of an app that speaks HTTP/2 only.
fn check_protocol(settings: &Settings) -> Result<(), String> {
    let ready = &settings.ready;
    let asked = ready.check != ReadyCheck::Connect || !ready.warm_up.is_empty();
    if asked && settings.upstream_protocol == UpstreamProtocol::Http2 {
        return Err(
            "--ready-check PATH and --warm-up use HTTP/1.1, which --upstream-protocol http2 excludes"
                .to_owned(),
        );
    }
    Ok(())
}

/// Refuses a port that is used for two of our addresses, a TCP address as the control socket, and an upstream that is
/// this proxy itself.
fn check_addresses(settings: &Settings) -> Result<(), String> {
    if let Some(ControlAddr::Tcp(addr)) = settings.control.given {
        return Err(format!("--control {addr} is not a socket path: use --control-listen for an address"));
    }
    let ours: Vec<_> = settings.own_addresses().collect();
    for (n, (flag, addr)) in ours.iter().enumerate() {
        if let Some((other, _)) = ours[..n].iter().find(|(_, earlier)| overlap(*earlier, *addr)) {
            return Err(format!("{flag} {addr} is already used by {other}: use another port"));
        }
    }
    let upstreams = settings.tcp.iter().map(|route| &route.upstream);
    upstreams.chain([&settings.upstream]).try_for_each(|upstream| check_upstream(upstream, &ours))
}

fn check_upstream(upstream: &UpstreamAddr, ours: &[(&str, SocketAddr)]) -> Result<(), String> {
    let Some((host, port)) = upstream.host_and_port() else { return Ok(()) };
    let mut hosts: Vec<IpAddr> = host.parse().into_iter().collect();
    if host == "localhost" {
        hosts = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    }
    for (flag, addr) in ours {
        // Compare loopback and our own address only; any other address may belong to another machine.
        let may_be_ours = |ip: &IpAddr| ip.is_loopback() || *ip == addr.ip().to_canonical();
        if hosts.iter().filter(|ip| may_be_ours(ip)).any(|ip| overlap(*addr, SocketAddr::new(*ip, port))) {
            return Err(format!(
                "the app's address {upstream} is the proxy's own {flag}: change the port of one of them"
            ));
        }
    }
    Ok(())
}

/// Whether the two addresses can't be bound at the same time. An unspecified address covers IPv6 and IPv4; port 0 is
/// always a new port.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let (ip_a, ip_b) = (a.ip().to_canonical(), b.ip().to_canonical());
    a.port() == b.port() && a.port() != 0 && (ip_a == ip_b || ip_a.is_unspecified() || ip_b.is_unspecified())
}

/// Checks a sidecar's command line (without the program's name) as the sidecar would when it starts in a pod.
///
/// # Errors
/// A text that says what is wrong with it.
pub fn check_proxy(args: &[String]) -> Result<(), String> {
    let around = Surroundings { in_pod: true, control: vec![], cores: 1, ..Surroundings::default() };
    let typed = ["lameduck"].into_iter().chain(args.iter().map(String::as_str));
    let parsed =
        command(&around).try_get_matches_from(typed).and_then(|matches| Cli::from_arg_matches(&matches));
    let parsed = parsed.map_err(|error| {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        first.strip_prefix("error: ").unwrap_or(first).to_owned()
    });
    parsed.and_then(|cli| to_command(cli.command, &around)).map(drop)
}
