//! One HTTP/2 connection from a client (RFC 9113): a task that runs it, and one for each of its streams, which are
//! requests like any others.
//!
//! The `h2` crate is the protocol's engine. A drain tells a client by GOAWAY to go: first without an end (2^31-1), so
//! that what is on its way is served, then, when the client has answered a ping, with the last stream's number.

mod adapter;
mod app;
mod frames;
mod head;
mod relay;
mod request;
mod wire;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use ::h2::Reason;
use ::h2::server::{self, Builder};
use bytes::Bytes;
use tokio::task::spawn_local;

pub use self::app::{AppStream, request as app_head};
pub use self::frames::PREFACE;
use self::request::Ending;
use self::wire::{Transport, Wire};
use crate::drain::gate::Connected;
use crate::drain::ledger::Place;
use crate::drain::machine::Phase;
use crate::metrics::Ended;
use crate::proxy::buffer::Buffer;
use crate::proxy::conn::shut;
use crate::proxy::plane::Worker;
use crate::proxy::stream::{Channel, Stream};
use crate::proxy::upgrade::keep_alive;

/// What a stream's client may send before the app takes it: 20 MB/s at a round trip of 12 ms.
const STREAM_WINDOW: u32 = 256 * 1024;
/// The same for a connection: eight uploads that the app doesn't take leave room for the others.
const CONNECTION_WINDOW: u32 = 8 * STREAM_WINDOW;
/// A connection that has just begun has its first request on the way: a drain gives it so long to come.
const FRESH: Duration = Duration::from_secs(1);
/// The last frames may take so long to be written.
const LAST_WORD: Duration = Duration::from_secs(1);

/// A connection as its streams see it.
pub struct Connection {
    worker: Rc<Worker>,
    peer: SocketAddr,
    peer_text: String,
    channel: Channel,
    wire: Rc<Wire>,
    streams: RefCell<Vec<Running>>,
    /// The last stream that was accepted.
    accepted: Cell<u32>,
    /// Streams that the client has reset before they were accepted.
    early: RefCell<Vec<u32>>,
}

/// A stream until its last frame is in the socket.
struct Running {
    id: u32,
    /// Its last frame has been written, or the client has reset it.
    written: bool,
    /// Its request has ended, with this to be told once its last frame has been written.
    ending: Option<Ending>,
}

/// How a connection closes.
enum Close {
    /// The peer has gone already.
    Gone,
    /// Our end first, then theirs, bounded.
    Linger,
    /// At once and visibly.
    Reset,
}

/// Whether a connection's first bytes are HTTP/2's, as far as they go.
pub fn begins(bytes: &[u8]) -> bool {
    bytes.iter().zip(PREFACE).all(|(byte, preface)| byte == preface)
}

/// Serves an HTTP/2 connection, of which `read` came already, in a task of its own.
pub fn begin(stream: Stream, read: Buffer, place: Place, connected: Connected, worker: Rc<Worker>) {
    // A call may be silent for hours: a client that vanished would hold it, and a drain.
    keep_alive(stream.tcp());
    spawn_local(serve(stream, read, place.hand_over(), connected, worker));
}

async fn serve(stream: Stream, read: Buffer, place: Place, connected: Connected, worker: Rc<Worker>) {
    let channel = stream.channel();
    let wire = Rc::new(Wire::new(stream, read, worker.clone()));
    let connection = Rc::new(Connection {
        worker: worker.clone(),
        peer: place.peer,
        peer_text: place.peer.ip().to_canonical().to_string(),
        channel,
        wire: wire.clone(),
        streams: RefCell::default(),
        accepted: Cell::new(0),
        early: RefCell::default(),
    });
    let close = connection.clone().run(&place).await;
    connection.abandon();
    let Some(stream) = wire.take() else { return };
    match close {
        Close::Gone => {}
        Close::Reset => stream.reset_on_close(),
        Close::Linger => {
            drop(place);
            shut(stream, connected, &worker).await;
        }
    }
}

