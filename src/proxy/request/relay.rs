//! An answer's body on its way from the app to the client.

use std::pin::pin;
use std::time::Duration;

use tokio::io::AsyncRead;
use tokio::time::Instant;

use super::exchange::Exchange;
use super::failure::Failure;
use crate::drain::ledger::Class;
use crate::metrics::Ended;
use crate::proxy::buffer::Buffer;
use crate::proxy::http1::body::{Body, Broken, Events};
use crate::proxy::http1::head::{Framing, Response};
use crate::proxy::stream::Sink;
use crate::upstream::Backend;

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

impl Coding {
    fn of(response: &Response, http11: bool) -> Self {
        match (response.framing, http11) {
            (Framing::Chunked, false) => Self::Plain,
            (Framing::UntilClose, true) => Self::Chunks,
            _ => Self::AsIs,
        }
    }
}

/// Passes a finite body on.
pub async fn relay<A, W>(
    exchange: &Exchange<'_>,
    app: &mut A,
    buf: &mut Buffer,
    writer: &mut W,
    out: &mut Vec<u8>,
    response: &Response,
) -> Result<(), Failure>
where
    A: AsyncRead + Unpin,
    W: Sink,
{
    let coding = Coding::of(response, exchange.request.http11);
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
            exchange.entry.set_class(Class::Finite);
            first = false;
        } else if filled {
            buf.grow();
        }
        match buf.fill(app).await {
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

/// An event stream that is to end, and that comes to no event boundary for so long, is cut.
const BOUNDARY: Duration = Duration::from_secs(10);

/// Passes an event stream on, chunk by chunk, so that it can end after any event.
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
    A: AsyncRead + Unpin,
    W: Sink,
{
    let (mut body, mut events, mut content) = (Body::new(response.framing), Events::default(), Vec::new());
    let mut told = false;
    let mut end = pin!(exchange.worker.shared.stream_end(backend));
    let mut late = pin!(tokio::time::sleep(BOUNDARY));
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
            read = buf.fill(app) => read,
            () = &mut end, if !told => {
                told = true;
                if events.at_boundary() {
                    break Ended::EventsEnded;
                }
                late.as_mut().reset(Instant::now() + BOUNDARY);
                continue;
            }
            () = &mut late, if told => return Err(Failure::Forced),
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
    // The connection stays: its client wasn't told that it would close, and may be sending the next request.
    Ok(ended)
}

/// Where a compressed stream was quiet for so long, the app has flushed whole events.
const QUIET: Duration = Duration::from_millis(100);
/// One that is never quiet for so long ends between any two of the app's writes.
const BUSY: Duration = Duration::from_secs(1);

/// Passes a compressed event stream on. Its events can't be told, so it ends where it was quiet for a moment; and with its
/// connection, not with a last chunk, as its coding isn't whole. A client reopens a broken stream as it does an ended one
/// (HTML standard, "Server-sent events": reestablish the connection), from the last whole event on.
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
    A: AsyncRead + Unpin,
    W: Sink,
{
    let coding = Coding::of(response, exchange.request.http11);
    let mut body = Body::new(response.framing);
    let mut told: Option<Instant> = None;
    let mut end = pin!(exchange.worker.shared.stream_end(backend));
    let mut late = pin!(tokio::time::sleep(BOUNDARY));
    loop {
        let n = recode(&mut body, buf.unread(), coding, out).map_err(app_broke_its_body)?;
        buf.consume(n);
        exchange.write(writer, out).await?;
        out.clear();
        if body.is_done() {
            return Ok(Ended::Complete);
        }
        let between = body.is_between_chunks();
        if let Some(told) = told {
            late.as_mut().reset(if between { Instant::now() + QUIET } else { told + BOUNDARY });
        }
        let busy = told.is_some_and(|told| between && told.elapsed() >= BUSY);
        let read = tokio::select! {
            biased;
            read = buf.fill(app), if !busy => read,
            () = &mut end, if told.is_none() => {
                told = Some(Instant::now());
                continue;
            }
            () = &mut late, if told.is_some() => {
                exchange.flow.close.set(true);
                return if between { Ok(Ended::EventsEnded) } else { Err(Failure::Forced) };
            }
        };
        match read {
            Ok(0) if response.framing == Framing::UntilClose => break,
            Ok(0) | Err(_) => return Err(Failure::AppGone { unanswered: false }),
            Ok(_) => {}
        }
    }
    if coding == Coding::Chunks {
        exchange.write(writer, LAST_CHUNK).await?;
    }
    Ok(Ended::Complete)
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
