//! The clock of the drain.

use std::time::Instant;

/// Returns the current time on tokio's clock, which timers use too and which a test can pause.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
