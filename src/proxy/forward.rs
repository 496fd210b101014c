//! One request, from its head to the last byte of its answer, top to bottom.
//!
//! The request's body and the answer move side by side in the connection's own task: nothing is spawned, boxed or
//! locked. Phase changes and passed deadlines reach it by a wake-up of that task ([`crate::drain::ledger`]), so no
//! timer and no channel is armed per request.

use std::cell::Cell;
use std::future::{Future, pending, poll_fn};
use std::hash::{BuildHasher, RandomState};
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::body::{Body, Broken, Events};
use super::buffer::Buffer;
use super::error::{Failure, Progress};
use super::headers::{self, Answer, Framing, Request, Response, Upgrade};
use super::plane::Worker;
use crate::drain::ledger::{Class, Place};
use crate::drain::machine::Phase;
use crate::metrics::{Ended, add};
use crate::upstream::{self, Stream, Writer};

/// A request that was sent is kept for a second try up to this size, in bytes.
const REPLAY: usize = 64 * 1024;
/// Interim (1xx) answers to one request.
const INTERIM: u32 = 64;
/// After an early answer the rest of the request is read for so long without a byte.
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
}

/// One request on its way.
pub struct Exchange<'a> {
    /// The thread that serves it.
    pub worker: &'a Worker,
    /// The connection's place in the ledger.
    pub place: &'a Place,
    /// What it says.
    pub request: &'a Request,
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
    /// Bytes of the body from the client, and of the answer to it.
    pub received: Cell<u64>,
    /// Bytes written to the client.
    pub sent: Cell<u64>,
    /// The request's last byte was passed on.
    uploaded: Cell<bool>,
    /// What was passed on is still there to be sent once more.
    replayable: Cell<bool>,
    /// The client's next request is here already.
    pipelined: Cell<bool>,
    /// The client has ended its side.
    half_closed: Cell<bool>,
    /// The answer is an event stream that the client can reopen.
    events: Cell<bool>,
}

/// How a forwarded request ended.
pub enum Finish {
    /// The answer is whole.
    Answered(Ended),
    /// The connection is a tunnel to the app now; with what the app sent already.
    Upgraded(Stream, Buffer),
}

/// What came of the answer.
enum Answered {
    /// Whole; the app's connection may be used again for so long.
    Whole { ended: Ended, reuse: bool, keep_alive: Option<Duration> },
    /// 101.
    Upgraded,
}

/// Sends the request to the app and the answer to the client. `head` is the request's head for the app; its bytes in
/// the client's buffer have been consumed.
pub async fn forward<R, W>(
    client: &mut Client<R, W>,
    exchange: &Exchange<'_>,
    mut head: Vec<u8>,
) -> Result<Finish, Failure>
where
    R: AsyncRead + AsRef<TcpStream> + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut body = Body::new(exchange.request.framing);
    let here = body.take(client.buf.unread(), |_| ()).map_err(|Broken| Failure::BadBody)?;
    head.extend_from_slice(&client.buf.unread()[..here]);
    client.buf.consume(here);
    exchange.received(here);
    exchange.flow.replayable.set(true);

    exchange.bounded(exchange.held_back()).await?;
    let mut pooled = exchange.worker.pool.take();
    let mut again = false;
    loop {
        let reused = pooled.is_some();
        let mut app = match pooled.take() {
            Some(app) => app,
            None => exchange.bounded(exchange.reach()).await.map_err(|failure| match failure {
                // The first try was sent: nobody may say that the app never had it.
                Failure::AppDown if again => Failure::AppGone { unanswered: true },
                other => other,
            })?,
        };
        let mut app_buf = Buffer::default();
        let attempt = attempt(client, exchange, &mut head, &mut body, &mut app, &mut app_buf);
        match exchange.bounded(attempt).await {
            Ok(Answered::Whole { ended, reuse, keep_alive }) => {
                app_buf.release(&exchange.worker.store);
                if reuse && app_buf.is_empty() {
                    exchange.worker.pool.put(app, keep_alive);
                }
                exchange.worker.store.give(head);
                return Ok(Finish::Answered(ended));
            }
            Ok(Answered::Upgraded) => return Ok(Finish::Upgraded(app, app_buf)),
            // The app closed a kept connection just as it was used again: on a new one the request is safe.
            Err(Failure::AppGone { unanswered: true }) if reused && exchange.may_send_again() => {
                add(&exchange.worker.shard.retries, 1);
                again = exchange.flow.progress.get() > Progress::Unsent;
            }
            Err(failure) => return Err(failure),
        }
    }
}

