//! A data plane without sockets, on tokio's clock, for the promises of the drain's runner in paused time.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lameduck::cli::{self, Command};
use lameduck::config::{Settings, UpstreamAddr};
use lameduck::control::data_plane::{DataPlane, Listeners};
use lameduck::control::handle::{Control, DrainOutcome, HoldAnswer};
use lameduck::control::leases::Leases;
use lameduck::control::runner::control;
use lameduck::drain::gate::Gate;
use lameduck::drain::ledger::{LedgerRow, lock};
use lameduck::drain::machine::{Phase, Trigger};
use lameduck::drain::quiet::Arrivals;
use lameduck::metrics::Ended;
use lameduck::upstream::{Backend, Upstream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

/// What a request does when it has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// It is cut at Forcing.
    Plain,
    /// It ends when streams end.
    Stream,
    /// Nothing ends it.
    Stubborn,
}

/// What the drain has asked for.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    closing_idle: bool,
    forced: bool,
    streams_end: Option<Duration>,
    /// Requests are held, each for up to this long.
    held: Option<Duration>,
}

/// The data plane. Requests and connections are tasks, which count themselves with the real gate.
pub struct Plane {
    settings: Settings,
    pub gate: Arc<Gate>,
    leases: Leases,
    upstream: Upstream,
    asked: watch::Sender<Asked>,
    arrived: Mutex<(Arrivals, Option<Instant>)>,
    ended: [AtomicU64; Ended::ALL.len()],
    /// When the ledger was asked for, as for each line of the log that says what a drain waits for.
    asked_ledger: Mutex<Vec<Instant>>,
}

impl Plane {
    /// Starts a request that takes `takes`, on a connection of its own. It returns how it ended; `None` if it was
    /// refused.
    pub fn request(self: &Arc<Self>, work: Work, takes: Duration) -> JoinHandle<Option<Ended>> {
        let in_flight = self.gate.admit().ok().map(|in_flight| in_flight.into_owned(&self.gate));
        let (plane, held) = (self.clone(), self.asked.borrow().held);
        if in_flight.is_some() {
            let (arrived, last) = &mut *lock(&self.arrived);
            arrived.requests += 1;
            arrived.connections += 1;
            *last = Some(now());
        }
        tokio::spawn(async move {
            let _in_flight = in_flight?;
            Some(plane.serve(work, takes, held).await)
        })
    }

    async fn serve(&self, work: Work, takes: Duration, held: Option<Duration>) -> Ended {
        let ended = if self.is_released(held).await {
            let _streaming = (work == Work::Stream).then(|| self.gate.stream());
            tokio::select! {
                biased;
                () = sleep(takes) => Ended::Complete,
                () = self.forced(), if work != Work::Stubborn => Ended::Cut,
                () = self.streams_end(), if work == Work::Stream => Ended::EventsEnded,
            }
        } else {
            Ended::Unsent
        };
        // Before the count falls, as a drain that ends then reads it.
        self.ended[ended as usize].fetch_add(1, Ordering::Relaxed);
        ended
    }

    /// Waits while the request is held. Returns false if that took too long or everything has to end.
    async fn is_released(&self, held: Option<Duration>) -> bool {
        let Some(max) = held else { return true };
        let _held = self.gate.hold_back(u64::MAX);
        let mut asked = self.asked.subscribe();
        let released = asked.wait_for(|asked| asked.held.is_none() || asked.forced);
        timeout(max, released).await.is_ok_and(|asked| asked.is_ok_and(|asked| !asked.forced))
    }

    /// Opens a client's connection, which stays until it has to close.
    pub fn connect(self: &Arc<Self>) -> JoinHandle<()> {
        let (connected, mut asked) = (self.gate.connect(), self.asked.subscribe());
        tokio::spawn(async move {
            let _ = asked.wait_for(|asked| asked.closing_idle || asked.forced).await;
            drop(connected);
        })
    }

    /// Returns how many requests ended like this.
    pub fn count(&self, ended: Ended) -> u64 {
        self.ended[ended as usize].load(Ordering::Relaxed)
    }

