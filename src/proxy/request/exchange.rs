//! One request on its way: how far it has come, and what all of its steps need.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::failure::{Failure, Progress};
use super::long_poll::LongPoll;
use crate::config::UpstreamProtocol;
use crate::drain::gate::Streaming;
use crate::drain::ledger::LedgerEntry;
use crate::drain::machine::Phase;
use crate::metrics::add;
use crate::proxy::buffer::{self, Buffer};
use crate::proxy::http1::head::{Answer, Framing, Request, Response, Upgrade};
use crate::proxy::request_log::Totals;
use crate::proxy::shared::Shared;
use crate::proxy::stream::{Channel, Sink, Source};
use crate::proxy::worker::Worker;
use crate::tls::stream::ONE_RECORD;
use crate::upstream::{self, Backend, Lease};

/// After an early answer nobody may be silent for longer than this: neither the client, which was told that the connection
/// closes, nor the app, which may want no more of the request.
const EARLY: Duration = Duration::from_secs(5);

/// The client's side of a connection.
pub struct Client<R, W> {
    /// Reads from the client.
    pub reader: R,
    /// Writes to the client.
    pub writer: W,
    /// Read and not yet used.
    pub buf: Buffer,
    /// The peer's address as text.
    pub peer: String,
    /// What the app is told of the connection.
    pub channel: Channel,
}

/// One request on its way.
pub struct Exchange<'a> {
    /// The thread that serves it.
    pub worker: &'a Worker,
    /// The connection's place in the ledger.
    pub entry: &'a LedgerEntry,
    /// What it says.
    pub request: &'a Request,
    /// It waits for news.
    pub long_poll: Option<LongPoll>,
    /// How far it has come.
    pub flow: Flow,
}

/// How far a request has come. Cells, since both directions write to it side by side.
#[derive(Debug, Default)]
pub struct Flow {
    /// For the answer to a failure.
    pub progress: Cell<Progress>,
    /// The answer's status, once it is known.
    pub status: Cell<u16>,
    /// The client was told that its connection closes.
    pub close: Cell<bool>,
    /// Bytes of the request's body.
    pub received: Cell<u64>,
    /// Bytes written to the client.
    pub sent: Cell<u64>,
    /// The request's last byte was passed on.
    pub uploaded: Cell<bool>,
    /// What was passed on is still there to be sent once more.
    pub replayable: Cell<bool>,
    /// The client's next request is here already.
    pub pipelined: Cell<bool>,
    /// The client has ended its side.
    pub half_closed: Cell<bool>,
    /// The answer is an event stream that the client can reopen.
    pub events: Cell<bool>,
    /// The app's connection was reset before it had answered.
    pub reset: Cell<bool>,
    /// The client's bytes are waited for.
    pub reading: Cell<bool>,
    /// The client is waited for to take bytes.
    pub writing: Cell<bool>,
    /// The app has begun to close its connections.
    pub app_goes: Cell<bool>,
    /// The answer is whole and the request is not.
    early: Cell<bool>,
}

