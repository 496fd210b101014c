//! Whether the app is up and warm.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::proxy::shared::Shared;
use crate::readiness;

/// How often the app is asked whether it is up: until it is, and from then on.
pub const ASK_AT_START: Duration = Duration::from_millis(50);
const ASK: Duration = Duration::from_secs(1);

/// What is known of the app.
pub struct AppState {
    /// It answers.
    pub up: AtomicBool,
    /// Its warm-up is over.
    pub warm: AtomicBool,
}

impl AppState {
    /// Asks the app for as long as the process lives, and warms it up once.
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
            tokio::time::sleep(if up { ASK } else { ASK_AT_START }).await;
        }
    }
}
