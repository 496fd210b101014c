//! Relays a response's body from the app to the client.

use std::io;
use std::pin::pin;
use std::time::Duration;

use tokio::time::Instant;

use super::app_reader::AppReader;
use super::exchange::Exchange;
use super::failure::{Failure, Lost};
use crate::drain::ledger::Class;
use crate::metrics::Ended;
use crate::proxy::buffer::Buffer;
use crate::proxy::http1::body::{Body, Broken, Events};
use crate::proxy::http1::head::{Framing, Response};
use crate::proxy::http2::head as http2;
use crate::proxy::stream::Sink;
use crate::upstream::Backend;

/// How the body is encoded for the client.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Coding {
    /// Byte for byte.
    AsIs,
    /// Without chunks, which the client can't read or doesn't need.
    Plain,
    /// The app's body ends with its connection; the client gets chunks, so that it can tell a complete body from a
    /// cut one.
    Chunks,
}

impl Coding {
    fn of<W: Sink>(response: &Response, exchange: &Exchange<'_>) -> Self {
        match (response.framing, takes_chunks::<W>(exchange)) {
            (Framing::Chunked, false) => Self::Plain,
            (Framing::UntilClose, true) => Self::Chunks,
            _ => Self::AsIs,
        }
    }
}

/// Whether the client reads the end of a body from chunks.
fn takes_chunks<W: Sink>(exchange: &Exchange<'_>) -> bool {
    exchange.request.http11 && !W::MARKS_END
}

/// Relays a finite body.
pub async fn relay<A, W>(
    exchange: &Exchange<'_>,
    app: &mut A,
    buf: &mut Buffer,
    writer: &mut W,
    out: &mut Vec<u8>,
    response: &Response,
) -> Result<(), Failure>
where
    A: AppReader,
    W: Sink,
{
    let coding = Coding::of::<W>(response, exchange);
    let mut body = Body::new(response.framing);
    let mut first = true;
    loop {
        let filled = buf.unread().len() == buf.capacity();
        if coding == Coding::AsIs && !first {
            let n = body.take(buf.unread(), |_| ()).map_err(app_broke_its_body)?;
            if body.is_done() {
                writer.ends(None);
            }
            exchange.write(writer, &buf.unread()[..n]).await?;
            buf.consume(n);
        } else {
            // The part of the body that has arrived goes out in one write with the head.
            let n = recode(&mut body, buf.unread(), coding, out).map_err(app_broke_its_body)?;
            buf.consume(n);
            if body.is_done() {
                ends(writer, &body);
            } else if response.framing == Framing::UntilClose && app.is_drained() {
                break;
            }
            exchange.write(writer, out).await?;
        }
        out.clear();
        if body.is_done() {
            return writer.end().map_err(|_| Failure::ClientGone);
        }
        if first {
            exchange.entry.set_class(Class::Finite);
            first = false;
        } else if filled {
            buf.grow();
        }
        if !goes_on(&buf.fill(app).await, response)? {
            break;
        }
    }
    last_chunk(exchange, app, writer, out, coding).await
}

/// Time limit for reaching an event boundary once an event stream has to end; past it the stream is cut.
const BOUNDARY_TIMEOUT: Duration = Duration::from_secs(10);

/// Relays an event stream chunk by chunk, so that it can end after any event.
pub async fn relay_events<A, W>(
    exchange: &Exchange<'_>,
    app: &mut A,
    backend: &Backend,
    buf: &mut Buffer,
    writer: &mut W,
    out: &mut Vec<u8>,
    response: &Response,
) -> Result<Ended, Failure>
where
    A: AppReader,
    W: Sink,
{
    let (mut body, mut events, mut content) = (Body::new(response.framing), Events::default(), Vec::new());
    let mut told = false;
    let mut end = pin!(exchange.worker.shared.stream_end(backend));
    let mut late = pin!(tokio::time::sleep(BOUNDARY_TIMEOUT));
    let ended = loop {
        content.clear();
        let n =
            body.take(buf.unread(), |piece| content.extend_from_slice(piece)).map_err(app_broke_its_body)?;
        buf.consume(n);
        if let Some(boundary) = events.last_boundary(&content).filter(|_| told) {
            content.truncate(boundary);
            break Ended::EventsEnded;
        }
        put_piece(out, &content, takes_chunks::<W>(exchange));
        exchange.write(writer, out).await?;
        out.clear();
        content.clear();
        if body.is_done() {
            break Ended::Complete;
        }
        let read = tokio::select! {
            biased;
            read = buf.fill(app) => read,
            () = &mut end, if !told => {
                told = true;
                if events.at_boundary() {
                    break Ended::EventsEnded;
                }
                late.as_mut().reset(Instant::now() + BOUNDARY_TIMEOUT);
                continue;
            }
            () = &mut late, if told => return Err(Failure::Forced),
        };
        if !goes_on(&read, response)? {
            break Ended::Complete;
        }
    };
    put_piece(out, &content, takes_chunks::<W>(exchange));
    let trailers = app.trailers().or_else(|| http2::trailers(body.trailers()));
    if takes_chunks::<W>(exchange) {
        http2::last_chunk(trailers.as_ref(), out);
    }
    writer.ends(trailers);
    exchange.write(writer, out).await?;
    writer.end().map_err(|_| Failure::ClientGone)?;
    // The connection stays open: its client wasn't told that it would close, and may be sending the next request.
    Ok(ended)
}

