//! One request in flight: what all of its steps share.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::io::AsyncWrite;

use super::failure::{Failure, Lost};
pub use super::flow::{After, Flow, Upload, send};
use super::long_poll::LongPoll;
use crate::drain::gate::Streaming;
use crate::drain::ledger::LedgerEntry;
use crate::drain::machine::Phase;
use crate::metrics::add;
use crate::proxy::buffer::{self, Buffer};
use crate::proxy::captured::Speaks;
use crate::proxy::http1::head::{Framing, Origin, Request, Response, ResponsePlan, Site, Upgrade};
use crate::proxy::http2::typed::TypedHead;
use crate::proxy::route::Route;
use crate::proxy::shared::Shared;
use crate::proxy::stream::{Channel, Sink, Source};
use crate::proxy::worker::Worker;
use crate::tls::stream::ONE_RECORD;
use crate::upstream::{self, Backend, Lease};

/// The client's side of a connection.
pub struct Client<R, W> {
    /// Reads from the client.
    pub reader: R,
    /// Writes to the client.
    pub writer: W,
    /// Bytes read and not yet used.
    pub buf: Buffer,
    /// The peer's address as text.
    pub peer: String,
    /// The channel the client came in by, as reported to the app.
    pub channel: Channel,
}

/// A request's head for the app, in the form of the app's protocol.
pub enum AppHead {
    /// Text.
    Http1(Vec<u8>),
    /// Fields.
    Http2(Box<TypedHead>),
}

impl AppHead {
    /// An empty head for an app that gets this request over HTTP/2, or not.
    pub fn new(http2: bool) -> Self {
        if http2 { Self::Http2(Box::default()) } else { Self::Http1(Vec::with_capacity(buffer::SIZE)) }
    }
}

/// One request in flight.
pub struct Exchange<'a> {
    /// The thread that serves the request.
    pub worker: &'a Worker,
    /// Where the client's connection leads.
    pub route: &'a Route,
    /// The request goes to the app over HTTP/2.
    pub http2: bool,
    /// The connection's place in the ledger.
    pub entry: &'a LedgerEntry,
    /// The parsed head of the request.
    pub request: &'a Request,
    /// Set if the request is a long poll.
    pub long_poll: Option<LongPoll>,
    /// The progress of the request.
    pub flow: Flow,
}

