//! Log lines for frequent events: at most one per second, with the number of events since the last one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Instant;

/// Minimum interval between two lines, in milliseconds.
const INTERVAL_MS: u64 = 1000;

static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// One kind of log line.
#[derive(Debug, Default)]
pub struct Repeated {
    /// Time of the last line in milliseconds, plus one; 0 for never.
    written: AtomicU64,
    /// Events since the last line.
    times: AtomicU64,
}

impl Repeated {
    /// Starts with no events.
    pub const fn new() -> Self {
        Self { written: AtomicU64::new(0), times: AtomicU64::new(0) }
    }

    /// Counts one event. If a line is due, returns the number of events since the last line, this one included;
    /// otherwise the event is part of the next line's number.
    pub fn due(&self) -> Option<u64> {
        self.due_at(BEGAN.elapsed().as_millis() as u64 + 1)
    }

    fn due_at(&self, now: u64) -> Option<u64> {
        self.times.fetch_add(1, Ordering::Relaxed);
        let written = self.written.load(Ordering::Relaxed);
        if written != 0 && now.saturating_sub(written) < INTERVAL_MS {
            return None;
        }
        let mine = self.written.compare_exchange(written, now, Ordering::Relaxed, Ordering::Relaxed);
        mine.ok().map(|_| self.times.swap(0, Ordering::Relaxed))
    }
}

/// Log lines with the same text and different reasons; each reason is counted separately.
#[derive(Debug, Default)]
pub struct ByReason(Mutex<Vec<(&'static str, Repeated)>>);

impl ByReason {
    /// Starts with no events.
    pub const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// As [`Repeated::due`], for one reason.
    pub fn due(&self, why: &'static str) -> Option<u64> {
        let mut reasons = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = reasons.iter().position(|(known, _)| *known == why).unwrap_or_else(|| {
            reasons.push((why, Repeated::new()));
            reasons.len() - 1
        });
        reasons[at].1.due()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_second_is_due_and_none_is_forgotten() {
        let line = Repeated::new();
        let told: Vec<_> = [1, 2, 1000, 1001, 1500, 9000].map(|now| line.due_at(now)).into();
        assert_eq!(told, [Some(1), None, None, Some(3), None, Some(2)]);
    }

    #[test]
    fn another_reason_is_told_at_once() {
        let lines = ByReason::new();
        assert_eq!(["a", "b", "a"].map(|why| lines.due(why)), [Some(1), Some(1), None]);
    }
}
