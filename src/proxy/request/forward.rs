//! Forwards one request, from its head to the last byte of its answer. Read it from top to bottom.
//!
//! The request body and the answer are relayed concurrently in the connection's own task: nothing is spawned or locked.
//! Phase changes and expired deadlines wake that task ([`crate::drain::ledger`]), so a request needs no timer and no
//! channel of its own.

use std::future::{Future, pending, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::app_reader::AppReader;
use super::exchange::{AppHead, Client, Exchange, Upload};
use super::failure::{Failure, Lost, MAX_INTERIM};
use super::poll_end;
use super::relay::{relay, relay_compressed_events, relay_events};
use super::retry::{MAX_REPLAY, Tried, Tries};
use crate::drain::ledger::Class;
use crate::metrics::{Ended, add};
use crate::proxy::buffer::Buffer;
use crate::proxy::http1::body::{Body, Broken};
use crate::proxy::http1::head::{Framing, Site, Upgrade};
use crate::proxy::http2::app::AppStream;
use crate::proxy::stream::{Sink, Source};
use crate::upstream::{Backend, Connection};

/// How a forwarded request ended.
pub enum Finish {
    /// The answer was relayed to its end.
    Answered(Ended),
    /// The connection is now a tunnel to the app. The buffer holds what the app has sent already.
    Upgraded(Connection, Buffer),
}

/// The app's side of one try.
enum AppSide<'h> {
    /// A connection for this request alone.
    Http1(Connection),
    /// A stream on a shared connection, and the head for it.
    Http2(Box<AppStream>, &'h http::Request<()>),
}

/// How an answer ended.
enum Answered {
    /// Relayed to its end. If `reuse`, the app's connection may be reused, for `keep_alive` if the app named a time.
    Whole { ended: Ended, reuse: bool, keep_alive: Option<Duration> },
    /// The app has switched protocols (101).
    Upgraded,
}

/// Sends the request to the app and the answer to the client. `head` is the request's head for the app; the original
/// has been consumed from the client's buffer.
///
/// # Errors
/// Why the request failed. An answer can still be sent to the client if none has begun.
pub async fn forward<R, W>(
    client: &mut Client<R, W>,
    exchange: &Exchange<'_>,
    head: AppHead,
) -> Result<Finish, Failure>
where
    R: Source,
    W: Sink,
{
    // What is sent first: the head, if it is text, and the part of the body that arrived with it.
    let (mut start, head) = match head {
        AppHead::Http1(text) => (text, None),
        AppHead::Http2(head) => (Vec::new(), Some(Box::new(head.into_request().ok_or(Failure::BadHead)?))),
    };
    let (mut body, mut more) = (Body::new(exchange.request.framing), Some(Vec::new()));
    let here = body.take(client.buf.unread(), |_| ()).map_err(|Broken| Failure::BadBody)?;
    start.extend_from_slice(&client.buf.unread()[..here]);
    client.buf.consume(here);
    exchange.flow.received(here);

    exchange.may_begin()?;
    exchange.bounded(exchange.while_watched(client, exchange.held_back(start.len()))).await?;
    let pool = &exchange.route.pool;
    // A request that can't be sent twice is worth one more system call to see whether the connection is still open.
    let mut pooled = if exchange.http2 { None } else { pool.take(!exchange.request.idempotent) };
    let mut tries = Tries::default();
    loop {
        let reused = pooled.is_some();
        let app = match pooled.take() {
            Some(app) => AppSide::Http1(app),
            None => {
                let reached =
                    exchange.bounded(exchange.while_watched(client, reach(exchange, head.as_deref()))).await;
                reached.map_err(|failure| tries.unreached(failure))?
            }
        };
        let mut app_buf = Buffer::default();
        let attempt = attempt(client, exchange, &start, (&mut body, &mut more), app, &mut app_buf);
        let (app, failure) = match attempt.await {
            (app, Ok(Answered::Whole { ended, reuse, keep_alive })) => {
                app_buf.release();
                match app {
                    AppSide::Http1(app) if reuse && app_buf.is_empty() => pool.put(app, keep_alive),
                    AppSide::Http1(_) => {}
                    AppSide::Http2(app, _) => app.finish(),
                }
                return Ok(Finish::Answered(ended));
            }
            (AppSide::Http1(app), Ok(Answered::Upgraded)) => return Ok(Finish::Upgraded(app, app_buf)),
            (AppSide::Http2(..), Ok(Answered::Upgraded)) => {
                return Err(Failure::AppBroken("the app answers 101 over HTTP/2, which has no upgrades"));
            }
            (app, Err(failure)) => (app, failure),
        };
        let (unprocessed, tried) = match &app {
            AppSide::Http1(_) if reused => (false, Tried::Reused),
            AppSide::Http1(app) => (false, Tried::New(app.backend())),
            AppSide::Http2(app, _) => (app.is_unprocessed(), Tried::Shared { first: app.is_first() }),
        };
        let kept = more.is_some();
        let again = async { Ok(tries.may_retry(exchange, failure, unprocessed, tried, || kept).await) };
        if !exchange.bounded(exchange.while_watched(client, again)).await? {
            return Err(failure);
        }
        exchange.waits_for_body(false);
    }
}

/// Gets a new connection to the app, or a stream on a shared one.
async fn reach<'h>(
    exchange: &Exchange<'_>,
    head: Option<&'h http::Request<()>>,
) -> Result<AppSide<'h>, Failure> {
    let pool = &exchange.route.pool;
    if let Some(head) = head {
        let lease = exchange.lease().await?;
        return Ok(AppSide::Http2(Box::new(AppStream::new(lease, exchange.request.framing)), head));
    }
    let app = exchange.reach(async || pool.connect().await).await?;
    add(&exchange.worker.shard.connects, 1);
    Ok(AppSide::Http1(app))
}

