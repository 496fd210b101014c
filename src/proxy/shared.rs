//! The state that the data plane's threads share.

use std::future::poll_fn;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use super::captured::CapturedPorts;
use super::hold_queue::HoldQueue;
use super::http1::head::Sender;
use super::stream::Channel;
use crate::config::{Settings, UpstreamAddr};
use crate::control::data_plane::DataPlane;
use crate::control::leases::Leases;
use crate::descriptors::most_of_one_side;
use crate::drain::gate::Gate;
use crate::drain::ledger::{Ledger, LedgerRow};
use crate::drain::machine::Phase;
use crate::drain::quiet::Arrivals;
use crate::metrics::{self, Ended, Shard};
use crate::tls::server::Termination;
use crate::upstream::{self, Backend, Upstream};
use tokio::sync::Notify;

/// A drain waits this long, from a connection's accept, for its first request.
pub const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// The state shared by all threads; only the drain changes it, in a few atomics.
pub struct Shared {
    /// The validated settings.
    pub settings: Settings,
    /// Admission and counts.
    pub gate: Arc<Gate>,
    /// Counts connections to captured ports by loopback: they come from this pod, and no drain waits for them.
    pub local: Arc<Gate>,
    /// Work of the app that is no request.
    pub leases: Arc<Leases>,
    /// The app's upstream.
    pub upstream: Arc<Upstream>,
    /// The ports that capture has found.
    pub captured: Arc<CapturedPorts>,
    /// The upstream of each `--tcp`.
    pub tcp: Vec<Arc<Upstream>>,
    /// TLS termination, for listeners with TLS.
    pub tls: Option<Arc<Termination>>,
    /// Held requests.
    pub hold_queue: HoldQueue,
    /// One ledger per thread.
    pub ledgers: Vec<Arc<Ledger>>,
    /// One shard of counters per thread.
    pub shards: Vec<Arc<Shard>>,
    /// Wakes the parked connections of each thread.
    pub parkings: Vec<Arc<Notify>>,
    /// Closed connections that still wait for their peer to close.
    pub lingering: AtomicU64,
    /// When the process started: the epoch of the arrival clock.
    pub began: Instant,
    /// The app of `lameduck run` has not listened yet, and the process has to stop.
    booting: AtomicBool,
    /// Idle connections have to close: nothing runs and no new work can arrive.
    closing_idle: AtomicBool,
    /// The time within which long-lived streams end, in milliseconds; `u64::MAX` while they need not.
    stream_spread_ms: AtomicU64,
    /// When they began to, in milliseconds since `began`.
    streams_end_since_ms: AtomicU64,
    /// Maximum hold time of a request, in milliseconds.
    hold_most_ms: AtomicU64,
}

const NO_STREAM_END: u64 = u64::MAX;
/// Divisor of the idle timeout while the number of connections is at its limit.
pub const CROWDED_DIVISOR: u32 = 60;

impl Shared {
    /// The state for `settings.threads` threads. `on_idle` is passed to the gate.
    pub fn new(
        settings: Settings,
        tls: Option<Arc<Termination>>,
        on_idle: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let threads = settings.threads.max(1);
        let gate = Arc::new(Gate::new(on_idle));
        Self {
            upstream: Arc::new(Upstream::new(settings.upstream.clone(), threads)),
            captured: Arc::default(),
            tcp: settings
                .tcp
                .iter()
                .map(|route| Arc::new(Upstream::new(route.upstream.clone(), threads)))
                .collect(),
            tls,
            hold_queue: HoldQueue::default(),
            settings,
            leases: Arc::new(Leases::new(gate.clone())),
            gate,
            local: Arc::new(Gate::new(|| {})),
            ledgers: (0..threads).map(|_| Arc::default()).collect(),
            shards: (0..threads).map(|_| Arc::default()).collect(),
            parkings: (0..threads).map(|_| Arc::default()).collect(),
            lingering: AtomicU64::new(0),
            began: Instant::now(),
            booting: AtomicBool::new(false),
            closing_idle: AtomicBool::new(false),
            stream_spread_ms: AtomicU64::new(NO_STREAM_END),
            streams_end_since_ms: AtomicU64::new(0),
            hold_most_ms: AtomicU64::new(0),
        }
    }

