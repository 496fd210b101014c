//! How far apart callers come, from which a drain tells their silence.
//!
//! What counts are the connections, each by its first request: while a balancer hasn't heard of the drain, it goes on
//! choosing this server for new connections, and kept ones have been told to close. The gap between requests would be
//! far too short: under 60 keep-alive clients a proxy of the cluster's that was 9 s late looked silent after one.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How many had arrived up to some moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// Requests, health checks apart.
    pub requests: u64,
    /// Those of them that were their connection's first.
    pub connections: u64,
}

/// What had arrived, second by second, in the last 30 s.
#[derive(Debug)]
pub struct LookBack(VecDeque<(Instant, Arrivals)>);

impl LookBack {
    const SECONDS: usize = 30;

    /// Nothing has arrived yet.
    pub fn new(now: Instant) -> Self {
        Self(VecDeque::from([(now, Arrivals::default())]))
    }

    /// To be called once a second.
    pub fn note(&mut self, now: Instant, arrived: Arrivals) {
        self.0.push_back((now, arrived));
        while self.0.len() > Self::SECONDS {
            self.0.pop_front();
        }
    }

    /// The mean gap between new connections; between requests where there were fewer than two of those, and none
    /// where there were fewer than two requests.
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
