//! What the threads of the data plane share.

use std::future::poll_fn;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use super::hold_queue::HoldQueue;
use super::http1::head::Sender;
use super::stream::Channel;
use crate::config::Settings;
use crate::descriptors::most_of_one_side;
use crate::drain::gate::Gate;
use crate::drain::ledger::{Ledger, LedgerRow};
use crate::drain::machine::Phase;
use crate::drain::quiet::Arrivals;
use crate::metrics::Shard;
use crate::tls::server::Termination;
use crate::upstream::{self, Backend, Upstream};
use tokio::sync::Notify;

/// Time from a connection's accept in which its first request is on its way: a drain waits this long for it.
pub const FIRST_REQUEST: Duration = Duration::from_secs(1);

/// Shared by all threads; what changes in it is a few words that the drain writes.
pub struct Shared {
    /// As validated.
    pub settings: Settings,
    /// Admission and counts.
    pub gate: Arc<Gate>,
    /// Where the app is.
    pub upstream: Arc<Upstream>,
    /// The `Host` of a request that has none: `--upstream`, as our own questions to the app say it.
    app_host: String,
    /// Where the connections of each `--tcp` go.
    pub tcp: Vec<Arc<Upstream>>,
    /// What clients find at the listeners with TLS.
    pub tls: Option<Arc<Termination>>,
    /// Requests that are held.
    pub hold_queue: HoldQueue,
    /// One ledger a thread.
    pub ledgers: Vec<Arc<Ledger>>,
    /// One shard of counters a thread.
    pub shards: Vec<Arc<Shard>>,
    /// Wakes the parked connections of a thread.
    pub parkings: Vec<Arc<Notify>>,
    /// Closed connections that still wait for their peer's end.
    pub lingering: AtomicU64,
    /// When the process began: the clock of arrivals.
    pub began: Instant,
    /// The app of `lameduck run` has yet to listen, and the process is to go.
    booting: AtomicBool,
    /// Idle connections close: nothing runs and nobody can come in.
    closing_idle: AtomicBool,
    /// Long-lived streams end, each within so many milliseconds; `u64::MAX` while they need not.
    stream_spread_ms: AtomicU64,
    /// How long a request is held at most.
    hold_most_ms: AtomicU64,
}

const STREAMS_STAY: u64 = u64::MAX;
/// While as many connections are open as may be, an idle one is closed after this part of its time.
pub const CROWDED: u32 = 60;

impl Shared {
    /// The state of `settings.threads` threads. `on_idle` is the gate's.
    pub fn new(
        settings: Settings,
        tls: Option<Arc<Termination>>,
        on_idle: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let threads = settings.threads.max(1);
        Self {
            upstream: Arc::new(Upstream::new(settings.upstream.clone(), threads)),
            app_host: settings.upstream.http_host(),
            tcp: settings
                .tcp
                .iter()
                .map(|route| Arc::new(Upstream::new(route.upstream.clone(), threads)))
                .collect(),
            tls,
            hold_queue: HoldQueue::default(),
            settings,
            gate: Arc::new(Gate::new(on_idle)),
            ledgers: (0..threads).map(|_| Arc::default()).collect(),
            shards: (0..threads).map(|_| Arc::default()).collect(),
            parkings: (0..threads).map(|_| Arc::default()).collect(),
            lingering: AtomicU64::new(0),
            began: Instant::now(),
            booting: AtomicBool::new(false),
            closing_idle: AtomicBool::new(false),
            stream_spread_ms: AtomicU64::new(STREAMS_STAY),
            hold_most_ms: AtomicU64::new(0),
        }
    }

    /// The phase; what it means for a connection is looked up where it matters.
    pub fn phase(&self) -> Phase {
        self.gate.phase()
    }