impl Exchange<'_> {
    /// Runs `work` until it ends, the ledger entry's deadline passes or the drain forces the end.
    pub async fn bounded<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let mut work = pin!(work);
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(ended) => Poll::Ready(ended),
            Poll::Pending if self.is_over() => Poll::Ready(Err(Failure::Forced)),
            Poll::Pending if self.entry.expired() => Poll::Ready(Err(match self.flow.client_waits() {
                true => Failure::AppSlow,
                false => Failure::TimedOut,
            })),
            Poll::Pending => Poll::Pending,
        })
        .await
    }

    /// Counts the request as a stream, which a hold may leave running, until the result is dropped. `None` for a
    /// health check.
    pub fn streaming(&self) -> Option<Streaming<'_>> {
        (!self.request.health_check).then(|| self.worker.shared.gate.stream())
    }

    /// Whether a new request is served.
    ///
    /// # Errors
    /// If the drain has cut everything, or too many requests are in flight.
    pub fn may_begin(&self) -> Result<(), Failure> {
        let shared = &self.worker.shared;
        match (shared.forced(), !self.request.health_check && shared.past_in_flight()) {
            (true, _) => Err(Failure::Forced),
            (false, true) => Err(Failure::TooManyInFlight),
            (false, false) => Ok(()),
        }
    }

    /// Whether the drain has cut everything; for a health check, whether idle connections have to close: it is not
    /// worth waiting for.
    fn is_over(&self) -> bool {
        let shared = &self.worker.shared;
        shared.forced() || (self.request.health_check && shared.closing_idle())
    }

    /// Runs `work`, during which nothing reads from the client, and aborts it when the client disconnects: a request
    /// that its client has abandoned must not reach the app.
    pub async fn while_watched<R, W, T>(
        &self,
        client: &mut Client<R, W>,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure>
    where
        R: Source,
    {
        let Client { reader, buf, .. } = client;
        let (mut work, mut ended) = (pin!(work), false);
        poll_fn(|cx| {
            if let Poll::Ready(done) = work.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
            while !ended && buf.unread().len() < buffer::SIZE {
                match buf.poll_fill(cx, reader) {
                    Poll::Ready(Ok(0)) => {
                        ended = true;
                        if let Err(gone) = self.nudge(reader) {
                            return Poll::Ready(Err(gone));
                        }
                    }
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(Failure::ClientGone)),
                    Poll::Pending => break,
                }
            }
            match ended && reader.has_failed() {
                true => Poll::Ready(Err(Failure::ClientGone)),
                false => Poll::Pending,
            }
        })
        .await
    }

    /// [`Source::nudge`], while an interim response may still be sent.
    ///
    /// # Errors
    /// If the client has disconnected.
    pub fn nudge(&self, client: &impl Source) -> Result<(), Failure> {
        let flow = &self.flow;
        let may = self.request.http11 && !flow.is_answering() && !flow.is_writing();
        if may && !client.nudge() { Err(Failure::ClientGone) } else { Ok(()) }
    }

    /// Returns how this request's client reaches the app; `request` is its head by HTTP/2.
    pub fn site<'s>(&self, request: &'s http::Request<()>, backend: &'s Backend) -> Site<'s> {
        let Origin { https, host } = &self.request.origin;
        let host = request.uri().authority().filter(|_| !host.is_empty());
        Site {
            https: *https,
            host: host.map_or(b"", |host| host.as_str().as_bytes()),
            app: backend.loopback(),
        }
    }

    /// [`held_back`], with a head of `head` bytes.
    pub async fn held_back(&self, head: usize) -> Result<(), Failure> {
        if self.request.health_check {
            return Ok(());
        }
        // The part of the body that arrives meanwhile fills one buffer.
        held_back(&self.worker.shared, self.entry, head + buffer::SIZE).await
    }

    /// [`reach`] for the app.
    pub async fn reach<T>(&self, connect: impl AsyncFn() -> io::Result<T>) -> Result<T, Failure> {
        reach(self.worker, connect).await
    }

    /// [`reach`] for a stream on an HTTP/2 connection that may be shared.
    pub async fn lease(&self) -> Result<Lease, Failure> {
        let lease = self.reach(async || self.route.pool.lease().await).await?;
        add(&self.worker.shard.connects, u64::from(lease.is_first()));
        Ok(lease)
    }

    /// The app's response begins to go to the client. `events` if it is an event stream that the client can reopen.
    pub fn answers(&self, status: u16, events: bool) {
        self.flow.answers(status, events);
        if let Some(port) = &self.route.captured {
            port.learn(Speaks::Http);
        }
    }

    /// Writes the request's head and the part of its body that came with it.
    pub async fn send(&self, app: &mut (impl AsyncWrite + Unpin), head: &[u8]) -> Result<(), Failure> {
        self.flow.send(app, head, ONE_RECORD).await.map_err(|_| Failure::AppGone(Lost::Reset))
    }

    /// Reads more of the request's body. A client that is still accepting bytes of a response from the socket's queue
    /// does not count as silent.
    pub async fn read<R: Source>(&self, reader: &mut R, buf: &mut Buffer) -> io::Result<usize> {
        let mut queued = None;
        self.waits_for_body(true);
        let read = poll_fn(|cx| {
            let read = buf.poll_fill(cx, reader);
            if read.is_pending() && self.entry.expired() {
                let now = reader.unacknowledged();
                if now > 0 && !self.flow.is_writing() && queued.replace(now) != Some(now) {
                    self.waits_for_body(true);
                }
            }
            read
        })
        .await;
        // From here on the app is the one taking time.
        self.waits_for_body(false);
        read
    }

    /// [`Sink::begin`] for the app's response.
    pub fn begin<W: Sink>(
        &self,
        writer: &mut W,
        head: W::Head,
        response: &Response,
    ) -> Result<Vec<u8>, Failure> {
        writer.begin(head, response.framing).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => {
                Failure::AppBroken("the head of the app's answer can't be expressed in HTTP/2")
            }
            _ => Failure::ClientGone,
        })
    }

    /// Writes to the client, which must accept a byte within `--body-timeout` unless the other direction moves.
    pub async fn write<W>(&self, writer: &mut W, bytes: &[u8]) -> Result<(), Failure>
    where
        W: Sink,
    {
        let (mut left, mut queued) = (bytes, None);
        self.waits_for_room(true);
        poll_fn(|cx| {
            while !left.is_empty() {
                match Pin::new(&mut *writer).poll_write(cx, left) {
                    Poll::Ready(Ok(n)) if n > 0 => left = &left[n..],
                    Poll::Ready(_) => return Poll::Ready(Err(Failure::ClientGone)),
                    Poll::Pending => {
                        // The kernel reports the socket as writable only once a third of its queue is free; the
                        // client may be reading meanwhile.
                        let now = writer.unacknowledged();
                        if queued.replace(now) != Some(now) {
                            self.waits_for_room(true);
                        }
                        return Poll::Pending;
                    }
                }
            }
            Poll::Ready(Ok(()))
        })
        .await?;
        self.flow.wrote(bytes.len());
        self.waits_for_room(false);
        Ok(())
    }

    /// Decides the client's side of this response.
    pub fn plan(&self, response: &Response, backend: &Backend) -> ResponsePlan {
        let (request, flow) = (self.request, &self.flow);
        // A shared connection announces its end with GOAWAY (RFC 9113 §6.8).
        match response {
            _ if self.http2 || response.status < 200 => {}
            Response { says_close: true, .. } => backend.habit.closes(),
            Response { keep_alive: true, .. } => backend.habit.keeps(),
            _ => {}
        }
        let app_goes = (response.says_close || self.http2) && backend.habit.is_going();
        let endless = !request.http11 && matches!(response.framing, Framing::Chunked | Framing::UntilClose);
        let close = !request.keep_alive
            || endless
            || app_goes
            || match flow.upload() {
                Upload::Sending | Upload::HalfClosed => true,
                Upload::Done => self.worker.shared.phase() != Phase::Serving,
                Upload::Pipelined => false,
            };
        flow.then(match close {
            _ if app_goes => After::AppGoes,
            true => After::Closes,
            false => After::Stays,
        });
        ResponsePlan {
            http11: request.http11,
            head_only: request.head_only,
            upgrade: request.upgrade != Upgrade::None,
            close,
        }
    }

    /// Sets whether the client owes bytes of its request. Called after something moved, so the time limit starts again
    /// for both directions: the client is silent only if nothing moves at all.
    pub fn waits_for_body(&self, waits: bool) {
        self.flow.waits_for_body(waits);
        self.start_limit();
    }

    /// The same for room for bytes of the response.
    pub fn waits_for_room(&self, waits: bool) {
        self.flow.waits_for_room(waits);
        self.start_limit();
    }

    /// The complete response was sent before the complete request was received.
    pub fn answered_early(&self) {
        self.flow.answered_early();
        self.start_limit();
    }

    fn start_limit(&self) {
        let limit = self.flow.silence_limit(&self.worker.shared.settings.limits);
        self.entry.set_deadline(if limit.is_zero() { 0 } else { self.worker.deadline(limit) });
    }
}