    /// Returns the phase; each user decides what it means for a connection.
    pub fn phase(&self) -> Phase {
        self.gate.phase()
    }

    /// Whether clients may have certificates, so that only the proxy may vouch for them.
    pub fn asks_for_certificates(&self) -> bool {
        self.settings.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some())
    }

    /// Whether everything has to end now.
    pub fn forced(&self) -> bool {
        self.phase() >= Phase::Forcing
    }

    /// Sets whether to wait for an app that has never listened although the process has to stop.
    pub fn set_booting(&self, booting: bool) {
        self.booting.store(booting, Ordering::Release);
    }

    /// Whether to wait for an app that has never listened.
    pub fn booting(&self) -> bool {
        self.booting.load(Ordering::Acquire)
    }

    /// Returns what the app is told about a client at `peer`, the `Host` of a request without one, and whether the app
    /// is asked to keep the connection.
    pub fn sender<'a>(
        &'a self,
        peer: &'a str,
        channel: &'a Channel,
        host: &'a str,
        ask_keep_alive: bool,
    ) -> Sender<'a> {
        Sender {
            peer,
            forwarded: self.settings.forwarded,
            https: channel.https,
            subject: channel.subject.as_deref(),
            hide_subject: self.asks_for_certificates(),
            health_checks: &self.settings.health_checks,
            app: host,
            ask_keep_alive,
        }
    }

    /// Returns the maximum time that a request is held.
    pub fn hold_most(&self) -> Duration {
        Duration::from_millis(self.hold_most_ms.load(Ordering::Acquire))
    }

    /// Whether idle connections have to close.
    pub fn closing_idle(&self) -> bool {
        self.closing_idle.load(Ordering::Acquire) || self.forced()
    }

    /// Returns the time within which a stream from this server has to end, if it has to end at all.
    fn streams_end(&self, from: &Backend) -> Option<Duration> {
        let ms = self.stream_spread_ms.load(Ordering::Acquire);
        (ms != NO_STREAM_END).then(|| Duration::from_millis(ms)).or_else(|| from.streams_end())
    }

    /// Whether streams have to end, whichever server they come from.
    pub fn ends_all_streams(&self) -> bool {
        self.stream_spread_ms.load(Ordering::Acquire) != NO_STREAM_END
    }

    /// Whether streams from this server have to end.
    pub fn ends_streams(&self, from: &Backend) -> bool {
        self.streams_end(from).is_some()
    }

    /// Whether a stream from this server has to end whose `share` of the spread, in parts of 255, is over.
    pub fn ends_share(&self, from: &Backend, share: u8) -> bool {
        let since = Duration::from_millis(self.streams_end_since_ms.load(Ordering::Acquire));
        let passed = self.began.elapsed().saturating_sub(since);
        self.streams_end(from).is_some_and(|spread| passed >= spread * u32::from(share) / u32::from(u8::MAX))
    }

    /// Returns when a stream from this server has to end: at a random time within the spread set by the drain, which may
    /// become shorter meanwhile.
    pub async fn stream_end(&self, from: &Backend) {
        let share = RandomState::new().hash_one(0) as f64 / u64::MAX as f64;
        let mut end: Option<Instant> = None;
        loop {
            let spread = poll_fn(|_| self.streams_end(from).map_or(Poll::Pending, Poll::Ready)).await;
            let at = Instant::now() + spread.mul_f64(share);
            let at = end.map_or(at, |end| end.min(at));
            let shorter = poll_fn(|_| match self.streams_end(from) {
                Some(now) if now < spread => Poll::Ready(()),
                _ => Poll::Pending,
            });
            tokio::select! {
                () = tokio::time::sleep_until(at.into()) => end = None,
                () = shorter => {
                    end = Some(at);
                    continue;
                }
            }
            // Not if the drain was cancelled meanwhile.
            if self.streams_end(from).is_some() {
                return;
            }
        }
    }

    /// Whether more requests are in flight than allowed. The caller has already been counted.
    pub fn past_in_flight(&self) -> bool {
        let max = self.settings.limits.max_in_flight;
        max != 0 && self.gate.in_flight() > max
    }

    /// Whether client connections have reached their limit. Lingering ones count too: each is an open file.
    pub fn is_full(&self) -> bool {
        let (open, limits) = (self.open_clients(), &self.settings.limits);
        // A request in flight has an upstream connection of its own, or waits for one, unless it shares one.
        let wanted = self.gate.in_flight().saturating_sub(upstream::sharing_streams());
        let app = upstream::open_connections().max(wanted);
        open >= limits.max_connections || open + app >= limits.max_files
    }

    /// Gives upstream connections the open files that client connections leave.
    pub fn share_files(&self) {
        let files = self.settings.limits.max_files;
        upstream::set_max_connections(files.saturating_sub(self.open_clients()).min(most_of_one_side(files)));
    }

    fn open_clients(&self) -> u64 {
        self.gate.connections() + self.local.connections() + self.lingering.load(Ordering::Relaxed)
    }

    /// Returns how long a connection may be idle now: much shorter while others wait for its place.
    pub fn idle_timeout(&self) -> Duration {
        let max = self.settings.limits.idle_timeout;
        if self.is_full() { max / CROWDED_DIVISOR } else { max }
    }

    fn wake_all(&self) {
        self.ledgers.iter().for_each(|ledger| ledger.wake_all());
        self.parkings.iter().for_each(|parking| parking.notify_one());
    }
}