/// Sends the request over this connection and relays the answer, both side by side.
async fn attempt<R, W>(
    client: &mut Client<R, W>,
    exchange: &Exchange<'_>,
    head: &mut Vec<u8>,
    body: &mut Body,
    app: &mut Stream,
    app_buf: &mut Buffer,
) -> Result<Answered, Failure>
where
    R: AsyncRead + AsRef<TcpStream> + Unpin,
    W: AsyncWrite + Unpin,
{
    let (mut app_reader, mut app_writer) = app.split();
    let flow = &exchange.flow;
    exchange.send(&mut app_writer, head).await?;
    let Client { reader, writer, buf, .. } = client;
    let mut upload = pin!(upload(exchange, reader, buf, body, &mut app_writer, head));
    let mut uploading = true;
    let answered = {
        let mut answer = pin!(answer(exchange, &mut app_reader, app_buf, writer));
        poll_fn(|cx| {
            if uploading && let Poll::Ready(over) = upload.as_mut().poll(cx) {
                over?;
                uploading = false;
            }
            if flow.half_closed.get() && flow.events.get() {
                return Poll::Ready(Err(Failure::ClientGone)); // nobody reads a stream of events half-closed
            }
            answer.as_mut().poll(cx)
        })
        .await?
    };
    if !flow.uploaded.get() && matches!(answered, Answered::Whole { .. }) {
        finish_upload(exchange, writer, upload).await;
    }
    Ok(match answered {
        Answered::Whole { ended, reuse, keep_alive } => {
            Answered::Whole { ended, reuse: reuse && flow.uploaded.get(), keep_alive }
        }
        upgraded => upgraded,
    })
}

/// The app has answered before it had the whole request. It may still want the rest, and closing over unread bytes
/// would reset the connection and take the answer from the client: so both go on, bounded.
async fn finish_upload<W: AsyncWrite + Unpin>(
    exchange: &Exchange<'_>,
    writer: &mut W,
    mut upload: std::pin::Pin<&mut impl Future<Output = Result<(), Failure>>>,
) {
    let _ = writer.shutdown().await;
    exchange.place.set_deadline(exchange.worker.deadline(EARLY));
    poll_fn(|cx| match upload.as_mut().poll(cx) {
        Poll::Pending if !exchange.flow.uploaded.get() && !exchange.place.expired() => Poll::Pending,
        _ => Poll::Ready(()),
    })
    .await;
}

/// The client's side: the rest of the body goes to the app, then the connection is watched for its end.
/// Returns early when the app takes no more.
async fn upload<R: AsyncRead + AsRef<TcpStream> + Unpin>(
    exchange: &Exchange<'_>,
    reader: &mut R,
    buf: &mut Buffer,
    body: &mut Body,
    app: &mut Writer<'_>,
    head: &mut Vec<u8>,
) -> Result<(), Failure> {
    let (flow, store) = (&exchange.flow, &exchange.worker.store);
    while !body.is_done() {
        if buf.is_empty() {
            exchange.wait_for_client();
            match buf.fill(reader, store).await {
                Ok(0) | Err(_) => return Err(Failure::ClientGone),
                Ok(_) => {}
            }
        }
        let filled = buf.unread().len() == buf.capacity();
        let n = body.take(buf.unread(), |_| ()).map_err(|Broken| Failure::BadBody)?;
        exchange.received(n);
        let again = flow.replayable.get() && exchange.request.idempotent && head.len() + n <= REPLAY;
        let sent = if again {
            let mark = head.len();
            head.extend_from_slice(&buf.unread()[..n]);
            buf.consume(n);
            app.write_all(&head[mark..]).await
        } else {
            flow.replayable.set(false);
            let sent = app.write_all(&buf.unread()[..n]).await;
            buf.consume(n);
            sent
        };
        if sent.is_err() {
            return Ok(());
        }
        if filled {
            buf.grow(store);
        }
    }
    flow.uploaded.set(true);
    exchange.wait_for_app();
    flow.pipelined.set(!buf.is_empty());
    if !buf.is_empty() || buf.fill(reader, store).await.map_err(|_| Failure::ClientGone)? > 0 {
        flow.pipelined.set(true);
        return pending().await;
    }
    flow.half_closed.set(true);
    half_closed(exchange, reader.as_ref()).await
}

