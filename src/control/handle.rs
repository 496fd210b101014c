//! The callers' handle to a running proxy: begin a drain and wait for its end, hold, switch, resume, read the status.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};

use super::clock::now;
use super::data_plane::DataPlane;
use super::switch;
use super::verdict::Verdict;
use crate::config::{Settings, UpstreamAddr};
use crate::drain::ledger::lock;
use crate::drain::machine::{Event, Phase, Trigger};
use crate::readiness;
use crate::upstream::Backend;

/// How a drain ended for a caller that waited for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DrainOutcome {
    /// Nothing is in flight any more.
    Drained {
        /// What was lost.
        verdict: Verdict,
    },
    /// Only the app restarts, and it may stop now.
    AppMayStop,
    /// `lameduck resume` ended it.
    Resumed,
}

/// The result of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldAnswer {
    /// New requests wait from now on.
    Begun,
    /// New requests wait, and nothing is running any more.
    Idle,
    /// The hold ended before everything was idle: by a resume, a drain, or because its time was over.
    Released,
    /// A drain or a restart of the app is in progress.
    Refused,
}

/// The state of a hold.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct HoldStatus {
    /// Time until the held requests are released at the latest, in milliseconds.
    pub left_ms: u64,
    /// Everything has been idle at least once since the hold began.
    pub idle: bool,
}

/// One of the app's servers.
#[derive(Clone, Debug, Serialize)]
pub struct ServerStatus {
    /// Its address.
    pub address: String,
    /// Requests and tunnels in flight to this server.
    pub in_flight: u64,
    /// The last connection attempt failed, so other servers are tried first.
    pub down: bool,
}

/// The state of the proxy and its drain.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// [`Phase::name`].
    pub phase: &'static str,
    /// Number of drains resumed so far.
    pub round: u32,
    /// [`trigger_name`] of the trigger that began the drain.
    pub trigger: Option<&'static str>,
    /// Requests and tunnels in flight, including held requests.
    pub in_flight: u64,
    /// Requests and tunnels in flight that are not held.
    pub running: u64,
    /// Requests held because the app restarts or is being replaced.
    pub held: u64,
    /// An operator's hold, if there is one.
    pub hold: Option<HoldStatus>,
    /// Where new requests go.
    pub upstream: String,
    /// `lameduck switch` chose that upstream; it takes precedence over `--upstream`.
    pub switched: bool,
    /// The servers that the upstream address resolves to.
    pub servers: Vec<ServerStatus>,
    /// Client connections on which a request can still arrive.
    pub connections: u64,
    /// Time since T0, in milliseconds.
    pub age_ms: Option<u64>,
    /// Time until Forcing, in milliseconds; negative once it has passed.
    pub deadline_ms: Option<i64>,
    /// `clean`, or what was lost.
    pub verdict: Option<String>,
}

/// A copy of the machine's state, updated after each step.
#[derive(Clone, Debug, Default)]
pub struct Published {
    /// The phase.
    pub phase: Option<Phase>,
    /// What began the drain.
    pub trigger: Option<Trigger>,
    /// Only the app restarts.
    pub restarting: bool,
    /// When an operator's hold ends at the latest, and whether everything has been idle since it began.
    pub(super) hold: Option<(Instant, bool)>,
    pub(super) round: u32,
    pub(super) began: Option<Instant>,
    pub(super) deadline: Option<Instant>,
    pub(super) verdict: Option<Verdict>,
    /// Number of finished drains: clean, and with losses.
    pub drains: [u64; 2],
    /// Duration of the last drain.
    pub last: Option<Duration>,
}

pub(super) enum Order {
    Begin(Trigger, oneshot::Sender<DrainOutcome>),
    Hold {
        max: Duration,
        keep_streams: bool,
        /// Answer only once nothing is running any more.
        wait: bool,
        done: oneshot::Sender<HoldAnswer>,
    },
    Resume(oneshot::Sender<()>),
    Event(Event),
}

/// A handle to a running proxy's drain.
#[derive(Clone)]
pub struct Control {
    pub(super) commands: mpsc::UnboundedSender<Order>,
    pub(super) published: Arc<Mutex<Published>>,
    pub(super) plane: Arc<dyn DataPlane>,
    pub(super) exit: watch::Receiver<bool>,
}