    async fn forced(&self) {
        let _ = self.asked.subscribe().wait_for(|asked| asked.forced).await;
    }

    async fn streams_end(&self) {
        let mut asked = self.asked.subscribe();
        let spread = asked.wait_for(|asked| asked.streams_end.is_some()).await.ok();
        let spread = spread.and_then(|asked| asked.streams_end).unwrap_or_default();
        sleep(spread / 2).await;
    }
}

impl DataPlane for Plane {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn gate(&self) -> &Gate {
        &self.gate
    }

    fn leases(&self) -> &Leases {
        &self.leases
    }

    fn upstream(&self) -> &Upstream {
        &self.upstream
    }

    fn app(&self) -> Vec<UpstreamAddr> {
        vec![self.upstream.addr()]
    }

    fn bypassed(&self) -> String {
        String::new()
    }

    fn set_phase(&self, phase: Phase) {
        self.gate.set_phase(phase);
        self.asked.send_modify(|asked| match phase {
            Phase::Serving => *asked = Asked { held: asked.held, ..Asked::default() },
            Phase::Forcing | Phase::Drained => asked.forced = true,
            Phase::LameDuck | Phase::Draining => {}
        });
    }

    fn hold(&self, max: Duration) {
        self.gate.set_holding(true);
        self.asked.send_modify(|asked| asked.held = Some(max));
    }

    fn release(&self) {
        self.gate.set_holding(false);
        self.asked.send_modify(|asked| (asked.held, asked.streams_end) = (None, None));
    }

    fn end_streams(&self, spread: Duration) {
        self.asked.send_modify(|asked| asked.streams_end = Some(spread));
    }

    fn end_streams_of(&self, server: &Backend, spread: Duration) {
        server.end_streams(spread);
    }

    fn close_idle(&self) {
        self.asked.send_modify(|asked| asked.closing_idle = true);
    }

    fn arrivals(&self) -> (Arrivals, Option<Instant>) {
        *lock(&self.arrived)
    }

    fn ended(&self) -> [u64; Ended::ALL.len()] {
        Ended::ALL.map(|way| self.count(way))
    }

    fn ledger(&self) -> Vec<LedgerRow> {
        lock(&self.asked_ledger).push(now());
        Vec::new()
    }
}

/// The listening sockets: opening and closing takes a moment.
#[derive(Clone)]
pub struct Sockets {
    wanted: watch::Sender<bool>,
    open: watch::Sender<bool>,
    takes: Duration,
    changed: Arc<Notify>,
}

impl Sockets {
    fn want(&self, on: bool) {
        self.wanted.send_replace(on);
        let sockets = self.clone();
        tokio::spawn(async move {
            sleep(sockets.takes).await;
            if *sockets.wanted.borrow() == on {
                sockets.open.send_replace(on);
                sockets.changed.notify_one();
            }
        });
    }
}

impl Listeners for Sockets {
    fn close(&self) {
        self.want(false);
    }

    fn listen(&self) {
        self.want(true);
    }

    fn is_listening(&self) -> bool {
        *self.open.borrow()
    }

    fn all_open(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let (mut wanted, mut open) = (self.wanted.subscribe(), self.open.subscribe());
        Box::pin(async move {
            tokio::select! {
                _ = open.wait_for(|open| *open) => {}
                _ = wanted.wait_for(|wanted| !*wanted) => {}
            }
        })
    }
}

/// Settings as `lameduck proxy` reads them from its command line.
pub fn settings(line: &str) -> Settings {
    let line = format!("lameduck proxy --control @none --termination-log /dev/null/none {line}");
    match cli::parse(line.split_whitespace()) {
        Ok(Command::Proxy { settings, .. }) => *settings,
        other => panic!("{other:?}"),
    }
}

/// A drain's runner with its handle, on a simulated data plane.
#[derive(Clone)]
pub struct World {
    pub control: Control,
    pub plane: Arc<Plane>,
    pub sockets: Sockets,
    began: Instant,
}