/// The client has ended its side. Whether it still reads can only be found out by sending it something: a host that
/// has closed answers with a reset. Any HTTP/1.1 client reads over an interim answer (RFC 9110 §15.2).
async fn half_closed(exchange: &Exchange<'_>, client: &TcpStream) -> Result<(), Failure> {
    if exchange.request.http11 && exchange.flow.progress.get() < Progress::Answering {
        let _ = client.try_write(b"HTTP/1.1 100 Continue\r\n\r\n");
    }
    let mut wait = Duration::from_millis(1);
    while wait < Duration::from_secs(5) {
        tokio::time::sleep(wait).await;
        if !matches!(client.take_error(), Ok(None)) {
            return Err(Failure::ClientGone);
        }
        wait *= 3;
    }
    pending().await
}

/// The app's side: interim answers, the head, the body.
async fn answer<A, W>(
    exchange: &Exchange<'_>,
    app: &mut A,
    buf: &mut Buffer,
    writer: &mut W,
) -> Result<Answered, Failure>
where
    A: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (request, flow, store) = (exchange.request, &exchange.flow, &exchange.worker.store);
    let mut out = store.take();
    let mut interim = 0;
    let response = loop {
        let response = answer_head(exchange, app, buf, &mut out).await?;
        buf.consume(response.len);
        if response.status >= 200 || response.status == 101 {
            break response;
        }
        interim += 1;
        if interim > INTERIM {
            return Err(Failure::AppBroken("the app sends interim answers without end"));
        }
        if request.http11 {
            exchange.write(writer, &out).await?;
        }
    };
    flow.status.set(response.status);
    flow.progress.set(Progress::Answering);
    if response.status == 101 {
        exchange.write(writer, &out).await?;
        return Ok(Answered::Upgraded);
    }
    let ended = if response.events
        && request.reopens
        && matches!(response.framing, Framing::Chunked | Framing::UntilClose)
    {
        flow.events.set(true);
        exchange.place.set_class(Class::EventStream);
        relay_events(exchange, app, buf, writer, &mut out, &response).await?
    } else {
        relay(exchange, app, buf, writer, &mut out, &response).await?;
        Ended::Complete
    };
    store.give(out);
    let reuse = response.keep_alive && ended == Ended::Complete;
    Ok(Answered::Whole { ended, reuse, keep_alive: response.keep_alive_timeout })
}

/// Reads until a head is whole. The client's version of it stands in `out` then.
async fn answer_head<A: AsyncRead + Unpin>(
    exchange: &Exchange<'_>,
    app: &mut A,
    buf: &mut Buffer,
    out: &mut Vec<u8>,
) -> Result<Response, Failure> {
    let request = exchange.request;
    let mut looked = 0;
    loop {
        if !buf.is_empty() && (looked == 0 || headers::ends_within(buf.unread(), looked)) {
            out.clear();
            let head =
                headers::response(buf.unread(), request.head_only, out, |response| exchange.plan(response));
            match head {
                Ok(Some(response)) if response.status == 101 && request.upgrade == Upgrade::None => {
                    return Err(Failure::AppBroken(
                        "the app answers 101 to a request that asks for no upgrade",
                    ));
                }
                Ok(Some(response)) => return Ok(response),
                Ok(None) => {}
                Err(reject) => return Err(Failure::AppBroken(reject.why)),
            }
        }
        looked = buf.unread().len();
        if looked >= exchange.worker.plane.settings.limits.head {
            return Err(Failure::AppBroken("the head of the app's answer is too large"));
        }
        match buf.fill(app, &exchange.worker.store).await {
            Ok(0) | Err(_) => return Err(Failure::AppGone { unanswered: looked == 0 }),
            Ok(_) => {}
        }
    }
}

/// How the answer's body goes to the client.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Coding {
    /// Byte for byte.
    AsIs,
    /// The client can't read chunks.
    Plain,
    /// The app's body ends with its connection; the client gets chunks, so that it can tell the end from a cut.
    Chunks,
}

