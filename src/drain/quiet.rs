//! The mean gap between callers, from which a drain infers that they have gone quiet.
//!
//! The gap is measured between connections, each counted at its first request: a load balancer that does not know of
//! the drain yet keeps choosing this server for new connections, while existing ones have been asked to close. The gap
//! between requests would be far too short: with 60 keep-alive clients, a cluster proxy that was 9 s late looked silent
//! after 1 s.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Totals of what has arrived up to some moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// Requests, without health checks.
    pub requests: u64,
    /// Requests that were the first on their connection.
    pub connections: u64,
}

/// Arrival totals of the last 30 s, one per second.
#[derive(Debug)]
pub struct LookBack(VecDeque<(Instant, Arrivals)>);

impl LookBack {
    const MAX_SECONDS: usize = 30;

    /// Starts with no arrivals.
    pub fn new(now: Instant) -> Self {
        Self(VecDeque::from([(now, Arrivals::default())]))
    }

    /// Records the totals; call it once a second.
    pub fn note(&mut self, now: Instant, arrived: Arrivals) {
        self.0.push_back((now, arrived));
        while self.0.len() > Self::MAX_SECONDS {
            self.0.pop_front();
        }
    }

    /// The mean gap between new connections. With fewer than two connections it is the gap between requests; with fewer
    /// than two requests it is `None`.
    pub fn mean_gap(&self, now: Instant, arrived: Arrivals) -> Option<Duration> {
        let (since, before) = self.0.front().copied().unwrap_or((now, arrived));
        let recent = |now: u64, before: u64| Some(now.saturating_sub(before)).filter(|recent| *recent > 1);
        let recent = recent(arrived.connections, before.connections)
            .or_else(|| recent(arrived.requests, before.requests))?;
        now.duration_since(since).checked_div(recent.try_into().unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_is_that_between_connections_where_there_are_any() {
        let began = Instant::now();
        let look_back = LookBack::new(began);
        let gap = |requests, connections| {
            look_back.mean_gap(began + Duration::from_secs(12), Arrivals { requests, connections })
        };
        assert_eq!(gap(1200, 4), Some(Duration::from_secs(3)), "kept connections are busy");
        assert_eq!(gap(1200, 1), Some(Duration::from_millis(10)), "one has no gap to another");
        assert_eq!(gap(1, 1), None);
    }

    #[test]
    fn what_is_older_than_thirty_seconds_is_forgotten() {
        let began = Instant::now();
        let at = |second| began + Duration::from_secs(second);
        let mut look_back = LookBack::new(began);
        let crowd = Arrivals { requests: 5000, connections: 5000 };
        (1..=31).for_each(|second| look_back.note(at(second), crowd));
        assert_eq!(look_back.mean_gap(at(32), crowd), None);
        let two_more = Arrivals { requests: 5002, connections: 5002 };
        assert_eq!(look_back.mean_gap(at(32), two_more), Some(Duration::from_secs(15)));
    }
}
