//! The app's turn after the drain: its own preStop hook is called, then the callers have their answer, and SIGTERM
//! should end it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use http_body_util::Empty;
use hyper::Request;
use tokio::sync::{OnceCell, mpsc, oneshot};

use super::handle::{Order, Outcome};
use crate::config::AfterDrain;
use crate::drain::machine::{Event, Trigger};
use crate::inject::share;
use crate::proxy::shared::Shared;
use crate::readiness;
use crate::upstream;

/// An app that heard its SIGTERM closes its port sooner than this. Less than the usual reserve, so that the warning
/// comes before SIGKILL.
const HEARD: Duration = Duration::from_secs(3);

/// Between two looks at whether the app's own preStop exec runs.
const LOOK: Duration = Duration::from_millis(100);

/// From a deletion to its hook's arrival, at most.
const CALL: Duration = Duration::from_secs(1);

/// What it usually is.
const OUTLIVED: &str = "as PID 1 a program without a handler doesn't hear it (lameduck.dev/pid1: preload or \
    share, an init in the image, or `lameduck run`), and a handler may wait for what never ends";

/// One who began or joined a drain, and why.
pub(super) type Waiting = (Trigger, oneshot::Sender<Outcome>);

/// What is known of the app's own end in this round.
#[derive(Default)]
pub(super) struct AppStop {
    /// When the kubelet said that it will stop the app.
    since: Option<Instant>,
    /// The app's own hook, called once however often the kubelet calls ours.
    own_hook: Arc<OnceCell<()>>,
    /// It was seen to go: whoever answers on its port is the next one.
    gone: Arc<AtomicBool>,
}

/// The app's SIGTERM comes once such a hook has its answer.
fn stops_app(trigger: Trigger) -> bool {
    matches!(trigger, Trigger::Hook | Trigger::AppHook)
}

impl AppStop {
    /// Somebody began or joined a drain.
    pub(super) fn note(&mut self, trigger: Trigger) {
        if stops_app(trigger) {
            self.since.get_or_insert_with(Instant::now);
        }
    }

    /// The app has gone after its SIGTERM.
    pub(super) fn heard(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    /// Answers who waits; the app's own hook comes first if one of them is the kubelet about to stop the app. `events`
    /// hears when that is due.
    pub(super) fn answer(
        &self,
        shared: &Arc<Shared>,
        events: &mpsc::UnboundedSender<Order>,
        waiting: Vec<Waiting>,
        outcome: &Outcome,
    ) {
        let stops_app = waiting.iter().any(|(trigger, _)| stops_app(*trigger));
        let told = outcome.clone();
        let tell = move || {
            for (_, done) in waiting {
                let _ = done.send(told.clone());
            }
        };
        if !stops_app {
            return tell();
        }
        let left =
            shared.settings.drain.grace.saturating_sub(self.since.map_or(Duration::ZERO, |at| at.elapsed()));
        let (shared, events, outcome) = (shared.clone(), events.clone(), outcome.clone());
        let (own_hook, gone) = (self.own_hook.clone(), self.gone.clone());
        tokio::spawn(async move {
            if shared.settings.after_drain.is_some() {
                own_hook.get_or_init(|| call(&shared, left)).await;
            }
            tell();
            own_exec(&shared, left).await;
            let _ = events.send(Order::Event(Event::AppStops));
            warn_if_it_lives_on(&shared, &outcome, &gone).await;
        });
    }

    /// A native sidecar's SIGTERM comes once the app has gone: of its own accord, or killed when its time was up.
    pub(super) fn warn_if_killed(&self, shared: &Shared) {
        // The kubelet's time began a little before its call came.
        let killed = self.since.map(|since| since + shared.settings.drain.grace.saturating_sub(CALL));
        if killed.is_some_and(|killed| Instant::now() >= killed) {
            tracing::warn!("the app outlived its SIGTERM until the grace was used up: {OUTLIVED}");
        }
    }
}

/// As the kubelet would: nothing depends on how it ends.
async fn call(shared: &Shared, within: Duration) {
    let Some(AfterDrain { at, target, headers }) = &shared.settings.after_drain else { return };
    let mut built = Request::builder().uri(target.as_str());
    for (name, value) in headers {
        built = built.header(name, value);
    }
    let Ok(request) = built.body(Empty::new()) else { return };
    let began = Instant::now();
    let at = at.clone().unwrap_or_else(|| shared.upstream.addr());
    let asked = readiness::ask(&at, request, |answer| async move { answer.status() });
    let status = tokio::time::timeout(within, asked).await.ok().flatten();
    let seconds = began.elapsed().as_secs_f64();
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

/// Returns when the app's own preStop exec has ended, or when its time is up.
async fn own_exec(shared: &Shared, within: Duration) {
    let ended = async {
        while shared.settings.share_dir.as_deref().is_some_and(share::is_running) {
            tokio::time::sleep(LOOK).await;
        }
    };
    let _ = tokio::time::timeout(within, ended).await;
}

async fn warn_if_it_lives_on(shared: &Shared, outcome: &Outcome, gone: &AtomicBool) {
    let heard = HEARD.min(shared.settings.drain.reserve / 2);
    tokio::time::sleep(heard).await;
    let restarted = match outcome {
        Outcome::Drained { .. } => false,
        // A restart that is over doesn't hold any more.
        Outcome::AppMayStop => gone.load(Ordering::Relaxed) || !shared.gate.holding(),
        // Nobody looked whether it went.
        Outcome::Resumed => true,
    };
    if !restarted && upstream::connect(&shared.upstream.addr()).await.is_ok() {
        let seconds = heard.as_secs_f64();
        tracing::warn!(seconds, "the app still takes connections after its SIGTERM: {OUTLIVED}");
    }
}
