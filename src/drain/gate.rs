//! Admission and the in-flight count. Phase and count share one atomic word, so that nothing is admitted
//! after "drained": whoever is let in has been counted, and whoever closes the gate has seen the count at 0.

use std::sync::Arc;

// By way of `super`, so that tests/drain/gate_loom.rs can put loom's atomics in their place.
use super::atomic::{AtomicBool, AtomicU64, Ordering};
use super::machine::Phase;

const PHASE_SHIFT: u32 = 56;
const STREAM_SHIFT: u32 = 32;
/// One more stream in the word.
const STREAM: u64 = 1 << STREAM_SHIFT;
/// 32 bits for what is in flight and 24 for the streams among it: far more than there can be sockets.
const COUNT: u64 = STREAM - 1;

/// Lets work in, counts it, and says when the last of it has ended.
pub struct Gate {
    /// The phase in the top byte, then how many streams there are, then the number in flight.
    word: AtomicU64,
    /// How many of those in flight are held back while the app restarts.
    held: AtomicU64,
    /// Health checks under way: nobody waits for them, so they are not in the word.
    health_checks: AtomicU64,
    /// Client connections over which a request could still come.
    connections: AtomicU64,
    /// New work waits: the app restarts.
    holding: AtomicBool,
    /// Called when the last running one ended, or the last connection closed, while somebody waits for that.
    on_idle: Box<dyn Fn() + Send + Sync>,
}

/// The gate has closed: the drain is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// One request or tunnel in flight, from its first byte to the last byte of its answer.
#[must_use = "dropping it says that the work has ended"]
pub struct InFlight<'g>(&'g Gate, Kind);

/// An [`InFlight`] that outlives the task that admitted it.
#[must_use = "dropping it says that the work has ended"]
pub struct InFlightOwned(Arc<Gate>, Kind);

/// One tunnel in flight: it is a stream from its beginning to its end.
#[must_use = "dropping it says that the work has ended"]
pub struct InFlightTunnel(InFlightOwned);

/// What is in flight goes on as a stream, until the end of its answer.
#[must_use = "dropping it says that it is no stream any more"]
pub struct Streaming<'g>(&'g Gate);

/// What an [`InFlight`] is counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Work,
    /// Never a stream.
    HealthCheck,
}

/// One open client connection.
#[must_use = "dropping it says that no request can come over the connection any more"]
#[derive(Debug)]
pub struct Connected(Arc<Gate>);

/// One request that waits for the app's restart to be over.
#[must_use = "dropping it says that the request goes on"]
pub struct Held<'g>(&'g Gate);

impl Gate {
    /// An open gate. `on_idle` must be quick and must not call back into the gate.
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

    /// Counts one more in flight, unless the drain is over.
    pub fn admit(&self) -> Result<InFlight<'_>, Refused> {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            if phase_of(word) == Phase::Drained {
                return Err(Refused);
            }
            match self.word.compare_exchange_weak(word, word + 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Ok(InFlight(self, Kind::Work)),
                Err(seen) => word = seen,
            }
        }
    }

    /// Counts an open connection.
    pub fn connect(self: &Arc<Self>) -> Connected {
        self.connections.fetch_add(1, Ordering::AcqRel);
        Connected(self.clone())
    }

    /// Counts one of those in flight as held; none when `most` are held already.
    pub fn hold_back(&self, most: u64) -> Option<Held<'_>> {
        if self.held.fetch_add(1, Ordering::AcqRel) >= most {
            self.held.fetch_sub(1, Ordering::AcqRel);
            return None;
        }
        self.tell_if_idle();
        Some(Held(self))
    }

    /// Says that one of those in flight is a stream from now on, which a hold may let stay.
    pub fn stream(&self) -> Streaming<'_> {
        self.begin_stream();
        Streaming(self)
    }

    /// The phase as last published.
    pub fn phase(&self) -> Phase {
        phase_of(self.word.load(Ordering::Acquire))
    }

    /// Requests and tunnels in flight, held ones included.
    pub fn in_flight(&self) -> u64 {
        self.word.load(Ordering::Acquire) & COUNT
    }

    /// Requests and tunnels in flight, and how many of them are streams, at one moment.
    pub fn in_flight_and_streams(&self) -> (u64, u64) {
        let word = self.word.load(Ordering::Acquire);
        (word & COUNT, streams_of(word))
    }

    /// Those in flight that are held back.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Acquire)
    }

    /// Open client connections over which a request could still come.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Acquire)
    }

    /// Whether new work waits because the app restarts.
    pub fn holding(&self) -> bool {
        self.holding.load(Ordering::Acquire)
    }

    /// Makes new work wait, or lets it go on; the caller wakes those who wait.
    pub fn set_holding(&self, on: bool) {
        self.holding.store(on, Ordering::Release);
    }

    /// Publishes a phase. `Drained` goes by [`Gate::close`].
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

    /// Closes the gate if nothing is in flight; says whether it did.
    pub fn close(&self) -> bool {
        let mut word = self.word.load(Ordering::Acquire);
        while word & COUNT == 0 {
            let closed = with_phase(word, Phase::Drained);
            match self.word.compare_exchange_weak(word, closed, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(seen) => word = seen,
            }
        }
        false
    }

    /// One less of this kind.
    fn leave(&self, kind: Kind) {
        if kind == Kind::HealthCheck {
            self.health_checks.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        let left = self.word.fetch_sub(1, Ordering::AcqRel) - 1;
        // Streams may stay in a hold.
        let last = (left & COUNT).saturating_sub(streams_of(left)) <= self.held.load(Ordering::Acquire);
        if last && (phase_of(left) != Phase::Serving || self.holding()) {
            (self.on_idle)();
        }
    }

    fn begin_stream(&self) {
        self.word.fetch_add(STREAM, Ordering::AcqRel);
        self.tell_if_idle();
    }

    /// Comes before it leaves: else it would stand in for a request that runs.
    fn end_stream(&self) {
        self.word.fetch_sub(STREAM, Ordering::AcqRel);
    }

    /// Tells the drain when somebody may be waiting for this: always outside of plain serving.
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
    /// It has turned out to be a health check: from here on it isn't in flight, and no drain waits for it. False when
    /// `most` of these are under way already; then it stays what it was.
    pub fn become_health_check(&mut self, most: u64) -> bool {
        if self.0.health_checks.fetch_add(1, Ordering::AcqRel) >= most {
            self.0.health_checks.fetch_sub(1, Ordering::AcqRel);
            return false;
        }
        self.0.leave(std::mem::replace(&mut self.1, Kind::HealthCheck));
        true
    }

    /// Goes on counting the same work. `gate` is the one that admitted it.
    pub fn into_owned(self, gate: &Arc<Gate>) -> InFlightOwned {
        debug_assert!(std::ptr::eq(self.0, Arc::as_ptr(gate)), "another gate");
        let kind = self.1;
        std::mem::forget(self);
        InFlightOwned(gate.clone(), kind)
    }

    /// Goes on counting the same work as a tunnel's. `gate` is the one that admitted it.
    pub fn into_tunnel(self, gate: &Arc<Gate>) -> InFlightTunnel {
        self.into_owned(gate).into_tunnel()
    }
}

impl InFlightOwned {
    /// Goes on counting the same work as a tunnel's.
    pub fn into_tunnel(self) -> InFlightTunnel {
        debug_assert!(self.1 == Kind::Work, "no health check asks for a tunnel");
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
    /// Then it leaves, as its field is dropped.
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