impl Connection {
    async fn run(self: Rc<Self>, place: &Place) -> Close {
        let limits = &self.worker.plane.settings.limits;
        let mut builder = Builder::new();
        builder
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(limits.streams)
            .max_header_list_size(u32::try_from(limits.head).unwrap_or(u32::MAX))
            .max_send_buffer_size(adapter::QUEUED);
        let mut handshake = pin!(builder.handshake(Transport(self.wire.clone())));
        let began = Instant::now();
        place.set_deadline(self.worker.deadline(limits.head_timeout));
        let shaken = poll_fn(|cx| {
            place.register(cx);
            if let Poll::Ready(shaken) = handshake.as_mut().poll(cx) {
                return Poll::Ready(shaken.map_err(|_| Close::Linger));
            }
            if let Poll::Ready(Err(_)) = self.wire.poll_drain(cx) {
                return Poll::Ready(Err(Close::Gone));
            }
            let (plane, age) = (&self.worker.plane, began.elapsed());
            let idle = plane.closing_idle() && age >= FRESH && !self.wire.has_unread();
            if idle || plane.forced() || age >= limits.head_timeout {
                return Poll::Ready(Err(Close::Linger));
            }
            if plane.closing_idle() || place.expired() {
                place.set_deadline(self.worker.deadline(FRESH));
            }
            Poll::Pending
        });
        match shaken.await {
            Ok(h2) => {
                let mut session = Session::new(self, place, h2);
                poll_fn(|cx| session.poll(cx)).await
            }
            Err(close) => close,
        }
    }

    /// A request has ended: it is over once its last frame is in the socket.
    fn ended(&self, id: u32, ending: Ending) {
        if !self.streams.borrow().iter().any(|stream| stream.id == id) {
            // Its connection has ended before it.
            return ending.cut(self.how_cut()).write(&self.worker);
        }
        self.update(id, |stream| stream.ending = Some(ending));
    }

    fn how_cut(&self) -> Ended {
        if self.worker.plane.forced() { Ended::Cut } else { Ended::ClientGone }
    }

    /// A stream has begun.
    fn begun(&self, id: u32) {
        self.accepted.set(id);
        let mut early = self.early.borrow_mut();
        self.streams.borrow_mut().push(Running { id, written: early.contains(&id), ending: None });
        // The engine takes them in order and leaves out those that were reset in time.
        early.retain(|other| *other > id);
    }

    /// Whether the last of an answer waits for the client's window.
    fn is_stuck(&self) -> bool {
        self.streams.borrow().iter().any(|stream| stream.ending.is_some() && !stream.written)
    }

    /// A stream was refused.
    fn forget(&self, id: u32) {
        self.streams.borrow_mut().retain(|stream| stream.id != id);
    }

    /// Ends the requests whose last frame is in the socket.
    fn settle(&self) {
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
            ended.ending.into_iter().for_each(|ending| ending.write(&self.worker));
        }
    }

    /// The connection is over: what was not written will not be.
    fn abandon(&self) {
        self.settle();
        for stream in self.streams.take() {
            if let Some(ending) = stream.ending {
                ending.cut(self.how_cut()).write(&self.worker);
            }
        }
    }
}

/// What a connection waits for no longer than for a while.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// Nothing.
    None,
    /// Its first request; a drain has begun.
    Fresh,
    /// Its next request.
    Idle,
    /// The client has to take a byte; so many it has taken.
    Blocked(u64),
    /// The last frames have to be written.
    Close,
}

/// A connection's own task.
struct Session<'a> {
    connection: Rc<Connection>,
    place: &'a Place,
    h2: server::Connection<Transport, Bytes>,
    began: Instant,
    /// A stream has been accepted.
    used: bool,
    /// The client was told to go.
    told: bool,
    /// It closes once the last frames are written.
    closing: bool,
    wait: Wait,
}

