//! Results of the requests.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

/// Limit on the losses that are reported one by one.
const SAMPLES: usize = 40;

/// Reason why a request was lost.
#[derive(Debug)]
pub enum Loss {
    /// The connection failed.
    Refused(std::io::Error),
    /// The connection was reset.
    Reset,
    /// The connection ended before the response did.
    Cut,
    /// Status of 500 or more, and the beginning of the body.
    Status(u16, String),
    /// No byte came in time.
    TimedOut,
    /// An invalid response.
    Wrong(String),
}

impl Loss {
    fn name(&self) -> &'static str {
        match self {
            Self::Refused(_) => "refused",
            Self::Reset => "reset",
            Self::Cut => "cut",
            Self::Status(..) => "5xx",
            Self::TimedOut => "timed-out",
            Self::Wrong(_) => "wrong",
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(error) => write!(f, "refused: {error}"),
            Self::Status(status, body) => write!(f, "status {status} {body:?}"),
            Self::Wrong(what) => write!(f, "wrong: {what}"),
            other => f.write_str(other.name()),
        }
    }
}

/// Counters that all workers fill.
#[derive(Default)]
pub struct Report(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    requests: u64,
    /// By kind: number of requests made, and lost.
    kinds: BTreeMap<&'static str, (u64, u64)>,
    losses: BTreeMap<&'static str, u64>,
    samples: Vec<String>,
    /// Streams and WebSockets that the server ended as their protocol specifies.
    announced: BTreeMap<&'static str, u64>,
    /// Responses with `Connection: close`.
    closes: u64,
    connections: u64,
    /// Connections reset while no request ran on them.
    idle_resets: u64,
    slowest: BTreeMap<&'static str, Duration>,
}

impl Report {
    /// Counts a request that succeeded after this time.
    pub fn complete(&self, kind: &'static str, took: Duration) {
        let mut counts = self.counts();
        counts.requests += 1;
        counts.kinds.entry(kind).or_default().0 += 1;
        let slowest = counts.slowest.entry(kind).or_default();
        *slowest = took.max(*slowest);
    }

    /// Number of lost requests so far.
    pub fn lost(&self) -> u64 {
        self.counts().losses.values().sum()
    }

    /// Counts a lost request; `what` names it and its connection.
    pub fn lose(&self, kind: &'static str, loss: &Loss, took: Duration, what: &str) {
        let mut counts = self.counts();
        counts.requests += 1;
        let (made, lost) = counts.kinds.entry(kind).or_default();
        (*made, *lost) = (*made + 1, *lost + 1);
        *counts.losses.entry(loss.name()).or_default() += 1;
        if counts.samples.len() < SAMPLES {
            let at = humantime::format_rfc3339_millis(SystemTime::now());
            counts.samples.push(format!("{at} {kind} {loss} after {took:.3?}: {what}"));
        }
    }

    /// Counts a stream or WebSocket that the server ended as its protocol specifies.
    pub fn announced(&self, kind: &'static str) {
        *self.counts().announced.entry(kind).or_default() += 1;
    }

    /// Counts a response with `Connection: close`.
    pub fn told_to_close(&self) {
        self.counts().closes += 1;
    }

    /// Counts a new connection.
    pub fn connected(&self) {
        self.counts().connections += 1;
    }

    /// Counts a connection that was reset while no request ran on it.
    pub fn idle_reset(&self) {
        self.counts().idle_resets += 1;
    }

    /// Number of finished requests so far.
    pub fn requests(&self) -> u64 {
        self.counts().requests
    }

    /// All results, for the caller of the load client.
    pub fn json(&self) -> Value {
        let counts = self.counts();
        let kinds: BTreeMap<_, _> = counts
            .kinds
            .iter()
            .map(|(kind, (made, lost))| {
                let slowest = counts.slowest.get(kind).map_or(0, Duration::as_millis) as u64;
                (kind, json!({ "made": made, "lost": lost, "slowest_ms": slowest }))
            })
            .collect();
        json!({
            "requests": counts.requests,
            "lost": counts.losses.values().sum::<u64>(),
            "losses": counts.losses,
            "kinds": kinds,
            "announced_ends": counts.announced,
            "told_to_close": counts.closes,
            "connections": counts.connections,
            "idle_resets": counts.idle_resets,
            "samples": counts.samples,
        })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
