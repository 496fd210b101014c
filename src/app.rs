//! Wires everything together: build, bind (addresses are known), run until the drain is over.

mod child;
mod files;
mod find;
mod not_yet;
mod state;

use std::fmt::Display;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use self::files::share_files;
use self::find::Finder;
use self::state::AppState;
use crate::admin::{self, Admin};
use crate::capture::run::Run;
use crate::capture::watch::Capture;
use crate::cli::{self, AppCommand, LogSettings, WebhookSettings};
use crate::config::{ReadyCheck, ReadySettings, Settings, Sidecar, UpstreamAddr};
use crate::control::data_plane::DataPlane;
use crate::control::handle::{Control, DrainOutcome};
use crate::control::runner::control;
use crate::control::switch;
use crate::descriptors;
use crate::drain::machine::Trigger;
use crate::inject::share;
use crate::metrics::{self, Now};
use crate::proxy::accept::listener::{self, ListenerSender, NewListener, Switch};
use crate::proxy::accept::prepare::Service;
use crate::proxy::shared::Shared;
use crate::proxy::threads;
use crate::readiness::{self, Inputs, Readiness, stale_socket};
use crate::signal::Signals;
use crate::supervise;
use crate::telemetry;
use crate::tls;
use crate::tls::server::Termination;
use crate::upstream;
use crate::webhook;

/// Exit codes other than success, as listed in `--help`.
const FAILED: u8 = 1;
const CUT: u8 = 3;
/// Part of the platform's grace period that is reserved for the exit itself, after the last lingering connection.
const MARGIN: Duration = Duration::from_secs(1);
/// Time limit for delivering the last responses of a native sidecar: after the grace period it has 2 s in all.
const TAIL_TIMEOUT: Duration = Duration::from_millis(1000);
/// Time limit for error responses when work ends at once (a native sidecar at SIGTERM, requests to a crashed app).
const FAILURE_TIMEOUT: Duration = Duration::from_millis(300);

/// `lameduck proxy`. Returns the exit code: 0 after a clean drain, 3 if something was cut, 1 if it can't start.
pub fn proxy(settings: Settings, log: LogSettings) -> u8 {
    start(settings, log, None)
}

/// `lameduck run`. Returns the app's exit code, or a shell's code for the reason why it could not be started.
pub fn run(settings: Settings, log: LogSettings, app: AppCommand) -> u8 {
    start(settings, log, Some(app))
}

/// `lameduck webhook`. Returns the exit code: 0 if it was asked to end and every review in progress got its response, 3
/// if a second signal came first, 1 if it can't start.
pub fn webhook(settings: WebhookSettings, log: LogSettings) -> u8 {
    let _flush = match telemetry::init(log) {
        Ok(flush) => flush,
        Err(error) => return cannot("set up the log", &error),
    };
    descriptors::raise();
    let run = async {
        let mut signals = Signals::new().map_err(|error| error.to_string())?;
        let go = Notify::new();
        let mut served = std::pin::pin!(webhook::run(settings, go.notified()));
        tokio::select! {
            ended = &mut served => return ended.map(|()| 0),
            signal = signals.next() => tracing::info!(signal, "shutdown requested"),
        }
        go.notify_one();
        tokio::select! {
            ended = &mut served => ended.map(|()| 0),
            signal = signals.next() => {
                tracing::warn!(signal, "immediate shutdown requested");
                Ok(CUT)
            }
        }
    };
    match tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(8).build() {
        Ok(runtime) => {
            let code = runtime.block_on(run);
            runtime.shutdown_background();
            code.unwrap_or_else(|why: String| cannot("run the webhook", &why))
        }
        Err(error) => cannot("start", &error),
    }
}

fn start(mut settings: Settings, log: LogSettings, app: Option<AppCommand>) -> u8 {
    let _flush = match telemetry::init(log) {
        Ok(flush) => flush,
        Err(error) => return cannot("set up the log", &error),
    };
    if let Some(command) = &app
        && command.port.is_none()
        && serves_app(&settings)
    {
        match supervise::free_port() {
            Ok(port) => settings.upstream = UpstreamAddr::Tcp { host: "localhost".to_owned(), port },
            Err(error) => return cannot("find a free port for the app", &error),
        }
    }
    let bound = match BoundProxy::bind(settings, app.is_some()) {
        Ok(bound) => bound,
        Err(code) => return code,
    };
    // The admin listeners, the signals and the drain run on this thread; the data plane has its own threads.
    match tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(8).build() {
        Ok(runtime) => {
            let code = runtime.block_on(bound.run(app));
            // A blocked name look-up must not delay the exit.
            runtime.shutdown_background();
            code
        }
        Err(error) => cannot("start", &error),
    }
}

