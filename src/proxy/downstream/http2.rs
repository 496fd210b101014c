//! One HTTP/2 connection from a client (RFC 9113): one task runs it, and one task runs each stream, which is a
//! request like any other.
//!
//! The `h2` crate implements the protocol. A drain announces the end to a client by GOAWAY: first with the highest
//! stream number (2^31-1), so that requests on their way are still served, then, once the client has answered a ping,
//! with the number of the last stream.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use ::h2::Reason;
use ::h2::server::{self, Builder};
use bytes::Bytes;
use tokio::task::spawn_local;

use super::stream;
use super::streams::Http2Connection;
use crate::drain::ledger::LedgerEntry;
use crate::drain::machine::Phase;
use crate::proxy::connection::{Http2, Next};
use crate::proxy::http2::adapter;
use crate::proxy::http2::wire::{Transport, Wire};
use crate::proxy::request::failure::LAST_WRITE_TIMEOUT;
use crate::proxy::shared::{CROWDED_DIVISOR, FIRST_REQUEST_TIMEOUT};
use crate::proxy::socket::keep_alive;
use crate::proxy::worker::Worker;

/// Flow-control window per stream, in bytes: 20 MB/s at a round trip of 12 ms, as long as the app keeps up.
const STREAM_WINDOW: u32 = 256 * 1024;
/// Flow-control window per connection, in bytes: the other streams make progress until eight uploads are stuck.
const CONNECTION_WINDOW: u32 = 8 * STREAM_WINDOW;

/// How a connection closes.
enum Http2Close {
    /// The peer has already closed it.
    Gone,
    /// Http2Close our side first, then wait for the peer's.
    Linger,
    /// Reset it.
    Reset,
}

/// Serves an HTTP/2 connection until it closes. Returns what follows.
pub async fn serve(http2: Http2, worker: &Rc<Worker>) -> Next {
    let Http2 { stream, read, entry, connected, route } = http2;
    // A call may be silent for hours; without keep-alive probes a vanished client would hold it, and a drain.
    keep_alive(stream.tcp());
    let channel = stream.channel();
    let wire = Rc::new(Wire::new(stream, read, worker.clone()));
    let connection = Rc::new(Http2Connection::new(wire.clone(), entry.peer, channel, route, worker.clone()));
    let close = run(&connection, &entry).await;
    connection.abandon();
    match (wire.take(), close) {
        (Some(stream), Http2Close::Linger) => return Next::Close(stream, connected),
        (Some(stream), Http2Close::Reset) => stream.reset_on_close(),
        _ => {}
    }
    Next::Closed
}

async fn run(connection: &Rc<Http2Connection>, entry: &LedgerEntry) -> Http2Close {
    let limits = &connection.worker.shared.settings.limits;
    let mut builder = Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(limits.max_streams)
        .max_header_list_size(u32::try_from(limits.max_head).unwrap_or(u32::MAX))
        .max_send_buffer_size(adapter::MAX_QUEUED);
    let mut handshake = pin!(builder.handshake(Transport(connection.wire.clone())));
    let began = Instant::now();
    entry.set_deadline(connection.worker.deadline(limits.head_timeout));
    let shaken = poll_fn(|cx| {
        entry.register(cx);
        if let Poll::Ready(shaken) = handshake.as_mut().poll(cx) {
            return Poll::Ready(shaken.map_err(|_| Http2Close::Linger));
        }
        if let Poll::Ready(Err(_)) = connection.wire.poll_drain(cx) {
            return Poll::Ready(Err(Http2Close::Gone));
        }
        let (shared, age) = (&connection.worker.shared, began.elapsed());
        let idle = shared.closing_idle() && age >= FIRST_REQUEST_TIMEOUT && !connection.wire.has_unread();
        if idle || shared.forced() || age >= limits.head_timeout {
            return Poll::Ready(Err(Http2Close::Linger));
        }
        if shared.closing_idle() || entry.expired() {
            entry.set_deadline(connection.worker.deadline(FIRST_REQUEST_TIMEOUT));
        }
        Poll::Pending
    });
    match shaken.await {
        Ok(h2) => {
            let mut session = Http2Session::new(connection.clone(), entry, h2);
            poll_fn(|cx| session.poll(cx)).await
        }
        Err(close) => close,
    }
}

/// The bounded wait that a connection is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// None: streams are running.
    None,
    /// For its first request, after a drain has begun.
    Fresh,
    /// For its next request.
    Idle,
    /// For the client to accept a byte; holds the bytes moved so far in either direction.
    Blocked(u64),
    /// For the last frames to be written.
    Close,
}

/// The task of a connection.
struct Http2Session<'a> {
    connection: Rc<Http2Connection>,
    entry: &'a LedgerEntry,
    h2: server::Connection<Transport, Bytes>,
    began: Instant,
    /// A stream has been accepted.
    used: bool,
    /// GOAWAY was sent to the client.
    goaway_sent: bool,
    /// The connection closes once the last frames are written.
    closing: bool,
    wait: Wait,
    /// When the current wait began.
    waits_since: Instant,
    /// The bytes not acknowledged by the client at the last check.
    unacknowledged: u32,
}

