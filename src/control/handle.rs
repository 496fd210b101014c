//! A running proxy's drain as its callers see it: begin it and wait for its end, resume, ask where it stands.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};

use super::switch;
use super::verdict::Verdict;
use crate::config::{Settings, UpstreamAddr};
use crate::drain::ledger::lock;
use crate::drain::machine::{Event, Phase, Trigger};
use crate::proxy::shared::Shared;
use crate::readiness;
use crate::upstream::Backend;

/// How a drain ended for one who waited for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is in flight any more.
    Drained {
        /// What was lost.
        verdict: Verdict,
    },
    /// Only the app restarts: it may stop now.
    AppMayStop,
    /// `lameduck resume` ended it.
    Resumed,
}

/// What came of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldAnswer {
    /// New requests wait from now on.
    Begun,
    /// New requests wait, and nothing runs any more.
    Idle,
    /// It ended before it came to that: by a resume, a drain, or its longest time.
    Released,
    /// A drain or a restart of the app is under way.
    Refused,
}

/// A hold that runs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct HoldStatus {
    /// Until the held requests go at the latest, in milliseconds.
    pub left_ms: u64,
    /// Nothing ran any more since it began.
    pub idle: bool,
}

/// One of the app's servers.
#[derive(Clone, Debug, Serialize)]
pub struct ServerStatus {
    /// Its address.
    pub address: String,
    /// Requests and tunnels on their way to it.
    pub in_flight: u64,
    /// It took no connection the last time; others come first.
    pub down: bool,
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
    /// HoldAnswer because the app restarts or is replaced.
    pub held: u64,
    /// An operator's hold.
    pub hold: Option<HoldStatus>,
    /// Where new requests go.
    pub upstream: String,
    /// `lameduck switch` chose that; it outranks `--upstream`.
    pub switched: bool,
    /// The app's servers under that address.
    pub servers: Vec<ServerStatus>,
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
    /// Until when an operator holds requests, and whether nothing ran any more since.
    pub(super) hold: Option<(Instant, bool)>,
    pub(super) round: u32,
    pub(super) began: Option<Instant>,
    pub(super) deadline: Option<Instant>,
    pub(super) verdict: Option<Verdict>,
    /// Drains that ended: clean, and with something cut.
    pub drains: [u64; 2],
    /// How long the last one took.
    pub last: Option<Duration>,
}

pub(super) enum Order {
    Begin(Trigger, oneshot::Sender<Outcome>),
    Hold {
        most: Duration,
        keep_streams: bool,
        /// Until nothing runs any more.
        wait: bool,
        done: oneshot::Sender<HoldAnswer>,
    },
    Resume(oneshot::Sender<()>),
    Event(Event),
}

/// A running proxy's drain, as its callers see it.
#[derive(Clone)]
pub struct Control {
    pub(super) commands: mpsc::UnboundedSender<Order>,
    pub(super) published: Arc<Mutex<Published>>,
    pub(super) shared: Arc<Shared>,
    pub(super) exit: watch::Receiver<bool>,
}

impl Control {
    /// Begins a drain, or joins the one that runs, and waits for its end.
    pub async fn drain(&self, trigger: Trigger) -> Outcome {
        let (done, outcome) = oneshot::channel();
        let _ = self.commands.send(Order::Begin(trigger, done));
        outcome.await.unwrap_or(Outcome::Drained { verdict: Verdict::Unknown })
    }

    /// Lets new requests wait for `most`; with `wait` it returns when nothing runs any more. `keep_streams`: WebSockets,
    /// event streams and long polls stay, and aren't waited for.
    pub async fn hold(&self, most: Duration, keep_streams: bool, wait: bool) -> HoldAnswer {
        let (done, held) = oneshot::channel();
        let _ = self.commands.send(Order::Hold { most, keep_streams, wait, done });
        held.await.unwrap_or(HoldAnswer::Released)
    }

    /// Sends new requests to `to`, or back to `--upstream`, once it answers; `wait`s until the old one has run dry.
    ///
    /// # Errors
    /// Why nothing was changed, in words.
    pub async fn switch(
        &self,
        to: Option<UpstreamAddr>,
        timeout: Duration,
        wait: bool,
    ) -> Result<(), String> {
        let left = switch::switch(&self.shared, to, timeout).await?;
        if wait {
            left.run_dry().await;
        }
        Ok(())
    }

    /// Asks the app now whether it answers.
    pub async fn app_answers(&self) -> bool {
        let ready = &self.shared.settings.ready;
        readiness::check_app(&self.shared.upstream.addr(), &ready.check, ready.timeout).await
    }

    /// Serves again; returns once it does.
    pub async fn resume(&self) {
        let (done, resumed) = oneshot::channel();
        let _ = self.commands.send(Order::Resume(done));
        let _ = resumed.await;
    }

    /// Ends a hold, and nothing else.
    pub fn release(&self) {
        let _ = self.commands.send(Order::Event(Event::Release));
    }

    /// Doesn't wait any longer for what runs.
    pub fn force(&self) {
        let _ = self.commands.send(Order::Event(Event::Force));
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
        &self.shared.settings
    }

    /// The app's address, as it was given or as `switch` chose it.
    pub fn upstream(&self) -> UpstreamAddr {
        self.shared.upstream.addr()
    }

    /// Where the drain stands now.
    pub fn status(&self) -> Status {
        let published = self.published();
        let gate = &self.shared.gate;
        let (in_flight, held) = (gate.in_flight(), gate.held());
        let now = Instant::now();
        let until = |at: Instant| match at.checked_duration_since(now) {
            Some(left) => left.as_millis() as i64,
            None => -(now.duration_since(at).as_millis() as i64),
        };
        let hold = published.hold.map(|(until, idle)| {
            let left_ms = until.saturating_duration_since(now).as_millis() as u64;
            HoldStatus { left_ms, idle }
        });
        let (upstream, servers) = (self.shared.upstream.addr(), self.shared.upstream.servers());
        let server = |server: &Arc<Backend>| ServerStatus {
            address: server.at.to_string(),
            in_flight: server.in_flight(),
            down: server.is_unhealthy(),
        };
        Status {
            phase: gate.phase().name(),
            round: published.round,
            trigger: published.trigger.map(trigger_name),
            in_flight,
            running: in_flight.saturating_sub(held),
            held,
            hold,
            switched: upstream != self.shared.upstream.own(),
            upstream: upstream.to_string(),
            servers: servers.iter().map(server).collect(),
            connections: gate.connections(),
            age_ms: published.began.map(|began| now.duration_since(began).as_millis() as u64),
            deadline_ms: published.deadline.map(until),
            verdict: published.verdict.map(|verdict| verdict.to_string()),
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
