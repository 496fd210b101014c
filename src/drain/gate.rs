//! Admission and the in-flight count. The phase and the count share one atomic word, so nothing is admitted after
//! `Drained`: everything admitted has been counted, and the gate closes only when the count is 0.

use std::sync::Arc;

// Imported through `super` so that tests/drain/gate_loom.rs can substitute loom's atomics.
use super::atomic::{AtomicBool, AtomicU64, Ordering};
use super::machine::Phase;

const PHASE_SHIFT: u32 = 56;
const STREAM_SHIFT: u32 = 32;
/// Adds one stream to the word.
const STREAM: u64 = 1 << STREAM_SHIFT;
/// 32 bits for work in flight and 24 for the streams among it: far more than there can be sockets.
const COUNT_MASK: u64 = STREAM - 1;

/// Admits work, counts it, and reports when the last of it has ended.
pub struct Gate {
    /// The phase in the top byte, then the number of streams, then the number in flight.
    word: AtomicU64,
    /// Requests in flight that are held while the app restarts.
    held: AtomicU64,
    /// Health checks in progress. No drain waits for them, so they are not counted in the word.
    health_checks: AtomicU64,
    /// Client connections on which a request can still arrive.
    connections: AtomicU64,
    /// New work waits because the app restarts.
    holding: AtomicBool,
    /// Called when the last running request ends or the last connection closes while a drain or a hold waits for it.
    on_idle: Box<dyn Fn() + Send + Sync>,
}

/// The gate is closed because the drain is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// One request or tunnel in flight, from its first byte to the last byte of its response.
#[must_use = "dropping it ends the work"]
pub struct InFlight<'g>(&'g Gate, CountedAs);

/// An [`InFlight`] that outlives the task that admitted it.
#[must_use = "dropping it ends the work"]
pub struct InFlightOwned(Arc<Gate>, CountedAs);

/// One tunnel in flight. It counts as a stream for its whole life.
#[must_use = "dropping it ends the work"]
pub struct InFlightTunnel(InFlightOwned);

/// Counts work in flight as a stream until the end of its response.
#[must_use = "dropping it ends the stream"]
pub struct Streaming<'g>(&'g Gate);

/// How an [`InFlight`] is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CountedAs {
    Work,
    /// Never a stream.
    HealthCheck,
}

/// One open client connection.
#[must_use = "dropping it means that no more requests can arrive on the connection"]
#[derive(Debug)]
pub struct Connected(Arc<Gate>);

/// One request that waits until the app has restarted.
#[must_use = "dropping it releases the request"]
pub struct Held<'g>(&'g Gate);