impl Control {
    /// Begins a drain, or joins the current one, and waits for its end.
    pub async fn drain(&self, trigger: Trigger) -> DrainOutcome {
        let (done, outcome) = oneshot::channel();
        let _ = self.commands.send(Order::Begin(trigger, done));
        outcome.await.unwrap_or(DrainOutcome::Drained { verdict: Verdict::Unknown })
    }

    /// Holds new requests for up to `max`. With `wait`, returns only once nothing is running any more. With
    /// `keep_streams`, WebSockets, event streams and long polls stay and are not waited for.
    pub async fn hold(&self, max: Duration, keep_streams: bool, wait: bool) -> HoldAnswer {
        let (done, held) = oneshot::channel();
        let _ = self.commands.send(Order::Hold { max, keep_streams, wait, done });
        held.await.unwrap_or(HoldAnswer::Released)
    }

    /// Sends new requests to `to`, or back to `--upstream` if it is `None`, once that answers within `timeout`. With
    /// `wait`, returns only once the old upstream has no requests left.
    ///
    /// # Errors
    /// A text that says why nothing was changed.
    pub async fn switch(
        &self,
        to: Option<UpstreamAddr>,
        timeout: Duration,
        wait: bool,
    ) -> Result<(), String> {
        let left = switch::switch(&*self.plane, to, timeout).await?;
        if wait {
            left.run_dry().await;
        }
        Ok(())
    }

    /// Checks now whether the app answers.
    pub async fn app_answers(&self) -> bool {
        let ready = &self.plane.settings().ready;
        readiness::check_app(&self.plane.upstream().addr(), &ready.check, ready.timeout).await
    }

    /// Resumes serving, and returns once the proxy listens again.
    pub async fn resume(&self) {
        let (done, resumed) = oneshot::channel();
        let _ = self.commands.send(Order::Resume(done));
        let _ = resumed.await;
    }

    /// Ends a hold. Does nothing during a drain or a restart.
    pub fn release(&self) {
        let _ = self.commands.send(Order::Event(Event::Release));
    }

    /// Stops waiting for running requests and ends them.
    pub fn force(&self) {
        let _ = self.commands.send(Order::Event(Event::Force));
    }

    /// Waits until the process must end at once.
    pub async fn exit(&self) {
        let _ = self.exit.clone().wait_for(|exit| *exit).await;
    }

    /// The machine's state after its last step.
    pub fn published(&self) -> Published {
        lock(&self.published).clone()
    }

    /// The settings that the proxy was started with.
    pub fn settings(&self) -> &Settings {
        self.plane.settings()
    }

    /// The app's address, as given at start or as chosen by `switch`.
    pub fn upstream(&self) -> UpstreamAddr {
        self.plane.upstream().addr()
    }

    /// The current state of the proxy and its drain.
    pub fn status(&self) -> Status {
        let published = self.published();
        let gate = self.plane.gate();
        let (in_flight, held) = (gate.in_flight(), gate.held());
        let now = now();
        let until = |at: Instant| match at.checked_duration_since(now) {
            Some(left) => left.as_millis() as i64,
            None => -(now.duration_since(at).as_millis() as i64),
        };
        let hold = published.hold.map(|(until, idle)| {
            let left_ms = until.saturating_duration_since(now).as_millis() as u64;
            HoldStatus { left_ms, idle }
        });
        let (upstream, servers) = (self.upstream(), self.plane.upstream().servers());
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
            switched: upstream != self.plane.upstream().own(),
            upstream: upstream.to_string(),
            servers: servers.iter().map(server).collect(),
            connections: gate.connections(),
            age_ms: published.began.map(|began| now.duration_since(began).as_millis() as u64),
            deadline_ms: published.deadline.map(until),
            verdict: published.verdict.map(|verdict| verdict.to_string()),
        }
    }
}

/// The name used in logs and in the status.
pub fn trigger_name(trigger: Trigger) -> &'static str {
    match trigger {
        Trigger::Signal => "signal",
        Trigger::Operator { .. } => "operator",
        Trigger::Hook => "hook",
        Trigger::AppHook => "app-hook",
        Trigger::SidecarHook => "sidecar-hook",
    }
}