/// Whether there are listeners of our own for the app. Otherwise `run` serves it on its own ports only.
fn serves_app(settings: &Settings) -> bool {
    !settings.listen.is_empty() || settings.tls.is_some()
}

/// All listeners are bound: clients that connect now are served as soon as the threads run.
struct BoundProxy {
    settings: Settings,
    listeners: Vec<(TcpListener, Service)>,
    tls: Option<Arc<Termination>>,
    admin: admin::Bound,
}

impl BoundProxy {
    /// With `run`, the app matters: it starts even if one of our other listeners can't be bound.
    fn bind(mut settings: Settings, run: bool) -> Result<Self, u8> {
        if let Some(dir) = &settings.share_dir {
            let written = share::write(dir);
            written.map_err(|error| cannot(&format!("write to {} (--share-dir)", dir.display()), &error))?;
        }
        let tls = settings.tls.clone().map(Termination::new).transpose();
        let tls = tls.map_err(|error| cannot("begin TLS", &error))?.map(Arc::new);
        if settings.upstream_ca.is_some() || matches!(settings.upstream, UpstreamAddr::Tls { .. }) {
            let trust = tls::client::trust(settings.upstream_ca.as_deref());
            trust.map_err(|error| cannot("set up TLS to the app", &error))?;
        }
        let http = settings.listen.iter().map(|addr| (*addr, "--listen", Service::Http));
        let https = settings.tls.iter().flat_map(|tls| &tls.listen);
        let https = https.map(|addr| (*addr, "--tls-listen", Service::Https));
        let tcp = settings.tcp.iter().enumerate();
        let tcp = tcp.map(|(number, route)| (route.listen, "--tcp", Service::Tcp(number)));
        let mut listeners = Vec::new();
        for (addr, flag, service) in http.chain(https).chain(tcp) {
            let bound = listener::bind(addr, settings.reuse_port);
            let bound = bound.map_err(|error| cannot(&format!("listen on {addr} ({flag})"), &error))?;
            listeners.push((bound, service));
        }
        let admin = admin::bind(&settings, run);
        let admin = admin.map_err(|error| cannot("open the probe and control listeners", &error))?;
        settings.probe_listen = admin.probe_addr();
        settings.control_listen = admin.control_addr();
        // The app of `run` is our own child process: no earlier `switch` can apply to it, nor can its address be used
        // later.
        settings.switched = switch::file(admin.control()).filter(|_| !run);
        Ok(Self { settings, listeners, tls, admin })
    }

    async fn run(self, app: Option<AppCommand>) -> u8 {
        let Self { mut settings, listeners, tls, admin } = self;
        let mut signals = match Signals::new() {
            Ok(signals) => signals,
            Err(error) => return cannot("handle signals", &error),
        };
        log_addresses(&settings, &listeners, &admin);
        let shares = share_files(&mut settings);
        let url = listeners.first().and_then(|(listener, service)| url(listener, service));
        let idle = Arc::new(Notify::new());
        let (wake, switch) = (idle.clone(), Switch::default());
        let (open, receiver) = ListenerSender::new(switch.clone());
        let shared = Arc::new(Shared::new(settings, tls, move || wake.notify_one()));
        if let Some(tls) = shared.tls.clone() {
            tokio::spawn(tls.watch());
        }
        if let Some(chosen) = shared.settings.switched.as_deref().and_then(switch::remembered) {
            tracing::info!(upstream = %chosen, "an earlier `lameduck switch` overrides --upstream");
            shared.upstream.switch(chosen, &[]);
        }
        keep_in_order(&shared);
        let (control, runner) = control(shared.clone(), switch.clone(), idle.clone());
        tokio::spawn(runner.run());

        let warm = shared.settings.ready.warm_up.is_empty();
        let app_state = Arc::new(AppState { up: AtomicBool::new(false), warm: AtomicBool::new(warm) });
        tokio::spawn(app_state.clone().watch(shared.clone(), app.is_none()));
        let closing = Arc::new(Notify::new());
        let (served, close) = (admin_state(&shared, &control, &app_state), closing.clone());
        let admin = tokio::spawn(admin.serve(served, shares, async move { close.notified().await }));

        let closed = move || idle.notify_one();
        if shared.settings.capture.capture {
            tokio::spawn(Capture::of_pod(shared.clone(), open.clone()).watch());
        }
        let finder =
            app.as_ref().filter(|app| app.port.is_none()).and_then(|_| find(&shared, &open, &listeners));
        let serve = || {
            for (listener, service) in listeners {
                open.add(NewListener { listener, service, stays: false, released: None });
            }
            threads::start(&shared, receiver, switch, closed)
                .map_err(|error| cannot("start a thread", &error))
        };
        let code = match app {
            None => match serve() {
                Ok(()) => {
                    let code = drain_by_signals(&control, &mut signals).await;
                    tokio::select! {
                        () = linger(&shared, linger_most(&shared, &control)) => {}
                        signal = signals.next() => tracing::warn!(signal, "immediate shutdown requested"),
                    }
                    code
                }
                Err(code) => code,
            },
            Some(command) => {
                let port =
                    shared.upstream.own().host_and_port().map(|(_, port)| port).filter(|port| *port != 0);
                let (shared, control, signals) = (&*shared, &control, &mut signals);
                let mut life = child::Life { command, port, finder, shared, control, signals, url };
                life.run(serve).await
            }
        };
        closing.notify_one();
        let _ = admin.await;
        code
    }
}

