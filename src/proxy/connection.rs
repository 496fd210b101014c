//! What a client's connection has become, once the part that had it can do no more with it: data, which goes up to
//! [`super::threads`], the one place that starts what comes next.

use std::net::SocketAddr;
use std::time::Instant;

use super::buffer::Buffer;
use super::request_log::{RequestLog, Totals};
use super::stream::{self, Stream};
use crate::drain::gate::{Connected, InFlightTunnel};
use crate::drain::ledger::LedgerEntry;
use crate::upstream::{Connection, ParkedConnection};

/// What becomes of a client's connection.
pub enum Next {
    /// It is closed already, or closes as it is dropped.
    Closed,
    /// It closes: our end first, then the client's, so that the last answer isn't lost.
    Close(Stream, Connected),
    /// It waits for its next request, without a task.
    Park(Idle),
    /// It speaks HTTP/2.
    Http2(Http2),
    /// It is a tunnel to the app.
    Tunnel(Box<Tunnel>),
    /// A tunnel over which nothing moves waits for its next byte, without a task.
    ParkTunnel(ParkedTunnel),
}

/// A connection between two requests.
pub struct Idle {
    /// The client's connection.
    pub stream: stream::Resting,
    /// Its other end.
    pub peer: SocketAddr,
    /// Counts it.
    pub connected: Connected,
    /// When it was accepted, if its first request is still to come.
    pub accepted: Option<Instant>,
}

/// A connection that begins with HTTP/2's preface.
pub struct Http2 {
    /// The client's connection.
    pub stream: Stream,
    /// What was read from it.
    pub read: Buffer,
    /// Its place in the ledger.
    pub entry: LedgerEntry,
    /// Counts it.
    pub connected: Connected,
}

/// A connection that has just become a tunnel, or that was parked as one.
pub struct Tunnel {
    /// The client's connection.
    pub client: Stream,
    /// The app's connection, and what was read from it and not yet passed on.
    pub app: Connection,
    /// See `app`.
    pub app_buf: Buffer,
    /// What was read from the client and not yet passed on.
    pub client_buf: Buffer,
    /// What else is known of it.
    pub state: TunnelState,
}

/// What is known of a tunnel besides its two connections.
pub struct TunnelState {
    /// A WebSocket, whose frames are followed.
    pub websocket: bool,
    /// One of `--tcp`, whose client has sent nothing yet: a health check never does, so it is no arrival so far.
    pub unheard: bool,
    /// Counted until the tunnel closes.
    pub in_flight: InFlightTunnel,
    /// Written once it has closed.
    pub log: RequestLog,
    /// Of the handshake, and of what has passed since.
    pub totals: Totals,
    /// When something moved last, in milliseconds of the ledger's clock.
    pub moved_at: u64,
    /// Its place in the ledger.
    pub entry: LedgerEntry,
    /// Counts the client's connection.
    pub connected: Connected,
}

/// A tunnel between two frames over which nothing moves: no task and no buffer, only this.
pub struct ParkedTunnel {
    /// The client's connection.
    pub client: stream::Resting,
    /// The app's connection.
    pub app: ParkedConnection,
    /// What else is known of it.
    pub state: TunnelState,
}
