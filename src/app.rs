//! The only place that wires: build → bound (addresses known) → run until the drain is over.

mod state;

use std::fmt::Display;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::Notify;

use self::state::{ASK_AT_START, AppState};
use crate::admin::{self, Admin};
use crate::cli::{self, AppCommand, LogSettings, WebhookSettings};
use crate::config::{ReadyCheck, ReadySettings, Settings, Sidecar, UpstreamAddr};
use crate::drain::control::{Control, Outcome};
use crate::drain::machine::{Phase, Trigger};
use crate::drain::runner::control;
use crate::drain::switch;
use crate::inject::share;
use crate::metrics::{self, Now};
use crate::proxy::listen::{self, Switch};
use crate::proxy::plane::Plane;
use crate::proxy::threads;
use crate::proxy::welcome::Service;
use crate::readiness::{self, Inputs, Verdict, stale_socket};
use crate::signal::Signals;
use crate::supervise::{self, App};
use crate::telemetry;
use crate::tls;
use crate::tls::server::Termination;
use crate::upstream;
use crate::webhook;

/// Exit codes beyond success, as `--help` lists them.
const FAILED: u8 = 1;
const CUT: u8 = 3;
/// Of the platform's grace, what is left for the process's own end after the last lingering connection.
const MARGIN: Duration = Duration::from_secs(1);
/// A native sidecar's last answers have so long to be delivered: at the grace's end it is given 2 s in all.
const TAILS: Duration = Duration::from_millis(1000);
/// What ends at once (a native sidecar at its SIGTERM, requests to an app that crashed) has so long to say so.
const AT_ONCE: Duration = Duration::from_millis(300);

/// `lameduck proxy`. Returns the exit code: 0 after a clean drain, 3 when something was cut, 1 when it can't start.
pub fn proxy(settings: Settings, log: LogSettings) -> u8 {
    start(settings, log, None)
}

/// `lameduck run`. Returns the app's exit code, or why it could not be started by the codes of a shell.
pub fn run(settings: Settings, log: LogSettings, app: AppCommand) -> u8 {
    start(settings, log, Some(app))
}

