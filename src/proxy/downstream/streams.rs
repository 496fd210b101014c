//! The state of a connection that its streams share. A stream counts as running until its last frame is in the
//! socket.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;

use crate::drain::gate::InFlightOwned;
use crate::drain::ledger::LedgerEntry;
use crate::metrics::{Ended, Shard};
use crate::proxy::http2::wire::Wire;
use crate::proxy::request_log::{RequestLog, Totals};
use crate::proxy::route::Route;
use crate::proxy::stream::Channel;
use crate::proxy::worker::Worker;

/// The state of a connection that its streams share.
pub struct Http2Connection {
    /// The thread that serves the connection.
    pub worker: Rc<Worker>,
    /// Where the connection leads.
    pub route: Rc<Route>,
    /// The client's address.
    pub peer: SocketAddr,
    /// The client's address as text.
    pub peer_text: String,
    /// The channel the client came in by, as reported to an app.
    pub channel: Channel,
    /// The connection's bytes.
    pub wire: Rc<Wire>,
    streams: RefCell<Vec<Running>>,
    /// The number of the last accepted stream.
    accepted: Cell<u32>,
    /// Streams that the client reset before they were accepted.
    early: RefCell<Vec<u32>>,
    /// The app has begun to close its connections.
    pub app_goes: Cell<bool>,
}

/// A stream until its last frame is in the socket.
struct Running {
    id: u32,
    /// Its last frame has been written, or the client has reset it.
    written: bool,
    /// Set once its request has ended; recorded when its last frame has been written.
    ending: Option<Ending>,
}

impl Http2Connection {
    /// A client's connection without streams.
    pub fn new(
        wire: Rc<Wire>,
        peer: SocketAddr,
        channel: Channel,
        route: Rc<Route>,
        worker: Rc<Worker>,
    ) -> Self {
        Self {
            worker,
            route,
            peer,
            peer_text: peer.ip().to_canonical().to_string(),
            channel,
            wire,
            streams: RefCell::default(),
            accepted: Cell::new(0),
            early: RefCell::default(),
            app_goes: Cell::new(false),
        }
    }

    /// Whether no stream is running.
    pub fn is_idle(&self) -> bool {
        self.streams.borrow().is_empty()
    }

    /// Called when a request has ended: it is over once its last frame is in the socket.
    pub fn ended(&self, id: u32, ending: Ending) {
        if !self.streams.borrow().iter().any(|stream| stream.id == id) {
            // The connection ended before the request did.
            return ending.cut(self.how_cut()).write(&self.worker.shard);
        }
        self.update(id, |stream| stream.ending = Some(ending));
    }

    fn how_cut(&self) -> Ended {
        if self.worker.shared.forced() { Ended::Cut } else { Ended::ClientGone }
    }

    /// Called when a stream has been accepted.
    pub fn begun(&self, id: u32) {
        self.accepted.set(id);
        let mut early = self.early.borrow_mut();
        self.streams.borrow_mut().push(Running { id, written: early.contains(&id), ending: None });
        // `h2` accepts streams in order and leaves out those that were reset early enough.
        early.retain(|other| *other > id);
    }

    /// Whether the end of a response is waiting for the client's window.
    pub fn is_stuck(&self) -> bool {
        self.streams.borrow().iter().any(|stream| stream.ending.is_some() && !stream.written)
    }

    /// Called when a stream was refused.
    pub fn forget(&self, id: u32) {
        self.streams.borrow_mut().retain(|stream| stream.id != id);
    }

    /// Records the requests whose last frame is in the socket.
    pub fn settle(&self) {
        self.wire.ended(|id| match id > self.accepted.get() {
            true => self.early.borrow_mut().push(id),
            false => self.update(id, |stream| stream.written = true),
        });
    }

    fn update(&self, id: u32, change: impl FnOnce(&mut Running)) {
        let mut streams = self.streams.borrow_mut();
        let Some(at) = streams.iter().position(|stream| stream.id == id) else { return };
        change(&mut streams[at]);
        if streams[at].written && streams[at].ending.is_some() {
            let ended = streams.swap_remove(at);
            ended.ending.into_iter().for_each(|ending| ending.write(&self.worker.shard));
        }
    }

    /// The connection is over: records the requests whose last frame will not be written.
    pub fn abandon(&self) {
        self.settle();
        for stream in self.streams.take() {
            if let Some(ending) = stream.ending {
                ending.cut(self.how_cut()).write(&self.worker.shard);
            }
        }
    }
}

/// What is recorded of a request once its last frame is in the socket. Until then the request counts.
pub struct Ending {
    /// `None` for a request that could not be parsed.
    pub log: Option<RequestLog>,
    /// Its totals.
    pub totals: Totals,
    /// How it ended.
    pub ended: Ended,
    /// Counts the request.
    pub _in_flight: InFlightOwned,
    /// The request's ledger entry.
    pub _entry: LedgerEntry,
}

impl Ending {
    /// The request's last frame was not delivered.
    fn cut(self, ended: Ended) -> Self {
        let whole = self.ended == Ended::Complete;
        Self { ended: if whole { ended } else { self.ended }, ..self }
    }

    /// Records the end.
    fn write(self, shard: &Shard) {
        if let Some(log) = self.log {
            log.write(shard, self.totals, self.ended);
        }
    }
}