impl Gate {
    /// Creates an open gate. `on_idle` must return quickly and must not call back into the gate.
    pub fn new(on_idle: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            word: AtomicU64::new(0),
            held: AtomicU64::new(0),
            health_checks: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            holding: AtomicBool::new(false),
            on_idle: Box::new(on_idle),
        }
    }

    /// Counts one more request or tunnel in flight.
    ///
    /// # Errors
    /// [`Refused`] once the drain is over.
    pub fn admit(&self) -> Result<InFlight<'_>, Refused> {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            if phase_of(word) == Phase::Drained {
                return Err(Refused);
            }
            match self.word.compare_exchange_weak(word, word + 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Ok(InFlight(self, CountedAs::Work)),
                Err(seen) => word = seen,
            }
        }
    }

    /// Counts an open connection.
    pub fn connect(self: &Arc<Self>) -> Connected {
        self.connections.fetch_add(1, Ordering::AcqRel);
        Connected(self.clone())
    }

    /// Counts a request in flight as held; `None` if `max` requests are held already.
    pub fn hold_back(&self, max: u64) -> Option<Held<'_>> {
        if self.held.fetch_add(1, Ordering::AcqRel) >= max {
            self.held.fetch_sub(1, Ordering::AcqRel);
            return None;
        }
        self.tell_if_idle();
        Some(Held(self))
    }

    /// Counts a request in flight as a stream from now on; a hold may keep streams.
    pub fn stream(&self) -> Streaming<'_> {
        self.begin_stream();
        Streaming(self)
    }

    /// The phase that was published last.
    pub fn phase(&self) -> Phase {
        phase_of(self.word.load(Ordering::Acquire))
    }

    /// Number of requests and tunnels in flight, including held ones.
    pub fn in_flight(&self) -> u64 {
        self.word.load(Ordering::Acquire) & COUNT_MASK
    }

    /// Number of requests and tunnels in flight and how many of them are streams, read together.
    pub fn in_flight_and_streams(&self) -> (u64, u64) {
        let word = self.word.load(Ordering::Acquire);
        (word & COUNT_MASK, streams_of(word))
    }

    /// Number of requests in flight that are held.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Acquire)
    }

    /// Number of open client connections on which a request can still arrive.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Acquire)
    }

    /// Whether new work waits because the app is restarting.
    pub fn holding(&self) -> bool {
        self.holding.load(Ordering::Acquire)
    }

    /// Makes new work wait, or lets it proceed. The caller wakes the waiting requests.
    pub fn set_holding(&self, on: bool) {
        self.holding.store(on, Ordering::Release);
    }

    /// Publishes a phase. Use [`Gate::close`] for `Drained`.
    pub fn set_phase(&self, phase: Phase) {
        let mut word = self.word.load(Ordering::Relaxed);
        while let Err(seen) = self.word.compare_exchange_weak(
            word,
            with_phase(word, phase),
            Ordering::AcqRel,
            Ordering::Relaxed,
        ) {
            word = seen;
        }
    }

    /// Closes the gate if nothing is in flight. Returns whether it closed.
    pub fn close(&self) -> bool {
        let mut word = self.word.load(Ordering::Acquire);
        while word & COUNT_MASK == 0 {
            let closed = with_phase(word, Phase::Drained);
            match self.word.compare_exchange_weak(word, closed, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(seen) => word = seen,
            }
        }
        false
    }

    /// Uncounts one piece of work of this kind.
    fn leave(&self, kind: CountedAs) {
        if kind == CountedAs::HealthCheck {
            self.health_checks.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        let left = self.word.fetch_sub(1, Ordering::AcqRel) - 1;
        // Streams may stay during a hold, so they don't count as running here.
        let last = (left & COUNT_MASK).saturating_sub(streams_of(left)) <= self.held.load(Ordering::Acquire);
        if last && (phase_of(left) != Phase::Serving || self.holding()) {
            (self.on_idle)();
        }
    }

    fn begin_stream(&self) {
        self.word.fetch_add(STREAM, Ordering::AcqRel);
        self.tell_if_idle();
    }

    /// Call this before the work leaves the count; otherwise the stream would hide a running request.
    fn end_stream(&self) {
        self.word.fetch_sub(STREAM, Ordering::AcqRel);
    }

    /// Notifies the runner unless the gate is plainly serving, when nothing waits for it.
    fn tell_if_idle(&self) {
        if self.phase() != Phase::Serving || self.holding() {
            (self.on_idle)();
        }
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gate({}, {} in flight)", self.phase().name(), self.in_flight())
    }
}

impl InFlight<'_> {
    /// Recounts the work as a health check: it is no longer in flight, and no drain waits for it. Returns false, and
    /// changes nothing, if `max` health checks are in progress already.
    pub fn become_health_check(&mut self, max: u64) -> bool {
        if self.0.health_checks.fetch_add(1, Ordering::AcqRel) >= max {
            self.0.health_checks.fetch_sub(1, Ordering::AcqRel);
            return false;
        }
        self.0.leave(std::mem::replace(&mut self.1, CountedAs::HealthCheck));
        true
    }

    /// Keeps counting the same work without borrowing. `gate` must be the gate that admitted it.
    pub fn into_owned(self, gate: &Arc<Gate>) -> InFlightOwned {
        debug_assert!(std::ptr::eq(self.0, Arc::as_ptr(gate)), "another gate");
        let kind = self.1;
        std::mem::forget(self);
        InFlightOwned(gate.clone(), kind)
    }

    /// Keeps counting the same work as a tunnel. `gate` must be the gate that admitted it.
    pub fn into_tunnel(self, gate: &Arc<Gate>) -> InFlightTunnel {
        self.into_owned(gate).into_tunnel()
    }
}

impl InFlightOwned {
    /// Keeps counting the same work as a tunnel.
    pub fn into_tunnel(self) -> InFlightTunnel {
        debug_assert!(self.1 == CountedAs::Work, "a health check never asks for a tunnel");
        self.0.begin_stream();
        InFlightTunnel(self)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}

impl Drop for InFlightOwned {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}

impl Drop for InFlightTunnel {
    /// The work itself is uncounted afterwards, when the field is dropped.
    fn drop(&mut self) {
        self.0.0.end_stream();
    }
}

impl Drop for Streaming<'_> {
    fn drop(&mut self) {
        self.0.end_stream();
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        if self.0.connections.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.tell_if_idle();
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::AcqRel);
    }
}

fn phase_of(word: u64) -> Phase {
    Phase::from_u8((word >> PHASE_SHIFT) as u8)
}

fn streams_of(word: u64) -> u64 {
    (word & !(u64::MAX << PHASE_SHIFT)) >> STREAM_SHIFT
}

fn with_phase(word: u64, phase: Phase) -> u64 {
    (word & !(u64::MAX << PHASE_SHIFT)) | ((phase as u64) << PHASE_SHIFT)
}