/// Waits while the app restarts or is replaced, with `bytes` bytes held in memory. Requests that come from the app
/// itself are not held: running work may depend on them.
pub async fn held_back(shared: &Shared, entry: &LedgerEntry, bytes: usize) -> Result<(), Failure> {
    if !shared.gate.holding() || shared.upstream.is_app(entry.peer.ip()) {
        return Ok(());
    }
    let limits = &shared.settings.limits;
    let _held = shared.gate.hold_back(limits.max_held).ok_or(Failure::HeldTooMany)?;
    let turn = shared.hold_queue.wait(&shared.gate, bytes, limits.max_held_bytes);
    match tokio::time::timeout(shared.hold_most(), turn).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure::HeldTooMany),
        Err(_) => Err(Failure::HeldTooLong),
    }
}

/// Connects with `connect`, and retries for up to `--upstream-wait` while the connection is refused. Nothing has been
/// sent, so waiting is safe; once the pod is terminating it is useless.
pub async fn reach<T>(worker: &Worker, connect: impl AsyncFn() -> io::Result<T>) -> Result<T, Failure> {
    let settings = &worker.shared.settings;
    let (since, mut wait) = (Instant::now(), Duration::from_millis(5));
    loop {
        match connect().await {
            Ok(app) => return Ok(app),
            Err(error) if upstream::is_full(&error) && since.elapsed() < settings.upstream_wait => {
                tokio::time::sleep(wait).await;
            }
            Err(error) if upstream::lacks_files(&error) => return Err(Failure::NoMoreFiles),
            Err(error) if upstream::is_lost(&error) && since.elapsed() < settings.upstream_wait => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(Failure::AppBroken("the app does not speak HTTP/2"));
            }
            Err(error) if !upstream::is_down(&error) => return Err(Failure::AppUnreachable),
            Err(_) if worker.shared.booting() => tokio::time::sleep(wait).await,
            Err(_) if worker.shared.phase() != Phase::Serving => return Err(Failure::AppDown),
            Err(_) if since.elapsed() + wait > settings.upstream_wait => return Err(Failure::AppDown),
            Err(_) => tokio::time::sleep(wait).await,
        }
        wait = (wait * 2).min(Duration::from_millis(100));
    }
}