/// Passes a finite body on.
async fn relay<A, W>(
    exchange: &Exchange<'_>,
    app: &mut A,
    buf: &mut Buffer,
    writer: &mut W,
    out: &mut Vec<u8>,
    response: &Response,
) -> Result<(), Failure>
where
    A: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let coding = match (response.framing, exchange.request.http11) {
        (Framing::Chunked, false) => Coding::Plain,
        (Framing::UntilClose, true) => Coding::Chunks,
        _ => Coding::AsIs,
    };
    let mut body = Body::new(response.framing);
    let mut first = true;
    loop {
        let filled = buf.unread().len() == buf.capacity();
        if coding == Coding::AsIs && !first {
            let n = body.take(buf.unread(), |_| ()).map_err(app_broke_its_body)?;
            exchange.write(writer, &buf.unread()[..n]).await?;
            buf.consume(n);
        } else {
            // What has come of the body goes out in one write with the head.
            let n = recode(&mut body, buf.unread(), coding, out).map_err(app_broke_its_body)?;
            buf.consume(n);
            exchange.write(writer, out).await?;
        }
        out.clear();
        if body.is_done() {
            return Ok(());
        }
        if first {
            exchange.place.set_class(Class::Finite);
            first = false;
        } else if filled {
            buf.grow(&exchange.worker.store);
        }
        match buf.fill(app, &exchange.worker.store).await {
            Ok(0) if response.framing == Framing::UntilClose => break,
            Ok(0) | Err(_) => return Err(Failure::AppGone { unanswered: false }),
            Ok(_) => {}
        }
    }
    if coding == Coding::Chunks {
        exchange.write(writer, LAST_CHUNK).await?;
    }
    Ok(())
}

/// Passes an event stream on, chunk by chunk, so that it can end after any event.
async fn relay_events<A, W>(
    exchange: &Exchange<'_>,
    app: &mut A,
    buf: &mut Buffer,
    writer: &mut W,
    out: &mut Vec<u8>,
    response: &Response,
) -> Result<Ended, Failure>
where
    A: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (mut body, mut events, mut content) = (Body::new(response.framing), Events::default(), Vec::new());
    let mut told = false;
    let mut end = pin!(exchange.stream_end());
    let ended = loop {
        content.clear();
        let n =
            body.take(buf.unread(), |piece| content.extend_from_slice(piece)).map_err(app_broke_its_body)?;
        buf.consume(n);
        if let Some(boundary) = events.last_boundary(&content).filter(|_| told) {
            content.truncate(boundary);
            break Ended::EventsEnded;
        }
        put_piece(out, &content, exchange.request.http11);
        exchange.write(writer, out).await?;
        out.clear();
        content.clear();
        if body.is_done() {
            break Ended::Complete;
        }
        let read = tokio::select! {
            biased;
            read = buf.fill(app, &exchange.worker.store) => read,
            () = &mut end, if !told => {
                told = true;
                if events.at_boundary() {
                    break Ended::EventsEnded;
                }
                continue;
            }
        };
        match read {
            Ok(0) if response.framing == Framing::UntilClose => break Ended::Complete,
            Ok(0) | Err(_) => return Err(Failure::AppGone { unanswered: false }),
            Ok(_) => {}
        }
    };
    put_piece(out, &content, exchange.request.http11);
    if exchange.request.http11 {
        out.extend_from_slice(LAST_CHUNK);
    }
    exchange.write(writer, out).await?;
    if ended == Ended::EventsEnded {
        exchange.flow.close.set(true);
    }
    Ok(ended)
}

const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// Takes what belongs to the body from `bytes` and appends it to `out`; returns how much it took.
fn recode(body: &mut Body, bytes: &[u8], coding: Coding, out: &mut Vec<u8>) -> Result<usize, Broken> {
    match coding {
        Coding::AsIs => {
            let n = body.take(bytes, |_| ())?;
            out.extend_from_slice(&bytes[..n]);
            Ok(n)
        }
        Coding::Plain => body.take(bytes, |piece| out.extend_from_slice(piece)),
        Coding::Chunks => body.take(bytes, |piece| put_piece(out, piece, true)),
    }
}

/// Appends a piece of content, as a chunk if the client reads chunks. An empty chunk would be the end.
fn put_piece(out: &mut Vec<u8>, piece: &[u8], chunked: bool) {
    match (piece.is_empty(), chunked) {
        (true, _) => {}
        (false, false) => out.extend_from_slice(piece),
        (false, true) => {
            out.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
            out.extend_from_slice(piece);
            out.extend_from_slice(b"\r\n");
        }
    }
}

fn app_broke_its_body(_: Broken) -> Failure {
    Failure::AppBroken("the app's chunks can't be read")
}

