//! The drain as a pure machine: `step(now, event, counts) → effects`. No tokio, no sockets, no clock of its own.

use std::time::{Duration, Instant};

use crate::config::{DrainSettings, Sidecar};

/// Where a drain stands. Phases go forward only; a resume starts a new round at `Serving`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Phase {
    /// No drain.
    Serving = 0,
    /// Still accepts, and tells every client to go elsewhere.
    LameDuck = 1,
    /// New connections are refused; what runs may finish.
    Draining = 2,
    /// The deadline has passed: what is left is ended visibly.
    Forcing = 3,
    /// Nothing is in flight and nothing can come in any more.
    Drained = 4,
}

impl Phase {
    /// The phase whose number this is; anything past the last is `Drained`.
    pub fn from_u8(n: u8) -> Self {
        match n {
            0 => Self::Serving,
            1 => Self::LameDuck,
            2 => Self::Draining,
            3 => Self::Forcing,
            _ => Self::Drained,
        }
    }

    /// As it stands in logs, status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::LameDuck => "lame-duck",
            Self::Draining => "draining",
            Self::Forcing => "forcing",
            Self::Drained => "drained",
        }
    }
}

/// What started a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// SIGTERM or SIGINT to the proxy itself.
    Signal,
    /// `lameduck drain`; without a timeout it has no deadline.
    Operator {
        /// From its arrival to Forcing.
        timeout: Option<Duration>,
    },
    /// `/drain`, which doesn't say whose hook it is: the whole pod goes.
    Hook,
    /// `/drain?hook=app`: the app's preStop. Alone it means that only the app restarts.
    AppHook,
    /// `/drain?hook=sidecar`: the sidecar's own preStop, so the pod goes.
    SidecarHook,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A trigger arrived.
    Begin(Trigger),
    /// While the app restarts: its port closed, its connections died.
    AppGone,
    /// While the app restarts: it answers again.
    AppBack,
    /// `lameduck resume`.
    Resume,
    /// Don't wait any longer: a second signal.
    Force,
    /// Nothing but time and the counts changed.
    Tick,
}

/// The world at this moment, as the gate and the listeners tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Requests, tunnels and leases in flight that are not held.
    pub running: u64,
    /// Requests held back because the app restarts.
    pub held: u64,
    /// Client connections over which a request could still come.
    pub connections: u64,
    /// Whether a listening socket is still open.
    pub listening: bool,
    /// When the last connection or request arrived, if one ever did.
    pub last_arrival: Option<Instant>,
    /// The mean gap between arrivals in the 30 s up to now; none when there were none.
    pub mean_gap: Option<Duration>,
}

/// What is to be done now, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Publish this phase.
    Enter(Phase),
    /// New requests wait, nothing closes: the app restarts.
    Hold,
    /// Let the held requests go.
    Release,
    /// The app's hook may return although nothing was drained: what ran has finished, or `restart_grace` is over.
    ReleaseHook,
    /// Take what is in the accept queue, then close the listening sockets.
    StopListening,
    /// WebSockets and event streams end, spread over this time.
    EndStreams {
        /// Already clamped to the deadline.
        spread: Duration,
    },
    /// Nothing runs: close the connections that are idle.
    CloseIdle,
    /// A resume: listen again.
    Listen,
    /// End the process at once, within 1.5 s.
    Exit,
}
