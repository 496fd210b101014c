//! The webhook's metrics. Counting is a plain add; names and text are made on a scrape.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::review::ReviewOutcome;
use crate::metrics::{counters, gauge, histogram, text};

/// Upper bounds of the duration histogram, in milliseconds.
const BOUNDS_MS: [u64; 9] = [1, 2, 5, 10, 25, 100, 500, 1_000, 10_000];
const OUTCOMES: [&str; 4] = ["injected", "unchanged", "skipped", "failed"];

impl ReviewOutcome {
    /// Value in the log and in the label `outcome`.
    pub fn name(&self) -> &'static str {
        OUTCOMES[self.number()]
    }

    fn number(&self) -> usize {
        match self {
            Self::Injected => 0,
            Self::Unchanged => 1,
            Self::Skipped(_) => 2,
            Self::Failed(_) => 3,
        }
    }
}

/// Counters.
#[derive(Debug, Default)]
pub struct Metrics {
    outcomes: [AtomicU64; OUTCOMES.len()],
    durations: [AtomicU64; BOUNDS_MS.len() + 1],
    duration_us: AtomicU64,
    /// Events that were dropped: the queue was full, or the API server refused them.
    pub events_dropped: AtomicU64,
}

impl Metrics {
    /// Counts a review.
    pub fn review(&self, outcome: &ReviewOutcome, took: Duration) {
        self.outcomes[outcome.number()].fetch_add(1, Ordering::Relaxed);
        let ms = took.as_millis() as u64;
        let bucket = BOUNDS_MS.iter().position(|bound| ms < *bound).unwrap_or(BOUNDS_MS.len());
        self.durations[bucket].fetch_add(1, Ordering::Relaxed);
        self.duration_us.fetch_add(took.as_micros() as u64, Ordering::Relaxed);
    }

    /// Prometheus text format, version 0.0.4. `expires` is the certificate's end in seconds since 1970.
    pub fn render(&self, expires: Option<u64>, accepted: bool, ready: bool) -> String {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let outcomes: Vec<_> = OUTCOMES.iter().zip(&self.outcomes).collect();
        let outcomes: Vec<_> =
            outcomes.iter().map(|(name, count)| (Some(("outcome", **name)), load(count))).collect();
        let durations: Vec<_> = self.durations.iter().map(load).collect();
        let mut families = vec![
            counters("lameduck_webhook_reviews_total", "Reviews by their outcome.", &outcomes),
            histogram(
                "lameduck_webhook_review_duration_seconds",
                "Time from a review's last byte to its response.",
                &BOUNDS_MS,
                &durations,
                load(&self.duration_us),
            ),
            counters(
                "lameduck_webhook_events_dropped_total",
                "Events dropped.",
                &[(None, load(&self.events_dropped))],
            ),
            gauge(
                "lameduck_webhook_ca_bundle_ok",
                "1 while every caBundle verifies the certificate.",
                f64::from(u8::from(accepted)),
            ),
            gauge("lameduck_webhook_ready", "1 while /readyz answers 200.", f64::from(u8::from(ready))),
        ];
        if let Some(expires) = expires {
            let name = "lameduck_webhook_certificate_expiry_timestamp_seconds";
            families.push(gauge(name, "When the served certificate expires.", expires as f64));
        }
        text(&families)
    }
}
