//! What a client's connection becomes when the code that served it is done: plain data, passed up to
//! [`super::threads`], the one place that starts the next step.

use std::net::SocketAddr;
use std::time::Instant;

use super::buffer::Buffer;
use super::request_log::{RequestLog, Totals};
use super::stream::{self, Stream};
use crate::drain::gate::{Connected, InFlightTunnel};
use crate::drain::ledger::LedgerEntry;
use crate::upstream::{Connection, ParkedConnection};

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

/// The state of a tunnel besides its two connections.
pub struct TunnelState {
    /// A WebSocket, whose frames are followed.
    pub websocket: bool,
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
