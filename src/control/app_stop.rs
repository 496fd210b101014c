//! The end of the app after the drain: call its own preStop hook, then answer the callers, then check that the app
//! reacts to its SIGTERM.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use http_body_util::Empty;
use hyper::Request;
use tokio::sync::{OnceCell, mpsc, oneshot};

use super::clock::{now, seconds};
use super::data_plane::DataPlane;
use super::handle::{DrainOutcome, Order};
use crate::config::{AfterDrain, AppUrl};
use crate::drain::machine::{Event, Trigger};
use crate::inject::share;
use crate::readiness;
use crate::upstream;

/// Time for the app to close its port after SIGTERM, before a warning is logged. It is shorter than the default
/// reserve, so the warning comes before SIGKILL.
const SIGTERM_TIMEOUT: Duration = Duration::from_secs(3);

/// How often to check whether the app's own preStop exec is still running.
const EXEC_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// The longest time between a deletion and the kubelet's call of the hook.
const MAX_HOOK_DELAY: Duration = Duration::from_secs(1);

/// The usual reasons why an app outlives its SIGTERM, for the log.
const WHY_OUTLIVED: &str = "as PID 1 a program without a handler doesn't hear it (lameduck.dev/pid1: preload or \
    share, an init in the image, or `lameduck run`), and a handler may wait for what never ends";

/// A caller that began or joined a drain: its trigger, and where to send the outcome.
pub(super) type WaitingCaller = (Trigger, oneshot::Sender<DrainOutcome>);

/// What is known about the end of the app in this round.
#[derive(Default)]
pub(super) struct AppStop {
    /// When the kubelet announced that it is about to stop the app.
    since: Option<Instant>,
    /// The app's own hook. It is called once, however often the kubelet calls ours.
    own_hook: Arc<OnceCell<()>>,
    /// The app's port has closed. If its port answers afterwards, that is the restarted app.
    gone: Arc<AtomicBool>,
}

/// Whether the app gets its SIGTERM once this trigger's hook has been answered.
fn stops_app(trigger: Trigger) -> bool {
    matches!(trigger, Trigger::Hook | Trigger::AppHook)
}

impl AppStop {
    /// Records a trigger that began or joined a drain.
    pub(super) fn note(&mut self, trigger: Trigger) {
        if stops_app(trigger) {
            self.since.get_or_insert_with(now);
        }
    }

    /// Records that the app has closed its port after SIGTERM.
    pub(super) fn app_gone(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    /// Sends `outcome` to everyone in `waiting`. If one of them is the kubelet about to stop the app, calls the app's
    /// own hook first, and sends `AppStops` to `events` once SIGTERM is due.
    pub(super) fn answer(
        &self,
        plane: &Arc<dyn DataPlane>,
        events: &mpsc::UnboundedSender<Order>,
        waiting: Vec<WaitingCaller>,
        outcome: &DrainOutcome,
    ) {
        let stops_app = waiting.iter().any(|(trigger, _)| stops_app(*trigger));
        let sent = outcome.clone();
        let answer_all = move || {
            for (_, done) in waiting {
                let _ = done.send(sent.clone());
            }
        };
        if !stops_app {
            return answer_all();
        }
        let passed = self.since.map_or(Duration::ZERO, |since| now().duration_since(since));
        let left = plane.settings().drain.grace.saturating_sub(passed);
        let (plane, events, outcome) = (plane.clone(), events.clone(), outcome.clone());
        let (own_hook, gone) = (self.own_hook.clone(), self.gone.clone());
        tokio::spawn(async move {
            if plane.settings().after_drain.is_some() {
                own_hook.get_or_init(|| call(&*plane, left)).await;
            }
            answer_all();
            own_exec(&*plane, left).await;
            let _ = events.send(Order::Event(Event::AppStops));
            warn_if_it_lives_on(&*plane, &outcome, &gone).await;
        });
    }

    /// Logs a warning if the app was killed. Call it at a native sidecar's SIGTERM, which comes after the app has
    /// exited on its own or was killed at the end of the grace period.
    pub(super) fn warn_if_killed(&self, plane: &dyn DataPlane) {
        // The kubelet's grace period began shortly before its call arrived.
        let killed =
            self.since.map(|since| since + plane.settings().drain.grace.saturating_sub(MAX_HOOK_DELAY));
        if killed.is_some_and(|killed| now() >= killed) {
            tracing::warn!("the app outlived its SIGTERM until the grace was used up: {WHY_OUTLIVED}");
        }
    }
}

/// Calls the app's own preStop hook as the kubelet would: whether it succeeds changes nothing.
async fn call(plane: &dyn DataPlane, within: Duration) {
    let Some(AfterDrain { url: AppUrl { at, target }, headers }) = &plane.settings().after_drain else {
        return;
    };
    let mut built = Request::builder().uri(target.as_str());
    for (name, value) in headers {
        built = built.header(name, value);
    }
    let Ok(request) = built.body(Empty::new()) else { return };
    let began = now();
    let at = at.clone().unwrap_or_else(|| plane.upstream().addr());
    let asked = readiness::ask(&at, request, |answer| async move { answer.status() });
    let status = tokio::time::timeout(within, asked).await.ok().flatten();
    let seconds = seconds(now().duration_since(began));
    match status {
        Some(status) if status.is_success() || status.is_redirection() => {
            tracing::info!(
                url = target,
                status = status.as_u16(),
                seconds,
                "called the app's own preStop hook"
            );
        }
        Some(status) => {
            let status = status.as_u16();
            tracing::warn!(url = target, status, seconds, "the app's own preStop hook failed");
        }
        None => tracing::warn!(url = target, seconds, "the app's own preStop hook did not answer"),
    }
}

/// Waits until the app's own preStop exec has ended, at most `within`.
async fn own_exec(plane: &dyn DataPlane, within: Duration) {
    let ended = async {
        while plane.settings().share_dir.as_deref().is_some_and(share::is_running) {
            tokio::time::sleep(EXEC_CHECK_INTERVAL).await;
        }
    };
    let _ = tokio::time::timeout(within, ended).await;
}

async fn warn_if_it_lives_on(plane: &dyn DataPlane, outcome: &DrainOutcome, gone: &AtomicBool) {
    let heard = SIGTERM_TIMEOUT.min(plane.settings().drain.reserve / 2);
    tokio::time::sleep(heard).await;
    let restarted = match outcome {
        DrainOutcome::Drained { .. } => false,
        // Once requests are no longer held, the restart is over.
        DrainOutcome::AppMayStop => gone.load(Ordering::Relaxed) || !plane.gate().holding(),
        // Nothing watched whether the app has exited.
        DrainOutcome::Resumed => true,
    };
    if restarted {
        return;
    }
    for at in plane.app() {
        if upstream::connect(&at).await.is_ok() {
            let seconds = seconds(heard);
            return tracing::warn!(seconds, %at, "the app still takes connections after its SIGTERM: {WHY_OUTLIVED}");
        }
    }
}