/// A compressed stream that is quiet for this long has flushed whole events.
const QUIET_DELAY: Duration = Duration::from_millis(100);
/// A compressed stream that is never quiet ends between any two of the app's writes after this time.
const BUSY_LIMIT: Duration = Duration::from_secs(1);

/// Relays a compressed event stream. Event boundaries are not visible in it, so it ends at a quiet moment, and by
/// closing the connection rather than with a last chunk, because its coding is incomplete. A client reopens a broken
/// stream like an ended one, from the last whole event (HTML standard, "Server-sent events": reestablish the
/// connection).
pub async fn relay_compressed_events<A, W>(
    exchange: &Exchange<'_>,
    app: &mut A,
    backend: &Backend,
    buf: &mut Buffer,
    writer: &mut W,
    out: &mut Vec<u8>,
    response: &Response,
) -> Result<Ended, Failure>
where
    A: AppReader,
    W: Sink,
{
    let coding = Coding::of::<W>(response, exchange);
    let mut body = Body::new(response.framing);
    let mut told: Option<Instant> = None;
    let mut end = pin!(exchange.worker.shared.stream_end(backend));
    let mut late = pin!(tokio::time::sleep(BOUNDARY_TIMEOUT));
    loop {
        let n = recode(&mut body, buf.unread(), coding, out).map_err(app_broke_its_body)?;
        buf.consume(n);
        if body.is_done() {
            ends(writer, &body);
        }
        exchange.write(writer, out).await?;
        out.clear();
        if body.is_done() {
            writer.end().map_err(|_| Failure::ClientGone)?;
            return Ok(Ended::Complete);
        }
        let between = body.is_between_chunks();
        if let Some(told) = told {
            late.as_mut().reset(if between { Instant::now() + QUIET_DELAY } else { told + BOUNDARY_TIMEOUT });
        }
        let busy = told.is_some_and(|told| between && told.elapsed() >= BUSY_LIMIT);
        let read = tokio::select! {
            biased;
            read = buf.fill(app), if !busy => read,
            () = &mut end, if told.is_none() => {
                told = Some(Instant::now());
                continue;
            }
            () = &mut late, if told.is_some() => {
                exchange.flow.breaks_off();
                return if between { Ok(Ended::EventsEnded) } else { Err(Failure::Forced) };
            }
        };
        if !goes_on(&read, response)? {
            break;
        }
    }
    last_chunk(exchange, app, writer, out, coding).await?;
    Ok(Ended::Complete)
}

/// Whether a read brought more of the body; false if the end of the app's connection is that of the body.
fn goes_on(read: &io::Result<usize>, response: &Response) -> Result<bool, Failure> {
    match read {
        Ok(0) if response.framing == Framing::UntilClose => Ok(false),
        Ok(0) | Err(_) => Err(Failure::AppGone(Lost::Midway)),
        Ok(_) => Ok(true),
    }
}

/// The app's connection or stream has ended, and the body with it.
async fn last_chunk<W: Sink>(
    exchange: &Exchange<'_>,
    app: &mut impl AppReader,
    writer: &mut W,
    out: &mut Vec<u8>,
    coding: Coding,
) -> Result<(), Failure> {
    let trailers = app.trailers();
    if coding == Coding::Chunks {
        http2::last_chunk(trailers.as_ref(), out);
    }
    writer.ends(trailers);
    exchange.write(writer, out).await?;
    writer.end().map_err(|_| Failure::ClientGone)
}

/// The body ends with the bytes that are written next.
fn ends<W: Sink>(writer: &mut W, body: &Body) {
    if W::MARKS_END {
        writer.ends(http2::trailers(body.trailers()));
    }
}

/// Takes the part of `bytes` that belongs to the body and appends it to `out`. Returns the number of bytes taken.
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

/// Appends a piece of content, as a chunk if `chunked`. Skips an empty piece: an empty chunk would end the body.
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
