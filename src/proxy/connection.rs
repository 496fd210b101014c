//! What a client's connection becomes when the code that served it is done: plain data, passed up to
//! [`super::threads`], the one place that starts the next step.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use super::buffer::Buffer;
use super::request_log::{RequestLog, Totals};
use super::route::Route;
use super::shared::Shared;
use super::stream::{self, Stream};
use crate::drain::gate::{Connected, InFlightOwned, InFlightTunnel};
use crate::drain::ledger::LedgerEntry;
use crate::upstream::{Backend, Connection, ParkedConnection};

/// The next step for a client's connection.
pub enum Next {
    /// None: it is closed, or closes on drop.
    Closed,
    /// Close our side first, then wait for the client's, so that the last response isn't lost.
    Close(Stream, Connected),
    /// Park it until its next request, without a task.
    Park(Idle),
    /// Serve it as HTTP/2.
    Http2(Http2),
    /// Connect it to the app and relay it byte for byte.
    Opaque(Box<Opaque>),
    /// Relay it as a tunnel to the app.
    Tunnel(Box<Tunnel>),
    /// Park an idle tunnel until its next byte, without a task.
    ParkTunnel(ParkedTunnel),
}

/// A connection between two requests.
pub struct Idle {
    /// The client's connection.
    pub stream: stream::Resting,
    /// The client's address.
    pub peer: SocketAddr,
    /// Counts the connection.
    pub connected: Connected,
    /// Where it leads.
    pub route: Rc<Route>,
    /// When it was accepted, if its first request is still to come.
    pub accepted: Option<Instant>,
}

/// A connection that begins with the HTTP/2 preface.
pub struct Http2 {
    /// The client's connection.
    pub stream: Stream,
    /// The bytes read from it.
    pub read: Buffer,
    /// Its ledger entry.
    pub entry: LedgerEntry,
    /// Counts the connection.
    pub connected: Connected,
    /// Where it leads.
    pub route: Rc<Route>,
}

/// A connection that isn't HTTP.
pub struct Opaque {
    /// The client's connection.
    pub client: Stream,
    /// The client's address.
    pub peer: SocketAddr,
    /// Bytes read from the client.
    pub client_buf: Buffer,
    /// The app's connection, if there is one already.
    pub app: Option<Connection>,
    /// Counts it, if it was admitted already.
    pub in_flight: Option<InFlightOwned>,
    /// Counts the client's connection.
    pub connected: Connected,
    /// Where it leads.
    pub route: Rc<Route>,
}

/// A connection that has just become a tunnel, or was parked as one.
pub struct Tunnel {
    /// The client's connection.
    pub client: Stream,
    /// The app's connection.
    pub app: Connection,
    /// Bytes read from the app and not yet passed on.
    pub app_buf: Buffer,
    /// Bytes read from the client and not yet passed on.
    pub client_buf: Buffer,
    /// Everything else.
    pub state: TunnelState,
}

/// What a tunnel relays, which decides how it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelKind {
    /// A WebSocket, whose frames are followed: a drain ends it between two messages.
    WebSocket,
    /// Another upgrade, or a `--tcp` connection: a drain lets it run until the deadline.
    Raw,
    /// A connection to a captured port that isn't HTTP: a drain ends it once it is quiet.
    Opaque {
        /// Its random share of the time over which a drain spreads the ends of streams, in parts of 255.
        share: u8,
    },
}

/// The state of a tunnel besides its two connections.
pub struct TunnelState {
    /// What is relayed.
    pub kind: TunnelKind,
    /// The client sent the last byte, so the app has something to do.
    pub app_owes: bool,
    /// A `--tcp` connection whose client has sent nothing yet. Health checks never do, so it does not count as an
    /// arrival so far.
    pub unheard: bool,
    /// Counts the tunnel until it closes.
    pub in_flight: InFlightTunnel,
    /// Written once the tunnel has closed.
    pub log: RequestLog,
    /// Totals of the handshake and of everything relayed since.
    pub totals: Totals,
    /// When a byte last moved, in milliseconds of the ledger's clock.
    pub moved_at: u64,
    /// Its ledger entry.
    pub entry: LedgerEntry,
    /// Counts the client's connection.
    pub connected: Connected,
}

/// An idle tunnel between two messages: it has no task and no buffers.
pub struct ParkedTunnel {
    /// The client's connection.
    pub client: stream::Resting,
    /// The app's connection.
    pub app: ParkedConnection,
    /// Everything else.
    pub state: TunnelState,
}

impl TunnelState {
    /// Whether the drain wants this tunnel to `to` to act: a WebSocket when streams end; a captured connection when its
    /// turn has come and it is quiet, which means that neither side has sent a byte for `--tcp-quiet` and the app owes no response;
    /// any other tunnel only when everything is cut.
    pub fn is_to_end(&self, shared: &Shared, to: &Backend, now_ms: u64) -> bool {
        let quiet_ms = shared.settings.capture.tcp_quiet.as_millis() as u64;
        shared.forced()
            || match self.kind {
                TunnelKind::Raw => false,
                TunnelKind::WebSocket => shared.ends_streams(to),
                TunnelKind::Opaque { share } => {
                    shared.ends_share(to, share)
                        && !self.app_owes
                        && now_ms.saturating_sub(self.moved_at) >= quiet_ms
                }
            }
    }
}