/// Sends the request to this server and relays the answer, within the deadlines of the request.
async fn attempt<'h, R, W>(
    client: &mut Client<R, W>,
    exchange: &Exchange<'_>,
    start: &[u8],
    body: (&mut Body, &mut Option<Vec<u8>>),
    mut app: AppSide<'h>,
    app_buf: &mut Buffer,
) -> (AppSide<'h>, Result<Answered, Failure>)
where
    R: Source,
    W: Sink,
{
    let answered = match &mut app {
        AppSide::Http1(app) => {
            let (reader, writer, backend) = app.split();
            let host = &start[exchange.request.origin.host.clone()];
            let site = Site { https: exchange.request.origin.https, host, app: backend.loopback() };
            let app = (reader, writer, backend, site);
            exchange.bounded(both_ways(client, exchange, start, body, app, app_buf)).await
        }
        AppSide::Http2(app, head) => match app.begin(head) {
            Ok(()) => {
                exchange.flow.reached_app();
                let (reader, writer, backend) = app.split();
                let app = (reader, writer, &backend, exchange.site(head, &backend));
                // Boxed, so that the task of a connection only needs the memory for HTTP/1.1.
                exchange.bounded(Box::pin(both_ways(client, exchange, start, body, app, app_buf))).await
            }
            Err(_) => Err(Failure::AppGone(Lost::Reset)),
        },
    };
    (app, answered)
}

/// Sends the request over this connection and relays the answer concurrently. `start` is what is sent first; `body` reads the rest, and `more` is the part of it that an earlier try has
/// sent; `None` once it is too long to be kept.
async fn both_ways<R, W>(
    client: &mut Client<R, W>,
    exchange: &Exchange<'_>,
    start: &[u8],
    (body, more): (&mut Body, &mut Option<Vec<u8>>),
    (mut app_reader, mut app_writer, backend, site): (
        impl AppReader,
        impl AsyncWrite + Unpin,
        &Arc<Backend>,
        Site<'_>,
    ),
    app_buf: &mut Buffer,
) -> Result<Answered, Failure>
where
    R: Source,
    W: Sink,
{
    let flow = &exchange.flow;
    exchange.send(&mut app_writer, start).await?;
    if let Some(more) = more.as_deref().filter(|more| !more.is_empty()) {
        exchange.send(&mut app_writer, more).await?;
    }
    let Client { reader, writer, buf, .. } = client;
    let kept = (start.len(), more);
    let mut upload = pin!(upload(exchange, reader, buf, body, &mut app_writer, kept));
    let mut uploading = true;
    let answered = {
        let mut answer = pin!(answer(exchange, &mut app_reader, (backend, site), app_buf, writer));
        poll_fn(|cx| {
            if uploading && let Poll::Ready(over) = upload.as_mut().poll(cx) {
                over?;
                uploading = false;
            }
            if flow.upload() == Upload::HalfClosed && flow.streams_events() {
                return Poll::Ready(Err(Failure::ClientGone)); // no client reads an event stream half-closed
            }
            answer.as_mut().poll(cx)
        })
        .await?
    };
    // The new protocol begins after the whole request, in both directions (RFC 9110 §7.8).
    if matches!(answered, Answered::Upgraded) && !flow.is_uploaded() {
        if uploading {
            poll_fn(|cx| match upload.as_mut().poll(cx) {
                Poll::Pending if !flow.is_uploaded() => Poll::Pending,
                Poll::Pending => Poll::Ready(Ok(())),
                Poll::Ready(over) => Poll::Ready(over),
            })
            .await?;
        }
        if !flow.is_uploaded() {
            return Err(Failure::AppGone(Lost::Midway));
        }
    }
    // An upload that ended early means that the app does not read any more of it.
    if uploading && !flow.is_uploaded() && matches!(answered, Answered::Whole { .. }) {
        finish_upload(exchange, writer, upload).await;
    }
    Ok(match answered {
        Answered::Whole { ended, reuse, keep_alive } => {
            Answered::Whole { ended, reuse: reuse && flow.is_uploaded(), keep_alive }
        }
        upgraded => upgraded,
    })
}

/// Continues the upload after the app has answered before it had the whole request. The app may still want the rest,
/// and closing a connection with unread bytes would reset it and destroy the answer on its way to the client. It ends
/// when the upload does, or when the request's deadline expires.
async fn finish_upload<W: AsyncWrite + Unpin>(
    exchange: &Exchange<'_>,
    writer: &mut W,
    mut upload: Pin<&mut impl Future<Output = Result<(), Failure>>>,
) {
    let _ = writer.shutdown().await;
    exchange.answered_early();
    poll_fn(|cx| match upload.as_mut().poll(cx) {
        Poll::Pending if !exchange.flow.is_uploaded() && !exchange.entry.expired() => Poll::Pending,
        _ => Poll::Ready(()),
    })
    .await;
}

/// The client's side: sends the rest of the body to the app, then watches the connection for its end. Returns early if
/// the app does not read any more.
async fn upload<R: Source>(
    exchange: &Exchange<'_>,
    reader: &mut R,
    buf: &mut Buffer,
    body: &mut Body,
    app: &mut (impl AsyncWrite + Unpin),
    (sent_before, more): (usize, &mut Option<Vec<u8>>),
) -> Result<(), Failure> {
    let flow = &exchange.flow;
    let resendable = exchange.request.idempotent || exchange.http2;
    while !body.is_done() {
        if buf.is_empty() && !matches!(exchange.read(reader, buf).await, Ok(n) if n > 0) {
            return Err(Failure::ClientGone);
        }
        let filled = buf.unread().len() == buf.capacity();
        let n = body.take(buf.unread(), |_| ()).map_err(|Broken| Failure::BadBody)?;
        flow.received(n);
        *more = more.take().filter(|more| resendable && sent_before + more.len() + n <= MAX_REPLAY);
        let sent = if let Some(more) = more {
            let mark = more.len();
            more.extend_from_slice(&buf.unread()[..n]);
            buf.consume(n);
            app.write_all(&more[mark..]).await
        } else {
            let sent = app.write_all(&buf.unread()[..n]).await;
            buf.consume(n);
            sent
        };
        if sent.is_err() {
            return Ok(());
        }
        if filled {
            buf.grow();
        }
    }
    flow.uploaded(Upload::Done);
    exchange.waits_for_body(false);
    if !buf.is_empty() || buf.fill(reader).await.map_err(|_| Failure::ClientGone)? > 0 {
        flow.uploaded(Upload::Pipelined);
        return pending().await;
    }
    flow.uploaded(Upload::HalfClosed);
    half_closed(exchange, reader).await
}

/// The client has closed its sending side: it may have gone, or it may still wait for its answer.
async fn half_closed(exchange: &Exchange<'_>, client: &impl Source) -> Result<(), Failure> {
    exchange.nudge(client)?;
    client.failed().await;
    Err(Failure::ClientGone)
}

/// The app's side: relays interim answers, the head and the body.
async fn answer<A, W>(
    exchange: &Exchange<'_>,
    app: &mut A,
    (backend, site): (&Backend, Site<'_>),
    buf: &mut Buffer,
    writer: &mut W,
) -> Result<Answered, Failure>
where
    A: AppReader,
    W: Sink,
{
    let request = exchange.request;
    if let Some(poll) = exchange.long_poll
        && !poll_end::has_news(exchange, app, backend, buf).await?
    {
        poll_end::answer(exchange, backend, poll, writer).await?;
        return Ok(Answered::Whole { ended: Ended::PollEnded, reuse: false, keep_alive: None });
    }
    let mut interim = 0;
    let (response, mut out) = loop {
        let mut head = writer.head();
        let response = app.head(exchange, (backend, site), buf, &mut head, interim == 0).await?;
        if response.status == 101 && request.upgrade == Upgrade::None {
            return Err(Failure::AppBroken("the app answers 101 to a request that asks for no upgrade"));
        }
        if response.status >= 200 || response.status == 101 {
            let out = exchange.begin(writer, head, &response)?;
            break (response, out);
        }
        interim += 1;
        if interim > MAX_INTERIM {
            return Err(Failure::AppBroken("the app sends interim answers without end"));
        }
        if request.http11 {
            let out = exchange.begin(writer, head, &response)?;
            exchange.write(writer, &out).await?;
        }
    };
    let events = response.events
        && request.reopens
        && matches!(response.framing, Framing::Chunked | Framing::UntilClose);
    exchange.answers(response.status, events);
    if response.status == 101 {
        exchange.write(writer, &out).await?;
        return Ok(Answered::Upgraded);
    }
    let ended = if events {
        exchange.entry.set_class(Class::EventStream);
        let _streaming = exchange.streaming();
        match response.compressed {
            true => relay_compressed_events(exchange, app, backend, buf, writer, &mut out, &response).await?,
            false => relay_events(exchange, app, backend, buf, writer, &mut out, &response).await?,
        }
    } else {
        relay(exchange, app, buf, writer, &mut out, &response).await?;
        Ended::Complete
    };
    let reuse = response.keep_alive && ended == Ended::Complete;
    Ok(Answered::Whole { ended, reuse, keep_alive: response.keep_alive_timeout })
}