impl Exchange<'_> {
    /// Runs `work` until it ends, a deadline of the ledger passes or the drain forces the end.
    pub async fn bounded<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let mut work = pin!(work);
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(ended) => Poll::Ready(ended),
            Poll::Pending if self.is_over() => Poll::Ready(Err(Failure::Forced)),
            Poll::Pending if self.entry.expired() => Poll::Ready(Err(match self.client_waits() {
                true => Failure::AppSlow,
                false => Failure::TimedOut,
            })),
            Poll::Pending => Poll::Pending,
        })
        .await
    }

    /// Counts the request as a stream, which a hold may let stay, until this is dropped. A health check is none.
    pub fn streaming(&self) -> Option<Streaming<'_>> {
        (!self.request.health_check).then(|| self.worker.shared.gate.stream())
    }

    /// Whether a request that has just come is served at all.
    pub fn may_begin(&self) -> Result<(), Failure> {
        let shared = &self.worker.shared;
        match (shared.forced(), !self.request.health_check && shared.past_in_flight()) {
            (true, _) => Err(Failure::Forced),
            (false, true) => Err(Failure::TooManyInFlight),
            (false, false) => Ok(()),
        }
    }

    /// The deadline has passed; a health check isn't worth waiting for even before.
    fn is_over(&self) -> bool {
        let shared = &self.worker.shared;
        shared.forced() || (self.request.health_check && shared.closing_idle())
    }

    /// Runs `work`, in which nobody reads from the client, and ends it when the client has gone: what nobody waits
    /// for any more must not be sent to the app.
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

    /// [`Source::nudge`], where an interim answer may still be sent.
    ///
    /// # Errors
    /// When the client has gone.
    pub fn nudge(&self, client: &impl Source) -> Result<(), Failure> {
        let flow = &self.flow;
        let may = self.request.http11 && flow.progress.get() < Progress::Answering && !flow.writing.get();
        if may && !client.nudge() { Err(Failure::ClientGone) } else { Ok(()) }
    }

    /// Whether everything goes to the app over HTTP/2.
    pub fn http2(&self) -> bool {
        self.worker.shared.settings.upstream_protocol == UpstreamProtocol::Http2
    }

    /// [`held_back`], with a head of so many bytes.
    pub async fn held_back(&self, head: usize) -> Result<(), Failure> {
        if self.request.health_check {
            return Ok(());
        }
        // What comes of its body meanwhile fills one buffer.
        held_back(&self.worker.shared, self.entry, head + buffer::SIZE).await
    }

    /// [`reach`] for the app.
    pub async fn reach<T>(&self, connect: impl AsyncFn() -> io::Result<T>) -> Result<T, Failure> {
        reach(self.worker, connect).await
    }

    /// The same for a stream on a connection that others may share.
    pub async fn lease(&self) -> Result<Lease, Failure> {
        let lease = self.reach(async || self.worker.pool.lease().await).await?;
        add(&self.worker.shard.connects, u64::from(lease.is_first()));
        Ok(lease)
    }

    /// Writes the request's head, and what of its body came with it.
    pub async fn send(&self, app: &mut (impl AsyncWrite + Unpin), head: &[u8]) -> Result<(), Failure> {
        // HTTP/2 makes frames of it, and needs the head in one piece.
        let first = if self.http2() { head.len() } else { ONE_RECORD };
        send(app, head, first, &self.flow.progress).await.map_err(|_| {
            self.flow.reset.set(true);
            Failure::AppGone { unanswered: true }
        })
    }

    /// Reads more of the request's body. While the client takes bytes of an answer that the socket still holds, it is not
    /// silent.
    pub async fn read<R: Source>(&self, reader: &mut R, buf: &mut Buffer) -> io::Result<usize> {
        let mut queued = None;
        self.client_owes(&self.flow.reading, true);
        let read = poll_fn(|cx| {
            let read = buf.poll_fill(cx, reader);
            if read.is_pending() && self.entry.expired() {
                let now = reader.unacknowledged();
                if now > 0 && !self.flow.writing.get() && queued.replace(now) != Some(now) {
                    self.client_owes(&self.flow.reading, true);
                }
            }
            read
        })
        .await;
        // From here on it is the app that takes its time.
        self.client_owes(&self.flow.reading, false);
        read
    }

    /// Writes to the client, which has to take a byte within `--body-timeout`, unless something moves the other way.
    pub async fn write<W>(&self, writer: &mut W, bytes: &[u8]) -> Result<(), Failure>
    where
        W: Sink,
    {
        let (mut left, mut queued) = (bytes, None);
        self.client_owes(&self.flow.writing, true);
        poll_fn(|cx| {
            while !left.is_empty() {
                match Pin::new(&mut *writer).poll_write(cx, left) {
                    Poll::Ready(Ok(n)) if n > 0 => left = &left[n..],
                    Poll::Ready(_) => return Poll::Ready(Err(Failure::ClientGone)),
                    Poll::Pending => {
                        // The kernel takes more only once a third of its queue is free; the client may be reading.
                        let now = writer.unacknowledged();
                        if queued.replace(now) != Some(now) {
                            self.client_owes(&self.flow.writing, true);
                        }
                        return Poll::Pending;
                    }
                }
            }
            Poll::Ready(Ok(()))
        })
        .await?;
        self.flow.sent.set(self.flow.sent.get() + bytes.len() as u64);
        self.client_owes(&self.flow.writing, false);
        Ok(())
    }

    /// What the client's side of this answer is to be.
    pub fn plan(&self, response: &Response, backend: &Backend) -> Answer {
        let (request, flow) = (self.request, &self.flow);
        // A shared connection says it by GOAWAY (RFC 9113 §6.8).
        match response {
            _ if self.http2() || response.status < 200 => {}
            Response { says_close: true, .. } => backend.habit.closes(),
            Response { keep_alive: true, .. } => backend.habit.keeps(),
            _ => {}
        }
        flow.app_goes.set((response.says_close || self.http2()) && backend.habit.is_going());
        let draining = self.worker.shared.phase() != Phase::Serving && !flow.pipelined.get();
        let endless = !request.http11 && matches!(response.framing, Framing::Chunked | Framing::UntilClose);
        let close = !request.keep_alive
            || draining
            || endless
            || flow.app_goes.get()
            || !flow.uploaded.get()
            || flow.half_closed.get();
        flow.close.set(close);
        Answer {
            http11: request.http11,
            head_only: request.head_only,
            upgrade: request.upgrade != Upgrade::None,
            close,
        }
    }

    /// Counts bytes of the request's body.
    pub fn received(&self, n: usize) {
        self.flow.received.set(self.flow.received.get() + n as u64);
    }

    /// The client has, or no longer has, to move a byte in this direction. Something has just moved, so whatever it owes, in
    /// either direction, has `--body-timeout` again: it is silent only if nothing moves at all.
    pub fn client_owes(&self, direction: &Cell<bool>, owes: bool) {
        direction.set(owes);
        let limits = &self.worker.shared.settings.limits;
        let patience = match (self.client_waits(), self.flow.early.get()) {
            (_, true) => limits.body_timeout.min(EARLY),
            (false, false) => limits.body_timeout,
            // It is the app's turn to take the request and to begin its answer. Without a bound of its own it may take the
            // time it wants, as with its answer: what bounds it is the drain.
            (true, false) if self.flow.progress.get() == Progress::Answering => Duration::ZERO,
            (true, false) => limits.answer_timeout,
        };
        self.entry.set_deadline(if patience.is_zero() { 0 } else { self.worker.deadline(patience) });
    }

    /// The client has nothing to do but wait.
    fn client_waits(&self) -> bool {
        !self.flow.reading.get() && !self.flow.writing.get()
    }

    /// The whole answer has gone out before the whole request came in.
    pub fn answered_early(&self) {
        self.flow.early.set(true);
        self.client_owes(&self.flow.reading, self.flow.reading.get());
    }
}