    /// Whether clients may have certificates, which only we may say.
    pub fn asks_for_certificates(&self) -> bool {
        self.settings.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some())
    }

    /// Everything ends now.
    pub fn forced(&self) -> bool {
        self.phase() >= Phase::Forcing
    }

    /// Says whether an app that has never listened is waited for though the process is to go.
    pub fn set_booting(&self, booting: bool) {
        self.booting.store(booting, Ordering::Release);
    }

    /// Whether it is waited for.
    pub fn booting(&self) -> bool {
        self.booting.load(Ordering::Acquire)
    }

    /// What the app is told of a client whose address is `peer`, and whether it is asked to keep the connection.
    pub fn sender<'a>(&'a self, peer: &'a str, channel: &'a Channel, ask_keep_alive: bool) -> Sender<'a> {
        Sender {
            peer,
            forwarded: self.settings.forwarded,
            https: channel.https,
            subject: channel.subject.as_deref(),
            hide_subject: self.asks_for_certificates(),
            health_checks: &self.settings.health_checks,
            app: &self.app_host,
            ask_keep_alive,
        }
    }

    /// Publishes a phase to every connection. A new round forgets what the last one told them.
    pub fn set_phase(&self, phase: Phase) {
        if phase == Phase::Serving {
            self.closing_idle.store(false, Ordering::Release);
            self.stream_spread_ms.store(STREAMS_STAY, Ordering::Release);
        }
        self.gate.set_phase(phase);
        self.wake_all();
    }

    /// Lets new requests wait, each no longer than `most`.
    pub fn hold(&self, most: Duration) {
        self.hold_most_ms.store(most.as_millis() as u64, Ordering::Release);
        self.hold_queue.hold(&self.gate, true);
    }

    /// Lets the held requests go, one after the other. Streams need not end any more.
    pub fn release(&self) {
        self.stream_spread_ms.store(STREAMS_STAY, Ordering::Release);
        self.hold_queue.hold(&self.gate, false);
    }

    /// How long a request is held at most.
    pub fn hold_most(&self) -> Duration {
        Duration::from_millis(self.hold_most_ms.load(Ordering::Acquire))
    }

    /// Idle connections close.
    pub fn close_idle(&self) {
        self.closing_idle.store(true, Ordering::Release);
        self.wake_all();
    }

    /// Whether an idle connection is to close.
    pub fn closing_idle(&self) -> bool {
        self.closing_idle.load(Ordering::Acquire) || self.forced()
    }

    /// WebSockets, event streams and waiting long polls end, each at random within `spread`.
    pub fn end_streams(&self, spread: Duration) {
        self.stream_spread_ms.store(spread.as_millis() as u64, Ordering::Release);
        self.wake_all();
    }

    /// Within what time a stream from this server is to end, once it is to end at all.
    fn streams_end(&self, from: &Backend) -> Option<Duration> {
        let ms = self.stream_spread_ms.load(Ordering::Acquire);
        (ms != STREAMS_STAY).then(|| Duration::from_millis(ms)).or_else(|| from.streams_end())
    }

    /// Whether a tunnel to this server has to act: a WebSocket on the end of streams, any other only when all is cut.
    pub fn ends_tunnel(&self, websocket: bool, to: &Backend) -> bool {
        self.forced() || (websocket && self.streams_end(to).is_some())
    }

    /// The streams of a server that was left end, each at random within `spread`.
    pub fn end_streams_of(&self, server: &Backend, spread: Duration) {
        server.end_streams(spread);
        self.wake_all();
    }

    /// Returns when a stream from this server is to end: at random within the spread that the drain gives.
    pub async fn stream_end(&self, from: &Backend) {
        let share = RandomState::new().hash_one(0) as f64 / u64::MAX as f64;
        loop {
            let spread = poll_fn(|_| self.streams_end(from).map_or(Poll::Pending, Poll::Ready)).await;
            tokio::time::sleep(spread.mul_f64(share)).await;
            // Not if somebody resumed meanwhile.
            if self.streams_end(from).is_some() {
                return;
            }
        }
    }

    /// Whether more is in flight than may be. Who asks has been counted.
    pub fn past_in_flight(&self) -> bool {
        let most = self.settings.limits.max_in_flight;
        most != 0 && self.gate.in_flight() > most
    }

    /// Whether as many client connections are open as may be. Those that linger count too: each is an open file.
    pub fn is_full(&self) -> bool {
        let (open, limits) = (self.open_clients(), &self.settings.limits);
        let app = upstream::open_connections().max(self.gate.in_flight());
        open >= limits.max_connections || open + app >= limits.max_files
    }

    /// Leaves to connections to the app what clients' leave of the open files.
    pub fn share_files(&self) {
        let files = self.settings.limits.max_files;
        upstream::set_most(files.saturating_sub(self.open_clients()).min(most_of_one_side(files)));
    }

    fn open_clients(&self) -> u64 {
        self.gate.connections() + self.lingering.load(Ordering::Relaxed)
    }

    /// How long a connection may be idle now: far less while others wait for its place.
    pub fn idle_timeout(&self) -> Duration {
        let most = self.settings.limits.idle_timeout;
        if self.is_full() { most / CROWDED } else { most }
    }

    /// What runs, oldest first.
    pub fn ledger(&self) -> Vec<LedgerRow> {
        let mut rows = Vec::new();
        self.ledgers.iter().for_each(|ledger| ledger.collect(&mut rows));
        rows.sort_by_key(|row| std::cmp::Reverse(row.age_ms));
        rows
    }

    /// What arrived so far, and when the last did.
    pub fn arrivals(&self) -> (Arrivals, Option<Instant>) {
        let sum = |count: fn(&Shard) -> &AtomicU64| {
            self.shards.iter().map(|shard| count(shard).load(Ordering::Relaxed)).sum()
        };
        let arrived =
            Arrivals { requests: sum(|shard| &shard.arrivals), connections: sum(|shard| &shard.newcomers) };
        let last = self.shards.iter().map(|shard| shard.last_arrival_us.load(Ordering::Relaxed)).max();
        (arrived, last.filter(|us| *us > 0).map(|us| self.began + Duration::from_micros(us)))
    }

    fn wake_all(&self) {
        self.ledgers.iter().for_each(|ledger| ledger.wake_all());
        self.parkings.iter().for_each(|parking| parking.notify_one());
    }
}