impl DataPlane for Shared {
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
        let first = self.upstream.addr();
        if !self.settings.capture.capture {
            return vec![first];
        }
        let mut ports: Vec<_> = self.captured.all().iter().map(|port| port.app()).collect();
        ports.sort_by_key(|port| *port != first);
        ports
    }

    fn bypassed(&self) -> String {
        self.captured.bypassed_lines()
    }

    fn set_phase(&self, phase: Phase) {
        if phase == Phase::Serving {
            self.closing_idle.store(false, Ordering::Release);
            self.stream_spread_ms.store(NO_STREAM_END, Ordering::Release);
        }
        self.gate.set_phase(phase);
        if phase >= Phase::Forcing {
            self.leases.cut();
        }
        self.wake_all();
    }

    fn hold(&self, max: Duration) {
        self.hold_most_ms.store(max.as_millis() as u64, Ordering::Release);
        self.hold_queue.hold(&self.gate, true);
    }

    fn release(&self) {
        self.stream_spread_ms.store(NO_STREAM_END, Ordering::Release);
        self.hold_queue.hold(&self.gate, false);
    }

    fn end_streams(&self, spread: Duration) {
        // A sooner deadline shortens a spread that has begun.
        if !self.ends_all_streams() {
            self.streams_end_since_ms.store(self.began.elapsed().as_millis() as u64, Ordering::Release);
        }
        self.stream_spread_ms.store(spread.as_millis() as u64, Ordering::Release);
        self.wake_all();
    }

    fn end_streams_of(&self, server: &Backend, spread: Duration) {
        server.end_streams(spread);
        self.wake_all();
    }

    fn close_idle(&self) {
        self.closing_idle.store(true, Ordering::Release);
        self.wake_all();
    }

    fn arrivals(&self) -> (Arrivals, Option<Instant>) {
        let sum = |count: fn(&Shard) -> &AtomicU64| {
            self.shards.iter().map(|shard| count(shard).load(Ordering::Relaxed)).sum()
        };
        let arrived =
            Arrivals { requests: sum(|shard| &shard.arrivals), connections: sum(|shard| &shard.newcomers) };
        let last = self.shards.iter().map(|shard| shard.last_arrival_us.load(Ordering::Relaxed)).max();
        (arrived, last.filter(|us| *us > 0).map(|us| self.began + Duration::from_micros(us)))
    }

    fn ended(&self) -> [u64; Ended::ALL.len()] {
        let (mut ended, leases) = (metrics::ended(&self.shards), self.leases.ended());
        ended.iter_mut().zip(leases).for_each(|(ended, leases)| *ended += leases);
        ended
    }

    fn ledger(&self) -> Vec<LedgerRow> {
        let mut rows = Vec::new();
        self.ledgers.iter().for_each(|ledger| ledger.collect(&mut rows));
        self.leases.collect(&mut rows);
        rows.sort_by_key(|row| std::cmp::Reverse(row.age_ms));
        rows
    }
}