impl Exchange<'_> {
    /// Runs `work` until it ends, a deadline of the ledger passes or the drain forces the end.
    pub async fn bounded<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let mut work = pin!(work);
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(ended) => Poll::Ready(ended),
            Poll::Pending if self.worker.plane.forced() => Poll::Ready(Err(Failure::Forced)),
            Poll::Pending if self.place.expired() => Poll::Ready(Err(Failure::TimedOut)),
            Poll::Pending => Poll::Pending,
        })
        .await
    }

    /// Waits while the app restarts.
    async fn held_back(&self) -> Result<(), Failure> {
        let plane = &self.worker.plane;
        if !plane.gate.holding() || self.request.probe {
            return Ok(());
        }
        let _held = plane.gate.hold_back(plane.settings.limits.held).ok_or(Failure::HeldTooMany)?;
        let most = plane.settings.drain.grace + plane.settings.upstream_wait;
        let released = poll_fn(|_| if plane.gate.holding() { Poll::Pending } else { Poll::Ready(()) });
        tokio::time::timeout(most, released).await.map_err(|_| Failure::AppDown)
    }

    /// Connects to the app; while nobody listens there, tries again for `--upstream-wait`. Nothing has been sent, so
    /// waiting is safe; once the pod goes it is of no use.
    async fn reach(&self) -> Result<Stream, Failure> {
        let settings = &self.worker.plane.settings;
        let (since, mut wait) = (Instant::now(), Duration::from_millis(5));
        loop {
            match upstream::connect(&settings.upstream).await {
                Ok(app) => {
                    add(&self.worker.shard.connects, 1);
                    return Ok(app);
                }
                Err(error) if !upstream::is_down(&error) => return Err(Failure::AppUnreachable),
                Err(_) if self.worker.plane.phase() != Phase::Serving => return Err(Failure::AppDown),
                Err(_) if since.elapsed() + wait > settings.upstream_wait => return Err(Failure::AppDown),
                Err(_) => tokio::time::sleep(wait).await,
            }
            wait = (wait * 2).min(Duration::from_millis(100));
        }
    }

    /// Writes the request's head, and what of its body came with it.
    async fn send(&self, app: &mut Writer<'_>, head: &[u8]) -> Result<(), Failure> {
        let mut left = head;
        while !left.is_empty() {
            match app.write(left).await {
                Ok(n) if n > 0 => left = &left[n..],
                _ => return Err(Failure::AppGone { unanswered: true }),
            }
            self.flow.progress.set(Progress::Sent);
        }
        Ok(())
    }

    /// Writes to the client.
    async fn write<W: AsyncWrite + Unpin>(&self, writer: &mut W, bytes: &[u8]) -> Result<(), Failure> {
        self.wait_for_client();
        writer.write_all(bytes).await.map_err(|_| Failure::ClientGone)?;
        self.flow.sent.set(self.flow.sent.get() + bytes.len() as u64);
        self.wait_for_app();
        Ok(())
    }

    /// What the client's side of this answer is to be.
    fn plan(&self, response: &Response) -> Answer {
        let (request, flow) = (self.request, &self.flow);
        let draining = self.worker.plane.phase() != Phase::Serving && !flow.pipelined.get();
        let endless = !request.http11 && matches!(response.framing, Framing::Chunked | Framing::UntilClose);
        let close = !request.keep_alive
            || draining
            || endless
            || response.says_close
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

    /// Nothing of it had reached the app, or sending it twice does no harm and all of it is still here.
    fn may_send_again(&self) -> bool {
        let flow = &self.flow;
        flow.progress.get() == Progress::Unsent && flow.replayable.get()
            || flow.progress.get() == Progress::Sent && self.request.idempotent && flow.replayable.get()
    }

    /// Returns when this stream is to end: at random within the spread that the drain gives.
    pub async fn stream_end(&self) {
        let plane = &self.worker.plane;
        let spread = poll_fn(|_| plane.streams_end().map_or(Poll::Pending, Poll::Ready)).await;
        let share = RandomState::new().hash_one(0) as f64 / u64::MAX as f64;
        tokio::time::sleep(spread.mul_f64(share)).await;
    }

    fn received(&self, n: usize) {
        self.flow.received.set(self.flow.received.get() + n as u64);
    }

    /// The client has to move a byte within `--body-timeout`.
    fn wait_for_client(&self) {
        self.place.set_deadline(self.worker.deadline(self.worker.plane.settings.limits.body_timeout));
    }

    /// The app may take its time, unless the client still owes a part of its request.
    fn wait_for_app(&self) {
        if self.flow.uploaded.get() {
            self.place.set_deadline(0);
        }
    }
}

/// Resets the connection when it is closed, so that the client can tell a cut from an end.
pub fn reset_on_close(client: &TcpStream) {
    let _ = SockRef::from(client).set_linger(Some(Duration::ZERO));
}