impl World {
    /// Opening and closing the listeners takes `takes`.
    pub fn new(settings: Settings, takes: Duration) -> Self {
        let idle = Arc::new(Notify::new());
        let wake = idle.clone();
        let gate = Arc::new(Gate::new(move || wake.notify_one()));
        let plane = Arc::new(Plane {
            leases: Leases::new(gate.clone()),
            gate,
            upstream: Upstream::new(settings.upstream.clone(), 1),
            settings,
            asked: watch::Sender::default(),
            arrived: Mutex::default(),
            ended: std::array::from_fn(|_| AtomicU64::new(0)),
            asked_ledger: Mutex::default(),
        });
        let sockets = Sockets {
            wanted: watch::Sender::new(true),
            open: watch::Sender::new(true),
            takes,
            changed: idle.clone(),
        };
        let (control, runner) = control(plane.clone(), sockets.clone(), idle);
        tokio::spawn(runner.run());
        Self { control, plane, sockets, began: now() }
    }

    /// Begins or joins a drain. The caller's task returns its answer, and when that came.
    pub async fn caller(&self, trigger: Trigger) -> JoinHandle<(DrainOutcome, Duration)> {
        let world = self.clone();
        let caller = tokio::spawn(async move { (answer(world.control.drain(trigger)).await, world.time()) });
        tokio::task::yield_now().await;
        caller
    }

    /// Holds requests until nothing runs any more. The caller's task returns its answer, and when that came.
    pub async fn holder(&self, max: Duration, keep_streams: bool) -> JoinHandle<(HoldAnswer, Duration)> {
        let world = self.clone();
        let held = async move { (answer(world.control.hold(max, keep_streams, true)).await, world.time()) };
        let holder = tokio::spawn(held);
        tokio::task::yield_now().await;
        holder
    }

    /// Returns when the ledger was asked for, since the start.
    pub fn ledger_times(&self) -> Vec<Duration> {
        lock(&self.plane.asked_ledger).iter().map(|at| at.duration_since(self.began)).collect()
    }

    /// Returns the simulated time since the start.
    pub fn time(&self) -> Duration {
        now().duration_since(self.began)
    }
}

/// Time in which every answer of a test has to come: without a limit, a missing one would never fail.
const LIMIT: Duration = Duration::from_secs(3600);

async fn answer<T>(asked: impl Future<Output = T>) -> T {
    timeout(LIMIT, asked).await.expect("an answer within an hour")
}

/// Returns the simulated time.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// An app at a unix socket: it keeps its connections until it stops, and answers each request, or never.
pub struct App {
    path: PathBuf,
    answers: bool,
    step: Duration,
    running: Option<JoinHandle<()>>,
    requests: Arc<AtomicU64>,
}

impl App {
    /// A paused clock moves on while everything waits, for sockets too: a timer every `step` keeps its moves small.
    pub fn start(answers: bool, step: Duration) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("lameduck-app-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let mut app = Self { path, answers, step, running: None, requests: Arc::default() };
        app.start_again();
        app
    }

    pub fn address(&self) -> UpstreamAddr {
        UpstreamAddr::Unix(self.path.clone())
    }

    /// Returns the number of requests that it got.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    pub fn start_again(&mut self) {
        let listener = UnixListener::bind(&self.path).expect("a socket");
        let (answers, step, requests) = (self.answers, self.step, self.requests.clone());
        self.running = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let (stream, _) = accepted.expect("a connection");
                        connections.spawn(serve(stream, answers, requests.clone()));
                    }
                    () = sleep(step) => {}
                }
            }
        }));
    }

    /// Closes its listener and its connections.
    pub fn stop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        if let Some(running) = self.running.take() {
            running.abort();
        }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn serve(mut stream: UnixStream, answers: bool, requests: Arc<AtomicU64>) {
    let mut bytes = [0; 1024];
    while stream.read(&mut bytes).await.is_ok_and(|read| read > 0) {
        requests.fetch_add(1, Ordering::Relaxed);
        if answers {
            let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        }
    }
}