/// Writes the start of a request, of which the `first` bytes alone. `progress` tells at any time, also when this is dropped
/// half-way, whether the app may have read something of it: with TLS a write of more than [`ONE_RECORD`] is several, and
/// some of them may be there when it fails.
///
/// # Errors
/// When the app takes no more.
pub async fn send(
    app: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    first: usize,
    progress: &Cell<Progress>,
) -> io::Result<()> {
    let (first, rest) = bytes.split_at(bytes.len().min(first));
    for mut left in [first, rest] {
        while !left.is_empty() {
            match app.write(left).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => left = &left[n..],
            }
            progress.set(progress.get().max(Progress::Sent));
        }
    }
    Ok(())
}

/// Waits while the app restarts or is replaced; `bytes` is what is kept in memory meanwhile. What the app itself asks
/// for goes on: what runs may be waiting for it.
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

/// Connects by `connect`; while nobody listens there, tries again for `--upstream-wait`. Nothing has been sent, so waiting
/// is safe; once the pod goes it is of no use.
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

impl Flow {
    /// The app has ended its connection, in order or by a failed read, before the whole head of its answer; `unanswered`
    /// when before any byte of it.
    pub fn app_ended(&self, ended: &io::Result<usize>, unanswered: bool) -> Failure {
        // TLS without its farewell is an end too, though not an orderly one.
        self.reset.set(matches!(ended, Err(error) if error.kind() != io::ErrorKind::UnexpectedEof));
        Failure::AppGone { unanswered }
    }

    /// For the record.
    pub fn totals(&self) -> Totals {
        Totals { status: self.status.get(), received: self.received.get(), sent: self.sent.get() }
    }
}