impl<'a> Http2Session<'a> {
    fn new(
        connection: Rc<Http2Connection>,
        entry: &'a LedgerEntry,
        h2: server::Connection<Transport, Bytes>,
    ) -> Self {
        entry.set_deadline(0);
        Self {
            connection,
            entry,
            h2,
            began: Instant::now(),
            used: false,
            goaway_sent: false,
            closing: false,
            wait: Wait::None,
            waits_since: Instant::now(),
            unacknowledged: 0,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Http2Close> {
        self.follow_drain();
        loop {
            if let Poll::Ready(close) = self.poll_streams(cx) {
                return Poll::Ready(close);
            }
            let drained = self.connection.wire.poll_drain(cx);
            self.connection.settle();
            // What was unread a moment ago may have been no request.
            let before = (self.goaway_sent, self.closing);
            self.follow_drain();
            if before != (self.goaway_sent, self.closing) {
                continue;
            }
            match drained {
                Poll::Ready(Err(_)) => return Poll::Ready(Http2Close::Gone),
                _ if self.connection.wire.excess() && !self.closing => self.close(Reason::ENHANCE_YOUR_CALM),
                _ => match self.enforce_timeout(drained.is_pending()) {
                    // Its GOAWAY is still to be written.
                    Poll::Ready(None) => self.close(Reason::NO_ERROR),
                    Poll::Ready(Some(close)) => return Poll::Ready(close),
                    Poll::Pending => return Poll::Pending,
                },
            }
        }
    }

    fn poll_streams(&mut self, cx: &mut Context<'_>) -> Poll<Http2Close> {
        loop {
            match self.h2.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    self.used = true;
                    let id = respond.stream_id().as_u32();
                    self.connection.begun(id);
                    spawn_local(stream::serve(self.connection.clone(), id, request, respond));
                }
                Poll::Ready(Some(Err(error))) if error.is_io() => return Poll::Ready(Http2Close::Gone),
                Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(Http2Close::Linger),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn nothing_runs(&self) -> bool {
        self.connection.is_idle()
    }

    /// Whether the connection is too young for GOAWAY: a client that gets it at once would reconnect again and again
    /// without ever sending a request.
    fn is_fresh(&self) -> bool {
        !self.used && self.began.elapsed() < FIRST_REQUEST_TIMEOUT && !self.connection.worker.shared.forced()
    }

    /// Announces the end to the client during a drain, and closes once nothing runs and nothing is expected.
    fn follow_drain(&mut self) {
        let shared = &self.connection.worker.shared;
        let stays = shared.phase() == Phase::Serving && !self.connection.app_goes.get();
        if self.closing || stays || self.is_fresh() {
            return;
        }
        if !self.goaway_sent {
            self.goaway_sent = true;
            self.h2.graceful_shutdown();
        }
        if shared.closing_idle() && self.nothing_runs() && !self.connection.wire.has_unread() {
            self.close(Reason::NO_ERROR);
        }
    }

    /// Sends the final GOAWAY; the connection ends when it is written.
    fn close(&mut self, reason: Reason) {
        self.closing = true;
        self.h2.abrupt_shutdown(reason);
    }

    /// Whether the client has accepted bytes since the last check. The kernel reports the socket as writable only
    /// once a third of its queue is free.
    fn client_takes(&mut self) -> bool {
        let now = self.connection.wire.unacknowledged();
        std::mem::replace(&mut self.unacknowledged, now) != now
    }

    /// Enforces the time limit of the current wait. `Ready(None)` if the connection has been idle for too long.
    fn enforce_timeout(&mut self, blocked: bool) -> Poll<Option<Http2Close>> {
        let shared = &self.connection.worker.shared;
        let limits = &shared.settings.limits;
        let (wait, time) = if self.closing || shared.forced() {
            (Wait::Close, LAST_WRITE_TIMEOUT)
        } else if blocked || self.connection.is_stuck() {
            (Wait::Blocked(self.connection.wire.moved()), limits.body_timeout)
        } else if !self.nothing_runs() {
            (Wait::None, Duration::ZERO)
        } else if shared.phase() != Phase::Serving && self.is_fresh() {
            (Wait::Fresh, FIRST_REQUEST_TIMEOUT)
        } else {
            // It may have to close early to make room for another connection.
            (Wait::Idle, limits.idle_timeout / CROWDED_DIVISOR)
        };
        if wait != self.wait {
            (self.wait, self.waits_since) = (wait, Instant::now());
            if let Wait::Blocked(_) = wait {
                self.client_takes();
            }
            let deadline = if wait == Wait::None { 0 } else { self.connection.worker.deadline(time) };
            self.entry.set_deadline(deadline);
        } else if self.entry.expired() {
            match wait {
                Wait::None => {}
                // The sweeper's clock is coarse and may wake this task slightly early.
                Wait::Fresh => self.entry.set_deadline(self.connection.worker.deadline(time)),
                Wait::Idle if self.waits_since.elapsed() < shared.idle_timeout() => {
                    let left = shared.idle_timeout().saturating_sub(self.waits_since.elapsed());
                    self.entry.set_deadline(self.connection.worker.deadline(left.min(time)));
                }
                Wait::Idle => return Poll::Ready(None),
                Wait::Blocked(_) if self.client_takes() => {
                    self.entry.set_deadline(self.connection.worker.deadline(time));
                }
                Wait::Blocked(_) | Wait::Close => return Poll::Ready(Some(Http2Close::Reset)),
            }
        }
        Poll::Pending
    }
}
