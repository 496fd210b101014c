//! Whether the app answers and is warmed up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::not_yet;
use crate::config::UpstreamAddr;
use crate::control::data_plane::DataPlane;
use crate::drain::machine::Phase;
use crate::proxy::shared::Shared;
use crate::readiness;

/// Interval between checks of the app until it answers.
pub const CHECK_INTERVAL_AT_START: Duration = Duration::from_millis(50);
/// The same from then on.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// An app that has not answered for this long after our start is reported.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// A port that the app keeps closed is given up after this many times `--upstream-wait`, the most that a request waits
/// for it: an app that restarts has three tries.
const GIVE_UP_WAITS: u32 = 3;

/// State of the app.
#[derive(Debug)]
pub struct AppState {
    /// Whether it answers.
    pub up: AtomicBool,
    /// Whether its warm-up is finished.
    pub warm: AtomicBool,
}

impl AppState {
    /// Checks the app for the lifetime of the process, and warms it up once. `report`: whether to say why an app doesn't
    /// answer after our start, which `run` does itself.
    pub async fn watch(self: Arc<Self>, shared: Arc<Shared>, report: bool) {
        let ready = &shared.settings.ready;
        let (began, mut report, mut closed) = (Instant::now(), report, Vec::new());
        loop {
            let app = shared.app();
            let silent = readiness::silent(&app, &ready.check, ready.timeout).await;
            // An app that serves nobody is ready too.
            let up = silent.is_empty() && (!shared.settings.capture.capture || shared.captured.is_settled());
            if self.up.swap(up, Ordering::Relaxed) != up {
                let upstream = list(if up { &app } else { &silent });
                tracing::info!(up, upstream, "the app {}", if up { "answers" } else { "does not answer" });
            }
            report &= !up;
            if report && began.elapsed() >= START_TIMEOUT {
                report = false;
                if let Some(why) = not_yet::why(silent.first(), &shared.settings).await {
                    tracing::warn!("{why}");
                }
            }
            give_up(&shared, &app, silent, &mut closed);
            if up && !self.warm.load(Ordering::Relaxed) {
                // The app has none if it serves nobody.
                if let Some(first) = app.first() {
                    let failed = readiness::warm_up(first, &ready.warm_up, ready.warm_up_count).await;
                    if failed > 0 {
                        tracing::warn!(failed, "warm-up requests failed");
                    }
                }
                self.warm.store(true, Ordering::Relaxed);
            }
            tokio::time::sleep(if up { CHECK_INTERVAL } else { CHECK_INTERVAL_AT_START }).await;
        }
    }
}

fn list(app: &[UpstreamAddr]) -> String {
    app.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Gives up the captured ports that have been silent for long. `closed` says since when each of them is, and another one
/// is not: an app that is down as a whole is restarting.
fn give_up(
    shared: &Shared,
    app: &[UpstreamAddr],
    silent: Vec<UpstreamAddr>,
    closed: &mut Vec<(UpstreamAddr, Instant)>,
) {
    if silent.len() == app.len() || shared.phase() != Phase::Serving {
        return closed.clear();
    }
    closed.retain(|(port, _)| silent.contains(port));
    for port in silent {
        if closed.iter().all(|(known, _)| *known != port) {
            closed.push((port, Instant::now()));
        }
    }
    let most = shared.settings.upstream_wait * GIVE_UP_WAITS;
    for (port, since) in closed.iter_mut().filter(|(_, since)| since.elapsed() >= most) {
        shared.captured.give_up(port);
        // It may listen and only be slow to answer.
        *since = Instant::now();
    }
}
