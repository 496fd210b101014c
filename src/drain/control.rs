//! A running proxy's drain as its callers see it: begin it and wait for its end, resume, ask where it stands.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};

use super::ledger::lock;
use super::machine::{Event, Phase, Trigger};
use crate::config::Settings;
use crate::proxy::plane::Plane;

/// How a drain ended for one who waited for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is in flight any more.
    Drained {
        /// `clean`, or what was cut.
        verdict: String,
    },
    /// Only the app restarts: it may stop now.
    AppMayStop,
    /// `lameduck resume` ended it.
    Resumed,
}

/// Where the drain stands.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// [`Phase::name`].
    pub phase: &'static str,
    /// How many drains were resumed so far.
    pub round: u32,
    /// [`trigger_name`] of what began the drain.
    pub trigger: Option<&'static str>,
    /// Requests and tunnels.
    pub in_flight: u64,
    /// In flight and not held.
    pub running: u64,
    /// Held because the app restarts.
    pub held: u64,
    /// Client connections.
    pub connections: u64,
    /// Since T0, in milliseconds.
    pub age_ms: Option<u64>,
    /// Until Forcing, in milliseconds; negative when it is past.
    pub deadline_ms: Option<i64>,
    /// `clean`, or what was cut.
    pub verdict: Option<String>,
}

/// What the machine said last, for whoever asks.
#[derive(Clone, Debug, Default)]
pub struct Published {
    /// The phase.
    pub phase: Option<Phase>,
    /// What began the drain.
    pub trigger: Option<Trigger>,
    /// Only the app restarts.
    pub restarting: bool,
    pub(super) round: u32,
    pub(super) began: Option<Instant>,
    pub(super) deadline: Option<Instant>,
    pub(super) verdict: Option<String>,
    /// Drains that ended: clean, and with something cut.
    pub drains: [u64; 2],
    /// How long the last one took.
    pub last: Option<Duration>,
}

pub(super) enum Command {
    Begin(Trigger, oneshot::Sender<Outcome>),
    Resume(oneshot::Sender<()>),
    Event(Event),
}

/// A running proxy's drain, as its callers see it.
#[derive(Clone)]
pub struct Control {
    pub(super) commands: mpsc::UnboundedSender<Command>,
    pub(super) published: Arc<Mutex<Published>>,
    pub(super) plane: Arc<Plane>,
    pub(super) exit: watch::Receiver<bool>,
}

impl Control {
    /// Begins a drain, or joins the one that runs, and waits for its end.
    pub async fn drain(&self, trigger: Trigger) -> Outcome {
        let (done, outcome) = oneshot::channel();
        let _ = self.commands.send(Command::Begin(trigger, done));
        outcome.await.unwrap_or(Outcome::Drained { verdict: "the proxy has ended".to_owned() })
    }

    /// Serves again; returns once it does.
    pub async fn resume(&self) {
        let (done, resumed) = oneshot::channel();
        let _ = self.commands.send(Command::Resume(done));
        let _ = resumed.await;
    }

    /// Doesn't wait any longer for what runs.
    pub fn force(&self) {
        let _ = self.commands.send(Command::Event(Event::Force));
    }

    /// Returns when the process is to end at once.
    pub async fn exit(&self) {
        let _ = self.exit.clone().wait_for(|exit| *exit).await;
    }

    /// What the machine said last.
    pub fn published(&self) -> Published {
        lock(&self.published).clone()
    }

    /// What the proxy was started with.
    pub fn settings(&self) -> &Settings {
        &self.plane.settings
    }

    /// Where the drain stands now.
    pub fn status(&self) -> Status {
        let published = self.published();
        let gate = &self.plane.gate;
        let (in_flight, held) = (gate.in_flight(), gate.held());
        let now = Instant::now();
        let until = |at: Instant| match at.checked_duration_since(now) {
            Some(left) => left.as_millis() as i64,
            None => -(now.duration_since(at).as_millis() as i64),
        };
        Status {
            phase: gate.phase().name(),
            round: published.round,
            trigger: published.trigger.map(trigger_name),
            in_flight,
            running: in_flight.saturating_sub(held),
            held,
            connections: gate.connections(),
            age_ms: published.began.map(|began| now.duration_since(began).as_millis() as u64),
            deadline_ms: published.deadline.map(until),
            verdict: published.verdict,
        }
    }
}

/// As it stands in logs and the status.
pub fn trigger_name(trigger: Trigger) -> &'static str {
    match trigger {
        Trigger::Signal => "signal",
        Trigger::Operator { .. } => "operator",
        Trigger::Hook => "hook",
        Trigger::AppHook => "app-hook",
        Trigger::SidecarHook => "sidecar-hook",
    }
}
