//! The clock of the drain.

use std::time::{Duration, Instant};

/// Returns seconds for the log, without what is below a millisecond: people read them.
pub fn seconds(time: Duration) -> f64 {
    time.as_millis() as f64 / 1000.0
}

/// Returns the current time on tokio's clock, which timers use too and which a test can pause.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