impl<'a> Session<'a> {
    fn new(connection: Rc<Connection>, place: &'a Place, h2: server::Connection<Transport, Bytes>) -> Self {
        place.set_deadline(0);
        Self {
            connection,
            place,
            h2,
            began: Instant::now(),
            used: false,
            told: false,
            closing: false,
            wait: Wait::None,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Close> {
        self.mind_the_drain();
        loop {
            if let Poll::Ready(close) = self.poll_streams(cx) {
                return Poll::Ready(close);
            }
            let drained = self.connection.wire.poll_drain(cx);
            self.connection.settle();
            // What was unread a moment ago may have been nothing.
            let before = (self.told, self.closing);
            self.mind_the_drain();
            if before != (self.told, self.closing) {
                continue;
            }
            match drained {
                Poll::Ready(Err(_)) => return Poll::Ready(Close::Gone),
                _ if self.connection.wire.excess() && !self.closing => self.close(Reason::ENHANCE_YOUR_CALM),
                _ => match self.mind_the_time(drained.is_pending()) {
                    // Its GOAWAY is still to be written.
                    Poll::Ready(None) => self.close(Reason::NO_ERROR),
                    Poll::Ready(Some(close)) => return Poll::Ready(close),
                    Poll::Pending => return Poll::Pending,
                },
            }
        }
    }

    fn poll_streams(&mut self, cx: &mut Context<'_>) -> Poll<Close> {
        loop {
            match self.h2.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    self.used = true;
                    let id = respond.stream_id().as_u32();
                    self.connection.begun(id);
                    spawn_local(request::serve(self.connection.clone(), id, request, respond));
                }
                Poll::Ready(Some(Err(error))) if error.is_io() => return Poll::Ready(Close::Gone),
                Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(Close::Linger),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn nothing_runs(&self) -> bool {
        self.connection.streams.borrow().is_empty()
    }

    /// Told at once, a client would come again and again without ever asking for anything.
    fn is_fresh(&self) -> bool {
        !self.used && self.began.elapsed() < FRESH && !self.connection.worker.plane.forced()
    }

    /// Tells the client to go, and closes once nothing runs and nothing is to come.
    fn mind_the_drain(&mut self) {
        let plane = &self.connection.worker.plane;
        if self.closing || plane.phase() == Phase::Serving || self.is_fresh() {
            return;
        }
        if !self.told {
            self.told = true;
            self.h2.graceful_shutdown();
        }
        if plane.closing_idle() && self.nothing_runs() && !self.connection.wire.has_unread() {
            self.close(Reason::NO_ERROR);
        }
    }

    /// Sends the final GOAWAY; the connection ends when it is written.
    fn close(&mut self, reason: Reason) {
        self.closing = true;
        self.h2.abrupt_shutdown(reason);
    }

    /// Bounds what the connection waits for. `None`: it has been idle for long enough.
    fn mind_the_time(&mut self, blocked: bool) -> Poll<Option<Close>> {
        let plane = &self.connection.worker.plane;
        let limits = &plane.settings.limits;
        let (wait, time) = if self.closing || plane.forced() {
            (Wait::Close, LAST_WORD)
        } else if blocked || self.connection.is_stuck() {
            (Wait::Blocked(self.connection.wire.written()), limits.body_timeout)
        } else if !self.nothing_runs() {
            (Wait::None, Duration::ZERO)
        } else if plane.phase() != Phase::Serving && self.is_fresh() {
            (Wait::Fresh, FRESH)
        } else {
            (Wait::Idle, limits.idle_timeout)
        };
        if wait != self.wait {
            self.wait = wait;
            let deadline = if wait == Wait::None { 0 } else { self.connection.worker.deadline(time) };
            self.place.set_deadline(deadline);
        } else if self.place.expired() {
            match wait {
                Wait::None => {}
                // The sweeper's clock is coarse: it may have woken us a little early.
                Wait::Fresh => self.place.set_deadline(self.connection.worker.deadline(time)),
                Wait::Idle => return Poll::Ready(None),
                Wait::Blocked(_) | Wait::Close => return Poll::Ready(Some(Close::Reset)),
            }
        }
        Poll::Pending
    }
}
