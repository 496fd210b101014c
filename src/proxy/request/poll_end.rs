//! Ends a long poll that is still waiting when streams have to end. The proxy answers for the app; otherwise the poll
//! would delay a drain or a hold up to its time limit.

use std::future::poll_fn;
use std::task::Poll;

use http::StatusCode;

use super::app_reader::AppReader;
use super::exchange::Exchange;
use super::failure::{Failure, Lost};
use super::long_poll::LongPoll;
use crate::drain::ledger::Class;
use crate::proxy::buffer::Buffer;
use crate::proxy::http1::head::{Framing, HeadOut, Response};
use crate::proxy::stream::Sink;
use crate::upstream::Backend;

/// Waits for the app's response to begin. Returns false if the poll has to end first.
pub async fn has_news<A: AppReader>(
    exchange: &Exchange<'_>,
    app: &mut A,
    backend: &Backend,
    buf: &mut Buffer,
) -> Result<bool, Failure> {
    exchange.entry.set_class(Class::LongPoll);
    let _streaming = exchange.streaming();
    let uploaded = poll_fn(|_| if exchange.flow.is_uploaded() { Poll::Ready(()) } else { Poll::Pending });
    let end = async {
        exchange.worker.shared.stream_end(backend).await;
        uploaded.await;
    };
    tokio::select! {
        biased;
        began = app.begins(buf) => match began {
            Ok(true) => Ok(true),
            ended => Err(Failure::AppGone(Lost::by(&ended.map(|_| 0), true))),
        },
        () = end => Ok(false),
    }
}

/// Answers the poll in the app's place.
pub async fn answer<W: Sink>(
    exchange: &Exchange<'_>,
    backend: &Backend,
    poll: LongPoll,
    writer: &mut W,
) -> Result<(), Failure> {
    let (status, body) = poll.answer(&exchange.worker.shared.settings.long_polls.answer);
    let framing = body.map_or(Framing::None, |(_, text)| Framing::Length(text.len() as u64));
    let response = Response::of_ours(status, framing);
    let side = exchange.plan(&response, backend);
    let reason = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
    let mut head = writer.head();
    head.status_line(status, reason.unwrap_or_default().as_bytes());
    head.field("Cache-Control", &[b"no-store"]);
    match body {
        Some((kind, text)) => {
            head.field("Content-Type", &[kind.as_bytes()]);
            head.field("Content-Length", &[text.len().to_string().as_bytes()]);
        }
        None if matches!(status, 204 | 304) => {}
        None => head.field("Content-Length", &[b"0"]),
    }
    let connection: &[u8] = match (side.close, side.http11) {
        (true, _) => b"Connection: close\r\n",
        (false, false) => b"Connection: keep-alive\r\n",
        (false, true) => b"",
    };
    head.connection(&[connection, b"\r\n"]);
    let mut out = exchange.begin(writer, head, &response)?;
    exchange.flow.answers(status, false);
    if let Some((_, text)) = body.filter(|_| !exchange.request.head_only) {
        out.extend_from_slice(text.as_bytes());
        writer.ends(None);
    }
    exchange.write(writer, &out).await
}
