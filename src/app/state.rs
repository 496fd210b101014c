//! Whether the app answers and is warmed up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::proxy::shared::Shared;
use crate::readiness;

/// Interval between checks of the app until it answers.
pub const CHECK_INTERVAL_AT_START: Duration = Duration::from_millis(50);
/// The same from then on.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// State of the app.
pub struct AppState {
    /// Whether it answers.
    pub up: AtomicBool,
    /// Whether its warm-up is finished.
    pub warm: AtomicBool,
}

impl AppState {
    /// Checks the app for the lifetime of the process, and warms it up once.
    pub async fn watch(self: Arc<Self>, shared: Arc<Shared>) {
        let ready = &shared.settings.ready;
        loop {
            let upstream = &shared.upstream.addr();
            let up = readiness::check_app(upstream, &ready.check, ready.timeout).await;
            if self.up.swap(up, Ordering::Relaxed) != up {
                tracing::info!(up, %upstream, "the app {}", if up { "answers" } else { "does not answer" });
            }
            if up && !self.warm.load(Ordering::Relaxed) {
                let failed = readiness::warm_up(upstream, &ready.warm_up, ready.warm_up_count).await;
                if failed > 0 {
                    tracing::warn!(failed, "warm-up requests failed");
                }
                self.warm.store(true, Ordering::Relaxed);
            }
            tokio::time::sleep(if up { CHECK_INTERVAL } else { CHECK_INTERVAL_AT_START }).await;
        }
    }
}
