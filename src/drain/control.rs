//! Runs the drain. (A stand-in with the final API: it drains when its `Script` says so.)

use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use tokio::sync::watch;

use super::machine::Trigger;

/// A running proxy's drain, as its callers see it.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

struct Shared {
    outcome: watch::Sender<Option<Outcome>>,
    triggers: Mutex<Vec<Trigger>>,
}

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
    /// `Phase::name`.
    pub phase: &'static str,
    /// 0 before the first drain; a resume starts a new one.
    pub round: u32,
    /// What started it.
    pub trigger: Option<&'static str>,
    /// Requests, tunnels and leases.
    pub in_flight: u64,
    /// In flight and not held.
    pub running: u64,
    /// Held because the app restarts.
    pub held: u64,
    /// Client connections.
    pub connections: u64,
    /// Since T0.
    pub age_ms: Option<u64>,
    /// Until Forcing; negative when it is past.
    pub deadline_ms: Option<i64>,
    /// `clean`, or what was cut.
    pub verdict: Option<String>,
}

/// One request, tunnel or lease in flight.
#[derive(Clone, Debug, Serialize)]
pub struct LedgerRow {
    /// Its method.
    pub method: String,
    /// Its path without the query.
    pub path: String,
    /// Since its first byte.
    pub age_ms: u64,
    /// What it is: request, stream, websocket, …
    pub class: &'static str,
    /// The client's address.
    pub peer: String,
}

impl Control {
    /// Nothing has begun.
    pub fn new() -> Self {
        Self(Arc::new(Shared { outcome: watch::Sender::new(None), triggers: Mutex::default() }))
    }

    /// Begins a drain, or joins the one that runs, and waits for its end.
    pub async fn drain(&self, trigger: Trigger) -> Outcome {
        self.0.triggers.lock().unwrap_or_else(PoisonError::into_inner).push(trigger);
        let mut outcome = self.0.outcome.subscribe();
        let outcome = outcome.wait_for(Option::is_some).await;
        outcome.ok().and_then(|outcome| outcome.clone()).unwrap_or(Outcome::Resumed)
    }

    /// Serves again.
    pub async fn resume(&self) {
        self.end(Outcome::Resumed);
    }

    /// Where it stands now.
    pub fn status(&self) -> Status {
        let triggers = self.triggers();
        Status {
            phase: if triggers.is_empty() { "serving" } else { "draining" },
            round: 0,
            trigger: triggers.first().map(|_| "operator"),
            in_flight: 2,
            running: 2,
            held: 0,
            connections: 3,
            age_ms: triggers.first().map(|_| 1500),
            deadline_ms: None,
            verdict: None,
        }
    }

    /// Those that called `drain`, in order.
    pub fn triggers(&self) -> Vec<Trigger> {
        self.0.triggers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the drain for all who wait.
    pub fn end(&self, outcome: Outcome) {
        self.0.outcome.send_replace(Some(outcome));
    }
}

impl Default for Control {
    fn default() -> Self {
        Self::new()
    }
}
