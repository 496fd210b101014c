//! What one thread of the data plane has for itself.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::http1::head::Request;
use super::parking::Parking;
use super::shared::Shared;
use crate::drain::gate::InFlight;
use crate::drain::ledger::Ledger;
use crate::metrics::{Shard, add};
use crate::upstream::{Pool, Upstream};

/// Health checks at once that nobody waits for, and no more than may be in flight. Those past it are requests like any
/// other: what a client says of itself opens no more doors than that.
const HEALTH_CHECKS: u64 = 64;

/// One thread's own.
pub struct Worker {
    /// What all threads share.
    pub shared: Arc<Shared>,
    /// This thread's connections.
    pub ledger: Arc<Ledger>,
    /// This thread's counters.
    pub shard: Arc<Shard>,
    /// Client connections that rest.
    pub parking: Parking,
    /// Connections to the app that rest.
    pub pool: Pool,
    /// Ways to the upstream of each `--tcp`; nothing rests in them.
    pub tcp: Vec<Pool>,
}

impl Worker {
    /// The thread with this number.
    ///
    /// # Errors
    /// When the kernel has no epoll set for its parked connections.
    pub fn new(shared: Arc<Shared>, number: usize) -> io::Result<Self> {
        let (ledger, shard) = (shared.ledgers[number].clone(), shared.shards[number].clone());
        let parking = Parking::new(shared.parkings[number].clone())?;
        let pool = Pool::new(shared.upstream.clone(), number, shared.settings.limits.max_head);
        let tcp =
            |upstream: &Arc<Upstream>| Pool::new(upstream.clone(), number, shared.settings.limits.max_head);
        let tcp = shared.tcp.iter().map(tcp).collect();
        Ok(Self { shared, ledger, shard, parking, pool, tcp })
    }

    /// A request's head has been read; `first` of its connection. A health check is neither work nor an arrival; one too
    /// many at once is a request like any other.
    pub fn take_in(&self, request: &mut Request, in_flight: &mut InFlight<'_>, now: Instant, first: bool) {
        if request.health_check {
            let most = self.shared.settings.limits.max_in_flight;
            let most = if most == 0 { HEALTH_CHECKS } else { most.min(HEALTH_CHECKS) };
            request.health_check = in_flight.become_health_check(most);
        }
        if !request.health_check {
            self.arrival(now, first);
        }
    }

    /// A request has arrived, for the quiet rule; `first` of its connection.
    pub fn arrival(&self, now: Instant, first: bool) {
        add(&self.shard.arrivals, 1);
        if first {
            add(&self.shard.newcomers, 1);
        }
        let us = now.duration_since(self.shared.began).as_micros() as u64;
        self.shard.last_arrival_us.store(us.max(1), Ordering::Relaxed);
    }

    /// Whether a tunnel over which something moved last at this time, in milliseconds of the ledger's clock, has been
    /// quiet for `--tunnel-timeout`.
    pub fn too_quiet(&self, moved_at: u64) -> bool {
        let most = self.shared.settings.limits.tunnel_timeout;
        !most.is_zero() && self.ledger.now_ms().saturating_sub(moved_at) >= most.as_millis() as u64
    }

    /// A deadline for a ledger entry, so long from now.
    pub fn deadline(&self, after: Duration) -> u64 {
        self.ledger.now_ms() + after.as_millis() as u64
    }
}