/// Begins to look for the ports of `run`'s app; they are served by `open`.
fn find(shared: &Arc<Shared>, open: &ListenerSender, listeners: &[(TcpListener, Service)]) -> Option<Finder> {
    let run =
        Run::reserve().inspect_err(|error| tracing::warn!(%error, "can't find the app's ports")).ok()?;
    let own = listeners.iter().filter(|(_, service)| matches!(service, Service::Http | Service::Https));
    let own = own.filter_map(|(listener, _)| Some(listener.local_addr().ok()?.port())).collect();
    let finder = Finder::new(&run, own);
    tokio::spawn(Capture::of_run(shared.clone(), open.clone(), run).watch());
    Some(finder)
}

/// For the lifetime of the process: keeps the addresses of every upstream up to date, removes a stale socket, ends leases
/// whose time is over.
fn keep_in_order(shared: &Shared) {
    let leases = shared.leases.clone();
    tokio::spawn(async move { leases.expire().await });
    let upstream = shared.upstream.clone();
    tokio::spawn(stale_socket::keep_away(move || upstream.addr()));
    let ReadySettings { check, timeout, .. } = shared.settings.ready.clone();
    let answers = |check: ReadyCheck| {
        move |addr| {
            let check = check.clone();
            async move { readiness::check_app(&addr, &check, timeout).await }
        }
    };
    tokio::spawn(upstream::keep_up_to_date(shared.upstream.clone(), answers(check)));
    for upstream in &shared.tcp {
        tokio::spawn(upstream::keep_up_to_date(upstream.clone(), answers(ReadyCheck::Connect)));
    }
}

/// The first signal begins a drain, the second forces its end. Returns once a signal came and the drain is over.
async fn drain_by_signals(control: &Control, signals: &mut Signals) -> u8 {
    let signal = signals.next().await;
    tracing::info!(signal, "shutdown requested");
    drain_now(control, signals).await
}

/// As [`drain_by_signals`], after the first signal.
async fn drain_now(control: &Control, signals: &mut Signals) -> u8 {
    let idle = control.status().in_flight == 0;
    let mut drained = std::pin::pin!(control.drain(Trigger::Signal));
    loop {
        tokio::select! {
            outcome = &mut drained => match outcome {
                DrainOutcome::Drained { verdict } => return code(verdict.is_clean()),
                // An operator resumed: the next signal begins a new drain.
                DrainOutcome::Resumed | DrainOutcome::AppMayStop => {
                    signals.next().await;
                    drained.set(control.drain(Trigger::Signal));
                }
            },
            signal = signals.next() => {
                tracing::warn!(signal, "immediate shutdown requested");
                control.force();
            }
            () = control.exit() => {
                // No verdict in time: the work in flight at the signal may have been cut.
                return match tokio::time::timeout(FAILURE_TIMEOUT, &mut drained).await {
                    Ok(DrainOutcome::Drained { verdict }) => code(verdict.is_clean()),
                    _ => code(idle),
                };
            }
        }
    }
}

fn code(clean: bool) -> u8 {
    if clean { 0 } else { CUT }
}

