//! Leases: work of the app that is no request, such as a message from a queue. A lease counts as in flight until it is
//! given back, or until its time is over, so that an app that dies holds no drain to its deadline.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::clock::now;
use crate::drain::gate::{Gate, InFlightOwned};
use crate::drain::ledger::{LedgerRow, lock};
use crate::drain::machine::Phase;
use crate::metrics::Ended;

/// Limit on the leases that are out.
pub const MAX_LEASES: usize = 10_000;

/// Why there is no lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseRefused {
    /// A drain no longer accepts new work.
    Draining,
    /// [`MAX_LEASES`] are out.
    TooMany,
}

struct LeaseEntry {
    name: String,
    since: Instant,
    until: Instant,
    _work: InFlightOwned,
}

/// All leases that are out.
pub struct Leases {
    gate: Arc<Gate>,
    out: Mutex<BTreeMap<u64, LeaseEntry>>,
    /// The next one's number. It starts anywhere, so that a number from before a restart names no other lease.
    next: AtomicU64,
    /// The earliest end may be another one now.
    changed: Notify,
    ended: [AtomicU64; Ended::ALL.len()],
}

impl Leases {
    /// None is out. They will count at this gate.
    pub fn new(gate: Arc<Gate>) -> Self {
        let next = AtomicU64::new(RandomState::new().hash_one(0));
        Self { gate, out: Mutex::default(), next, changed: Notify::new(), ended: Default::default() }
    }

    /// Takes a lease for this time and returns its number.
    ///
    /// # Errors
    /// It is refused: the caller must not begin the work.
    pub fn take(&self, name: &str, ttl: Duration) -> Result<u64, LeaseRefused> {
        let mut out = lock(&self.out);
        if out.len() >= MAX_LEASES {
            return Err(LeaseRefused::TooMany);
        }
        // Count it before looking at the phase: a drain that begins in between waits for it.
        let work = self.gate.admit().map_err(|_| LeaseRefused::Draining)?.into_owned(&self.gate);
        if self.gate.phase() >= Phase::Draining {
            return Err(LeaseRefused::Draining);
        }
        let (since, number) = (now(), self.next.fetch_add(1, Ordering::Relaxed));
        out.insert(number, LeaseEntry { name: name.to_owned(), since, until: since + ttl, _work: work });
        self.changed.notify_one();
        Ok(number)
    }

    /// Lets a lease end this time from now. Returns false if it is not out any more.
    pub fn renew(&self, number: u64, ttl: Duration) -> bool {
        let mut out = lock(&self.out);
        let Some(lease) = out.get_mut(&number) else { return false };
        lease.until = now() + ttl;
        self.changed.notify_one();
        true
    }

    /// Ends a lease because its work is done. Returns false if it is not out any more.
    pub fn give_back(&self, number: u64) -> bool {
        self.end(number, Ended::Complete).is_some()
    }

    /// Ends all leases, for whose work there is no more time.
    pub fn cut(&self) {
        let all: Vec<u64> = lock(&self.out).keys().copied().collect();
        for lease in all.iter().filter_map(|number| self.end(*number, Ended::Cut)) {
            tracing::warn!(name = lease.name, "a lease was still out at the deadline");
        }
    }

    /// Ends leases whose time is over, for ever.
    pub async fn expire(&self) {
        loop {
            let (time, mut next) = (now(), None);
            let over: Vec<u64> = lock(&self.out)
                .iter()
                .filter_map(|(number, lease)| match lease.until <= time {
                    true => Some(*number),
                    false => {
                        next = Some(next.map_or(lease.until, |next: Instant| next.min(lease.until)));
                        None
                    }
                })
                .collect();
            for lease in over.iter().filter_map(|number| self.end(*number, Ended::TimedOut)) {
                tracing::warn!(name = lease.name, "a lease was neither renewed nor given back in time");
            }
            match next {
                Some(next) => drop(tokio::time::timeout_at(next.into(), self.changed.notified()).await),
                None => self.changed.notified().await,
            }
        }
    }

    /// The number that is out.
    pub fn out(&self) -> usize {
        lock(&self.out).len()
    }

    /// Adds the leases to `rows`.
    pub fn collect(&self, rows: &mut Vec<LedgerRow>) {
        rows.extend(lock(&self.out).values().map(|lease| LedgerRow {
            method: "LEASE".to_owned(),
            path: lease.name.clone(),
            age_ms: now().duration_since(lease.since).as_millis() as u64,
            class: "lease",
            peer: "the app".to_owned(),
        }));
    }

    /// How many have ended so, for each ending.
    pub fn ended(&self) -> [u64; Ended::ALL.len()] {
        self.ended.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    fn end(&self, number: u64, how: Ended) -> Option<LeaseEntry> {
        let mut out = lock(&self.out);
        let lease = out.remove(&number)?;
        // Before the lease leaves the count: the drain's verdict must know of it.
        self.ended[how as usize].fetch_add(1, Ordering::Relaxed);
        Some(lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn leases() -> Leases {
        Leases::new(Arc::new(Gate::new(|| {})))
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_counts_until_it_is_given_back_or_its_time_is_over() {
        let leases = Arc::new(leases());
        let expiring = leases.clone();
        tokio::spawn(async move { expiring.expire().await });
        let (short, long) = (leases.take("a", SECOND).unwrap(), leases.take("b", 9 * SECOND).unwrap());
        let renewed = leases.take("c", SECOND).unwrap();
        assert_eq!((leases.gate.in_flight(), leases.out()), (3, 3));
        tokio::time::sleep(SECOND / 2).await;
        assert!(leases.renew(renewed, 3 * SECOND));
        tokio::time::sleep(SECOND).await;
        assert_eq!(leases.gate.in_flight(), 2);
        assert!(!leases.renew(short, SECOND) && !leases.give_back(short));
        assert!(leases.give_back(long) && !leases.give_back(long));
        assert_eq!(leases.gate.in_flight(), 1);
        tokio::time::sleep(3 * SECOND).await;
        assert_eq!(leases.gate.in_flight(), 0);
        let ended = leases.ended();
        assert_eq!((ended[Ended::Complete as usize], ended[Ended::TimedOut as usize]), (1, 2));
    }

    #[tokio::test]
    async fn a_drain_accepts_none_once_it_refuses_connections_and_cuts_those_that_are_out_at_its_end() {
        let leases = leases();
        leases.gate.set_phase(Phase::LameDuck);
        leases.take("a", SECOND).unwrap();
        leases.gate.set_phase(Phase::Draining);
        assert_eq!(leases.take("b", SECOND), Err(LeaseRefused::Draining));
        assert_eq!(leases.gate.in_flight(), 1, "what was refused does not count");
        leases.cut();
        assert_eq!((leases.gate.in_flight(), leases.ended()[Ended::Cut as usize]), (0, 1));
        assert!(leases.gate.close());
        assert_eq!(leases.take("c", SECOND), Err(LeaseRefused::Draining));
    }

    #[tokio::test]
    async fn their_number_is_bounded() {
        let leases = leases();
        for _ in 0..MAX_LEASES {
            leases.take("a", SECOND).unwrap();
        }
        assert_eq!(leases.take("a", SECOND), Err(LeaseRefused::TooMany));
    }
}
