//! What a drain needs from the data plane: its counts, and what it has to carry out.

use std::pin::Pin;
use std::time::{Duration, Instant};

use super::leases::Leases;
use crate::config::{Settings, UpstreamAddr};
use crate::drain::gate::Gate;
use crate::drain::ledger::LedgerRow;
use crate::drain::machine::Phase;
use crate::drain::quiet::Arrivals;
use crate::metrics::Ended;
use crate::upstream::{Backend, Upstream};

/// The connections and requests that a drain ends. Every call returns at once; what it asks for happens afterwards and
/// shows in the gate's counts.
pub trait DataPlane: Send + Sync {
    /// The validated settings.
    fn settings(&self) -> &Settings;

    /// Admission and counts.
    fn gate(&self) -> &Gate;

    /// Work of the app that is no request.
    fn leases(&self) -> &Leases;

    /// The app's upstream.
    fn upstream(&self) -> &Upstream;

    /// Returns where the app listens: its captured ports, first the one that `--ready-check` asks; without capture, its
    /// upstream.
    fn app(&self) -> Vec<UpstreamAddr>;

    /// Returns lines for the termination log about the ports that clients reach past us; empty without any.
    fn bypassed(&self) -> String;

    /// Publishes a phase to every connection. `Serving` begins a new round, in which nothing has to end or to close any
    /// more.
    fn set_phase(&self, phase: Phase);

    /// Holds new requests, each for up to `max`.
    fn hold(&self, max: Duration);

    /// Releases the held requests, one after another. Streams need not end any more.
    fn release(&self);

    /// Ends WebSockets, event streams and waiting long polls, each at a random time within `spread`.
    fn end_streams(&self, spread: Duration);

    /// Ends the streams of a server that is no longer used, each at a random time within `spread`.
    fn end_streams_of(&self, server: &Backend, spread: Duration);

    /// Closes idle connections.
    fn close_idle(&self);

    /// Returns the arrivals so far, and the time of the last one.
    fn arrivals(&self) -> (Arrivals, Option<Instant>);

    /// Returns the number of requests so far by ending, without health checks.
    fn ended(&self) -> [u64; Ended::ALL.len()];

    /// Returns the requests and connections in progress, oldest first.
    fn ledger(&self) -> Vec<LedgerRow>;
}

/// The listening sockets of the data plane.
pub trait Listeners: Send {
    /// Accepts what is in the accept queues, then closes the listening sockets.
    fn close(&self);

    /// Listens again on the same addresses.
    fn listen(&self);

    /// Whether any listening socket is open.
    fn is_listening(&self) -> bool;

    /// Returns when all listening sockets are open, or have to close again.
    fn all_open(&self) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}