/// `lameduck webhook`. Returns the exit code: 0 when it was asked to go and every review under way got its answer, 3
/// when a second signal came before, 1 when it can't start.
pub fn webhook(settings: WebhookSettings, log: LogSettings) -> u8 {
    let _flush = match telemetry::init(log) {
        Ok(flush) => flush,
        Err(error) => return cannot("set up the log", &error),
    };
    raise_open_files();
    let run = async {
        let mut signals = Signals::new().map_err(|error| error.to_string())?;
        let go = Notify::new();
        let mut served = std::pin::pin!(webhook::run(settings, go.notified()));
        tokio::select! {
            ended = &mut served => return ended.map(|()| 0),
            signal = signals.next() => tracing::info!(signal, "asked to go"),
        }
        go.notify_one();
        tokio::select! {
            ended = &mut served => ended.map(|()| 0),
            signal = signals.next() => {
                tracing::warn!(signal, "asked to go at once");
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
    raise_open_files();
    if let Some(command) = &app {
        match command.port.map_or_else(supervise::free_port, Ok) {
            Ok(port) => settings.upstream = UpstreamAddr::Tcp { host: "localhost".to_owned(), port },
            Err(error) => return cannot("find a free port for the app", &error),
        }
    }
    let bound = match Bound::bind(settings) {
        Ok(bound) => bound,
        Err(code) => return code,
    };
    // The admin listeners, signals and the drain live on this thread; the data plane has its own.
    match tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(8).build() {
        Ok(runtime) => {
            let code = runtime.block_on(bound.run(app));
            // A look-up of a name that hangs must not hold the end.
            runtime.shutdown_background();
            code
        }
        Err(error) => cannot("start", &error),
    }
}

/// Everything is bound: who connects from now on is served as soon as the threads run.
struct Bound {
    settings: Settings,
    listeners: Vec<(TcpListener, Service)>,
    tls: Option<Arc<Termination>>,
    admin: admin::Bound,
}

impl Bound {
    fn bind(settings: Settings) -> Result<Self, u8> {
        if let Some(dir) = &settings.share_dir {
            let written = share::write(dir);
            written.map_err(|error| cannot(&format!("write to {} (--share-dir)", dir.display()), &error))?;
        }
        let tls = settings.tls.clone().map(Termination::new).transpose();
        let tls = tls.map_err(|error| cannot("begin TLS", &error))?.map(Arc::new);
        if settings.upstream_ca.is_some() || matches!(settings.upstream, UpstreamAddr::Tls { .. }) {
            let trust = tls::client::trust(settings.upstream_ca.as_deref());
            trust.map_err(|error| cannot("trust the app by TLS", &error))?;
        }
        let http = settings.listen.iter().map(|addr| (*addr, "--listen", Service::Http));
        let https = settings.tls.iter().flat_map(|tls| &tls.listen);
        let https = https.map(|addr| (*addr, "--tls-listen", Service::Https));
        let tcp = settings.tcp.iter().enumerate();
        let tcp = tcp.map(|(number, route)| (route.listen, "--tcp", Service::Tcp(number)));
        let mut listeners = Vec::new();
        for (addr, flag, service) in http.chain(https).chain(tcp) {
            let bound = listen::bind(addr, settings.reuse_port);
            let bound = bound.map_err(|error| cannot(&format!("listen on {addr} ({flag})"), &error))?;
            listeners.push((bound, service));
        }
        let admin =
            admin::bind(&settings).map_err(|error| cannot("open the probe and control listeners", &error))?;
        Ok(Self { settings, listeners, tls, admin })
    }

    async fn run(self, app: Option<AppCommand>) -> u8 {
        let Self { settings, listeners, tls, admin } = self;
        let mut signals = match Signals::new() {
            Ok(signals) => signals,
            Err(error) => return cannot("take signals over", &error),
        };
        log_addresses(&settings, &listeners, &admin);
        let idle = Arc::new(Notify::new());
        let (wake, switch) = (idle.clone(), Switch::default());
        let plane = Arc::new(Plane::new(settings, tls, move || wake.notify_one()));
        if let Some(tls) = plane.tls.clone() {
            tokio::spawn(tls.watch());
        }
        // The app of `run` is this process's own child: nobody has switched to it.
        if app.is_none()
            && let Some(chosen) = switch::remembered(&plane.settings.control)
        {
            tracing::info!(upstream = %chosen, "a switch before this start outranks --upstream");
            plane.upstream.switch(chosen, &[]);
        }
        look_up(&plane);
        let (control, runner) = control(plane.clone(), switch.clone(), idle.clone());
        tokio::spawn(runner.run());

        let warm = plane.settings.ready.warm_up.is_empty();
        let app_state = Arc::new(AppState { up: AtomicBool::new(false), warm: AtomicBool::new(warm) });
        tokio::spawn(app_state.clone().watch(plane.clone()));
        let upstream = plane.upstream.clone();
        tokio::spawn(stale_socket::keep_away(move || upstream.addr()));
        let closing = Arc::new(Notify::new());
        let (served, close) = (admin_state(&plane, &control, &app_state), closing.clone());
        let admin = tokio::spawn(admin.serve(served, async move { close.notified().await }));

        let closed = move || idle.notify_one();
        let serve = || {
            threads::start(&plane, listeners, switch, closed)
                .map_err(|error| cannot("start a thread", &error))
        };
        let code = match app {
            None => match serve() {
                Ok(()) => {
                    let code = drain_by_signals(&control, &mut signals).await;
                    tokio::select! {
                        () = linger(&plane, linger_most(&plane, &control)) => {}
                        signal = signals.next() => tracing::warn!(signal, "asked to go at once"),
                    }
                    code
                }
                Err(code) => code,
            },
            Some(command) => run_app(&command, &plane, &control, &mut signals, serve).await,
        };
        closing.notify_one();
        let _ = admin.await;
        code
    }
}

/// Keeps every upstream's addresses up to date for as long as the process lives.
fn look_up(plane: &Plane) {
    let ReadySettings { check, timeout, .. } = plane.settings.ready.clone();
    let answers = |check: ReadyCheck| {
        move |addr| {
            let check = check.clone();
            async move { readiness::check_app(&addr, &check, timeout).await }
        }
    };
    tokio::spawn(upstream::keep_up_to_date(plane.upstream.clone(), answers(check)));
    for upstream in &plane.tcp {
        tokio::spawn(upstream::keep_up_to_date(upstream.clone(), answers(ReadyCheck::Connect)));
    }
}

/// Starts the app, serves it, drains, stops it. Returns the process's exit code.
async fn run_app(
    command: &AppCommand,
    plane: &Plane,
    control: &Control,
    signals: &mut Signals,
    serve: impl FnOnce() -> Result<(), u8>,
) -> u8 {
    let UpstreamAddr::Tcp { port, .. } = &plane.settings.upstream else { return FAILED };
    let reserve = plane.settings.drain.reserve;
    let app = match App::start(&command.command, *port).await {
        Ok(app) => app,
        Err(error) => {
            tracing::error!("{error}");
            return error.exit_code();
        }
    };
    tracing::info!(pid = app.pid(), port, "started the app");
    let listens = serve_once_listening(&app, command.start_timeout, plane, control, signals, serve).await;
    if let Err(failed) = listens {
        let most = if failed.is_some() { Duration::ZERO } else { linger_most(plane, control) };
        let ended = end(&app, plane, most, signals).await;
        return failed.unwrap_or(ended);
    }
    tracing::info!(port, "the app listens");
    tokio::select! {
        code = app.exited() => {
            tracing::error!(code, "the app exited by itself");
            let mut drained = std::pin::pin!(control.drain(Trigger::Signal));
            // What waits for the app sees its end by itself, and tells its client so.
            if tokio::time::timeout(AT_ONCE, &mut drained).await.is_err() {
                control.force();
                let _ = tokio::time::timeout(reserve, drained).await;
            }
            end(&app, plane, reserve, signals).await
        }
        _ = drain_by_signals(control, signals) => end(&app, plane, linger_most(plane, control), signals).await,
    }
}

/// Until the app listens, clients wait in the kernel's queue. An error is the exit code, or none for the app's own
/// after a drain.
async fn serve_once_listening(
    app: &App,
    within: Duration,
    plane: &Plane,
    control: &Control,
    signals: &mut Signals,
    serve: impl FnOnce() -> Result<(), u8>,
) -> Result<(), Option<u8>> {
    let mut serve = Some(serve);
    let mut listening = std::pin::pin!(app.wait_listening(within));
    loop {
        tokio::select! {
            listening = &mut listening => {
                listening.map_err(|error| {
                    tracing::error!("{error}");
                    Some(error.exit_code())
                })?;
                return serve.map_or(Ok(()), |serve| serve().map_err(Some));
            }
            signal = signals.next() => {
                tracing::info!(signal, "asked to go before the app listens");
                serve.take().map_or(Ok(()), |serve| serve().map_err(Some))?;
                // Who waits is served if the app listens before the deadline; where nobody does, nothing is waited for.
                plane.set_booting(true);
                let boots = async {
                    if let Err(error) = listening.as_mut().await {
                        tracing::error!("{error}");
                    }
                    plane.set_booting(false);
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    _ = drain_now(control, signals) => {}
                    () = boots => {}
                }
                return Err(None);
            }
            // Only who serves can drain: what waits in the queue gets its answer, and the listeners close.
            () = drain_began(plane), if serve.is_some() => {
                if let Some(serve) = serve.take() {
                    serve().map_err(Some)?;
                }
            }
        }
    }
}

async fn drain_began(plane: &Plane) {
    while plane.phase() == Phase::Serving {
        tokio::time::sleep(ASK_AT_START).await;
    }
}

/// The app's own SIGTERM and the tails of the last answers, side by side: the reserve is for both. Whoever signals
/// once more doesn't want to wait for either.
async fn end(app: &App, plane: &Plane, most: Duration, signals: &mut Signals) -> u8 {
    let reserve = plane.settings.drain.reserve;
    let both = async { tokio::join!(stop(app, reserve), linger(plane, most)).0 };
    tokio::select! {
        code = both => code,
        signal = signals.next() => {
            tracing::warn!(signal, "asked to go at once");
            stop(app, Duration::ZERO).await
        }
    }
}

async fn stop(app: &App, reserve: Duration) -> u8 {
    let began = Instant::now();
    let exit = app.terminate(reserve).await;
    if exit.killed {
        tracing::warn!(
            seconds = began.elapsed().as_secs_f64(),
            "the app outlived its SIGTERM and was killed"
        );
    }
    tracing::info!(code = exit.code, "the app has ended");
    exit.code
}

/// The first signal begins a drain, the second forces its end. Returns once a signal came and the drain is over.
async fn drain_by_signals(control: &Control, signals: &mut Signals) -> u8 {
    let signal = signals.next().await;
    tracing::info!(signal, "asked to go");
    drain_now(control, signals).await
}

/// The same once the first signal has come.
async fn drain_now(control: &Control, signals: &mut Signals) -> u8 {
    let idle = control.status().in_flight == 0;
    let mut drained = std::pin::pin!(control.drain(Trigger::Signal));
    loop {
        tokio::select! {
            outcome = &mut drained => match outcome {
                Outcome::Drained { verdict } => return code(verdict == "clean"),
                // Somebody resumed: the next signal begins anew.
                Outcome::Resumed | Outcome::AppMayStop => {
                    signals.next().await;
                    drained.set(control.drain(Trigger::Signal));
                }
            },
            signal = signals.next() => {
                tracing::warn!(signal, "asked to go at once");
                control.force();
            }
            () = control.exit() => {
                // No verdict in time: what ran at the signal may have been cut by now.
                return match tokio::time::timeout(AT_ONCE, &mut drained).await {
                    Ok(Outcome::Drained { verdict }) => code(verdict == "clean"),
                    _ => code(idle),
                };
            }
        }
    }
}

fn code(clean: bool) -> u8 {
    if clean { 0 } else { CUT }
}

/// What the platform's grace leaves for lingering.
fn linger_most(plane: &Plane, control: &Control) -> Duration {
    let settings = &plane.settings;
    if settings.sidecar == Sidecar::Native {
        return TAILS;
    }
    let left = control.status().deadline_ms.unwrap_or(0).max(0) as u64;
    Duration::from_millis(left) + settings.drain.reserve.saturating_sub(MARGIN)
}

/// Waits for closed connections whose peers still read.
async fn linger(plane: &Plane, most: Duration) {
    let began = Instant::now();
    while plane.lingering.load(Ordering::Acquire) > 0 && began.elapsed() < most {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn admin_state(plane: &Arc<Plane>, control: &Control, app: &Arc<AppState>) -> Admin {
    let ready = {
        let (plane, control, app) = (plane.clone(), control.clone(), app.clone());
        move || {
            let published = control.published();
            readiness::verdict(&Inputs {
                phase: plane.phase(),
                trigger: published.trigger,
                in_pod: cli::in_pod(),
                sidecar: plane.settings.sidecar,
                app_up: app.up.load(Ordering::Relaxed),
                warmed_up: app.warm.load(Ordering::Relaxed),
                drain_readiness: plane.settings.drain.readiness,
                restarting: published.restarting,
            })
        }
    };
    let metrics = {
        let (plane, control, ready) = (plane.clone(), control.clone(), ready.clone());
        move || {
            let published = control.published();
            let now = Now {
                in_flight: plane.gate.in_flight(),
                held: plane.gate.held(),
                connections: plane.gate.connections(),
                phase: plane.phase() as u64,
                ready: ready() == Verdict::Ready,
                drains: published.drains,
                last_drain: published.last.map(|last| last.as_secs_f64()),
                log_dropped: telemetry::dropped(),
            };
            metrics::render(&plane.shards, &now)
        }
    };
    let ledger = plane.clone();
    Admin {
        control: control.clone(),
        ready: Box::new(ready),
        ledger: Box::new(move || ledger.ledger()),
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
        upstream = %settings.upstream,
        tcp = (!tcp.is_empty()).then(|| tcp.join(",")),
        probe = admin.probe_addr().as_ref().map(SocketAddr::to_string),
        control = %Path::display(&settings.control),
        control_tcp = admin.control_addr().as_ref().map(SocketAddr::to_string),
        version = env!("CARGO_PKG_VERSION"),
        "listening"
    );
}

/// Each connection is an open file, and the usual soft limit of 1024 is soon reached.
fn raise_open_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

fn cannot(what: &str, error: &dyn Display) -> u8 {
    tracing::error!("can't {what}: {error}");
    FAILED
}