/// Time that the platform's grace period leaves for lingering.
fn linger_most(shared: &Shared, control: &Control) -> Duration {
    let settings = &shared.settings;
    if settings.sidecar == Sidecar::Native {
        return TAIL_TIMEOUT;
    }
    let left = control.status().deadline_ms.unwrap_or(0).max(0) as u64;
    Duration::from_millis(left) + settings.drain.reserve.saturating_sub(MARGIN)
}

/// Waits for closed connections whose peers still read.
async fn linger(shared: &Shared, most: Duration) {
    let began = Instant::now();
    while shared.lingering.load(Ordering::Acquire) > 0 && began.elapsed() < most {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn admin_state(shared: &Arc<Shared>, control: &Control, app: &Arc<AppState>) -> Admin {
    let ready = {
        let (shared, control, app) = (shared.clone(), control.clone(), app.clone());
        move || {
            let published = control.published();
            readiness::verdict(&Inputs {
                phase: shared.phase(),
                trigger: published.trigger,
                in_pod: cli::in_pod(),
                sidecar: shared.settings.sidecar,
                app_up: app.up.load(Ordering::Relaxed),
                warmed_up: app.warm.load(Ordering::Relaxed),
                drain_readiness: shared.settings.drain.readiness,
                restarting: published.restarting,
            })
        }
    };
    let metrics = {
        let (shared, control, ready) = (shared.clone(), control.clone(), ready.clone());
        move || {
            let published = control.published();
            let now = Now {
                in_flight: shared.gate.in_flight(),
                held: shared.gate.held(),
                connections: shared.gate.connections(),
                phase: shared.phase() as u64,
                ready: ready() == Readiness::Ready,
                drains: published.drains,
                last_drain: published.last.map(|last| last.as_secs_f64()),
                bypassed: shared
                    .captured
                    .bypassed()
                    .iter()
                    .map(|it| (it.address.port(), it.reason.name()))
                    .collect(),
                leases: shared.leases.out() as u64,
                log_dropped: telemetry::dropped(),
            };
            metrics::render(&shared.shards, &now)
        }
    };
    let ledger = shared.clone();
    Admin {
        control: control.clone(),
        ready: Box::new(ready),
        ledger: Box::new(move || ledger.ledger()),
        leases: shared.leases.clone(),
        captured: shared.captured.clone(),
        metrics: Box::new(metrics),
    }
}

fn log_addresses(settings: &Settings, listeners: &[(TcpListener, Service)], admin: &admin::Bound) {
    let addrs = |wanted: fn(&Service) -> bool| {
        let those = listeners.iter().filter(move |(_, service)| wanted(service));
        let addrs = those.filter_map(|(listener, _)| Some(listener.local_addr().ok()?.to_string()));
        addrs.collect::<Vec<_>>()
    };
    let at = |service| Some(addrs(service).join(",")).filter(|addrs| !addrs.is_empty());
    let tcp = addrs(|service| matches!(service, Service::Tcp(_)));
    let tcp: Vec<_> =
        tcp.iter().zip(&settings.tcp).map(|(addr, to)| format!("{addr}={}", to.upstream)).collect();
    tracing::info!(
        listen = at(|service| *service == Service::Http),
        tls_listen = at(|service| *service == Service::Https),
        upstream = settings.upstream.is_known().then(|| settings.upstream.to_string()),
        tcp = (!tcp.is_empty()).then(|| tcp.join(",")),
        probe = admin.probe_addr().as_ref().map(SocketAddr::to_string),
        control = %admin.control(),
        control_tcp = admin.control_addr().as_ref().map(SocketAddr::to_string),
        version = env!("CARGO_PKG_VERSION"),
        "listening"
    );
}

/// URL of the listener for a browser on this machine; none if it is not HTTP.
fn url(listener: &TcpListener, service: &Service) -> Option<String> {
    let scheme = match service {
        Service::Http => "http",
        Service::Https => "https",
        Service::Tcp(_) | Service::Captured { .. } => return None,
    };
    let addr = listener.local_addr().ok()?;
    Some(match addr.ip().to_canonical() {
        ip if ip.is_unspecified() => format!("{scheme}://localhost:{}", addr.port()),
        ip => format!("{scheme}://{}", SocketAddr::new(ip, addr.port())),
    })
}

fn cannot(what: &str, error: &dyn Display) -> u8 {
    tracing::error!("can't {what}: {error}");
    FAILED
}
