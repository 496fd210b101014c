//! Relays one request of an HTTP/2 client to the app over HTTP/2, from its head to the last frame of its answer. Read
//! it from top to bottom.
//!
//! Both directions are relayed concurrently in the stream's own task. A chunk is read from one side only when the other
//! has room for it, and returned to the sender's window once it has been forwarded, so the two windows bound the
//! memory.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;

use ::h2::client::ResponseFuture;
use ::h2::server::SendResponse;
use ::h2::{Reason, RecvStream, SendStream};
use bytes::Bytes;
use http::header::{CONTENT_LOCATION, HeaderMap, HeaderValue, LINK, LOCATION, REFRESH};
use http::{Request, Response};

use super::exchange::{After, Exchange, Upload};
use super::failure::{self, Failure, Lost, MAX_INTERIM};
use super::retry::{MAX_REPLAY, Tried, Tries};
use crate::drain::ledger::Class;
use crate::metrics::Ended;
use crate::proxy::http1::head::{Field, Site};
use crate::proxy::http2::grpc::{self, Code};
use crate::proxy::http2::head::reason;
use crate::proxy::http2::typed::TypedHead;
use crate::upstream::{self, Lease};

/// The client's side of the stream.
struct ClientSide {
    body: RequestBody,
    back: Back,
    /// The reason if the client has reset the stream.
    reset: Cell<Option<Reason>>,
    grpc: bool,
}

/// The way back to the client.
struct Back {
    respond: SendResponse<Bytes>,
    /// The body of the answer; present once its head has been sent.
    answer: Option<SendStream<Bytes>>,
}

/// The request's body. Its beginning is kept for another try.
struct RequestBody {
    from: RecvStream,
    /// The chunks read so far, for another try; `None` once they exceed `MAX_REPLAY`.
    kept: Option<Vec<Bytes>>,
    kept_bytes: usize,
    /// Number of kept chunks that this try has sent.
    sent: usize,
    trailers: Option<HeaderMap>,
}

/// Forwards the request and relays the answer; sends an answer of our own if that fails. `head` is the request's head
/// for the app.
pub async fn relay(
    exchange: &Exchange<'_>,
    head: TypedHead,
    grpc: bool,
    body: RecvStream,
    respond: SendResponse<Bytes>,
) -> Ended {
    let back = Back { respond, answer: None };
    let mut client = ClientSide { body: RequestBody::new(body), back, reset: Cell::new(None), grpc };
    let done = match head.into_request() {
        Some(request) => forward(exchange, &request, &mut client).await,
        None => Err(Failure::BadHead),
    };
    match done {
        Ok(()) => Ended::Complete,
        Err(failure) => fail(exchange, &mut client, failure),
    }
}

async fn forward(
    exchange: &Exchange<'_>,
    head: &Request<()>,
    client: &mut ClientSide,
) -> Result<(), Failure> {
    exchange.may_begin()?;
    exchange.bounded(client.watched(exchange.held_back(size_of(head)))).await?;
    let mut tries = Tries::default();
    loop {
        let leased = exchange.bounded(client.watched(exchange.lease())).await;
        let mut lease = leased.map_err(|failure| tries.unreached(failure))?;
        let failure = match exchange.bounded(attempt(exchange, head, client, &mut lease)).await {
            Ok(()) => return Ok(()),
            Err(failure) => failure,
        };
        let unprocessed = matches!(failure, Failure::Unprocessed(_));
        let tried = Tried::Shared { first: lease.is_first() };
        if !tries.may_retry(exchange, failure, unprocessed, tried, || client.body.rewind()).await {
            return Err(failure);
        }
    }
}

/// Sends the request over this connection and relays the answer concurrently.
async fn attempt(
    exchange: &Exchange<'_>,
    head: &Request<()>,
    client: &mut ClientSide,
    lease: &mut Lease,
) -> Result<(), Failure> {
    let ClientSide { body, back, reset, grpc } = client;
    let (mut response, mut app) = lease.send(head.clone(), body.is_empty()).map_err(app_failed)?;
    exchange.flow.reached_app();
    exchange.flow.then(if lease.backend().habit.is_going() { After::AppGoes } else { After::Stays });
    let site = exchange.site(head, lease.backend());
    let ended = {
        let mut upload = pin!(upload(exchange, body, &mut app, reset, *grpc));
        let mut answer = pin!(answer(exchange, site, &mut response, back, reset, *grpc));
        let mut uploading = true;
        poll_fn(|cx| {
            if uploading && let Poll::Ready(over) = upload.as_mut().poll(cx) {
                over?;
                uploading = false;
            }
            answer.as_mut().poll(cx)
        })
        .await
    };
    if let Some(reason) = reset.get() {
        app.send_reset(reason);
    }
    ended
}

/// The client's side: sends the body and the trailers to the app. Returns early if the app does not read any more.
async fn upload(
    exchange: &Exchange<'_>,
    body: &mut RequestBody,
    app: &mut SendStream<Bytes>,
    reset: &Cell<Option<Reason>>,
    grpc: bool,
) -> Result<(), Failure> {
    let flow = &exchange.flow;
    if body.is_empty() {
        flow.uploaded(Upload::Done);
        exchange.waits_for_body(false);
        return Ok(());
    }
    loop {
        // A gRPC call may be silent until its own deadline, so no time limit applies to it here.
        exchange.waits_for_body(!grpc);
        let next = body.next(!flow.is_answering()).await;
        exchange.waits_for_body(false);
        let next = next.map_err(|error| {
            reset.set(error.reason());
            Failure::ClientGone
        })?;
        let Some((chunk, fresh)) = next else { break };
        let (length, last) = (chunk.len(), body.is_whole());
        if fresh {
            flow.received(length);
        }
        if pass_on(chunk, app, last).await.is_err() {
            return Ok(());
        }
        if fresh {
            body.took(length);
        }
        if last {
            flow.uploaded(Upload::Done);
            return Ok(());
        }
    }
    // A failure here also appears on the app's side, so ignore it.
    let _ = end(app, body.trailers.clone());
    flow.uploaded(Upload::Done);
    Ok(())
}

/// The app's side: relays interim answers, the head, the body and the trailers.
async fn answer(
    exchange: &Exchange<'_>,
    site: Site<'_>,
    response: &mut ResponseFuture,
    back: &mut Back,
    reset: &Cell<Option<Reason>>,
    grpc: bool,
) -> Result<(), Failure> {
    let flow = &exchange.flow;
    let (mut head, mut body) = answer_head(response, back, reset).await?.into_parts();
    if head.headers.len() > exchange.worker.shared.settings.limits.max_fields {
        return Err(Failure::AppBroken("the head of the app's answer has too many fields (--max-fields)"));
    }
    rename_app(&mut head.headers, site);
    let whole = body.is_end_stream();
    exchange.answers(head.status.as_u16(), false);
    let sent = back.respond.send_response(Response::from_parts(head, ()), whole);
    let client = back.answer.insert(sent.map_err(|_| Failure::ClientGone)?);
    if whole {
        return Ok(());
    }
    exchange.entry.set_class(if grpc { Class::GrpcStream } else { Class::Finite });
    loop {
        let chunk = poll_fn(|cx| {
            if let Poll::Ready(gone) = client.poll_reset(cx) {
                return Poll::Ready(Some(Err(client_gone(gone, reset))));
            }
            body.poll_data(cx).map_err(app_failed)
        });
        let Some(chunk) = chunk.await.transpose()? else { break };
        let (length, last) = (chunk.len(), body.is_end_stream());
        exchange.waits_for_room(!grpc);
        let passed = pass_on(chunk, client, last).await;
        exchange.waits_for_room(false);
        passed.map_err(|error| client_gone(Err(error), reset))?;
        flow.wrote(length);
        let _ = body.flow_control().release_capacity(length);
        if last {
            return Ok(());
        }
    }
    let trailers = poll_fn(|cx| body.poll_trailers(cx)).await.map_err(app_failed)?;
    end(client, trailers).map_err(|_| Failure::ClientGone)
}

/// Replaces the app's own address in URLs by the host and scheme that the client uses.
fn rename_app(fields: &mut HeaderMap, site: Site<'_>) {
    let urls = [
        (LOCATION, Field::Location),
        (CONTENT_LOCATION, Field::ContentLocation),
        (REFRESH, Field::Refresh),
        (LINK, Field::Link),
    ];
    for (name, field) in urls {
        let http::header::Entry::Occupied(mut values) = fields.entry(name) else { continue };
        for value in values.iter_mut() {
            let mut changed = Vec::new();
            if site.put(field, value.as_bytes(), &mut changed)
                && let Ok(changed) = HeaderValue::from_maybe_shared(Bytes::from(changed))
            {
                *value = changed;
            }
        }
    }
}

/// Waits for the head of the answer, and relays interim answers that come before it.
async fn answer_head(
    response: &mut ResponseFuture,
    back: &mut Back,
    reset: &Cell<Option<Reason>>,
) -> Result<Response<RecvStream>, Failure> {
    let mut interim = 0;
    poll_fn(|cx| {
        if let Poll::Ready(gone) = back.respond.poll_reset(cx) {
            return Poll::Ready(Err(client_gone(gone, reset)));
        }
        while let Poll::Ready(Some(informational)) = response.poll_informational(cx) {
            interim += 1;
            if interim > MAX_INTERIM {
                return Poll::Ready(Err(Failure::AppBroken("the app sends interim answers without end")));
            }
            let sent = back.respond.send_informational(informational.map_err(app_failed)?);
            sent.map_err(|_| Failure::ClientGone)?;
        }
        Pin::new(&mut *response).poll(cx).map_err(app_failed)
    })
    .await
}

/// Sends a chunk in pieces as the receiver's window allows. `last` means that nothing follows.
async fn pass_on(mut chunk: Bytes, to: &mut SendStream<Bytes>, last: bool) -> Result<(), ::h2::Error> {
    while !chunk.is_empty() {
        to.reserve_capacity(chunk.len());
        let room = match poll_fn(|cx| to.poll_capacity(cx)).await {
            Some(room) => room?,
            None => return Err(Reason::STREAM_CLOSED.into()),
        };
        let piece = chunk.split_to(room.min(chunk.len()));
        to.send_data(piece, last && chunk.is_empty())?;
        if last && chunk.is_empty() {
            return Ok(());
        }
    }
    if last { to.send_data(Bytes::new(), true) } else { Ok(()) }
}

/// Ends a stream whose last chunk has already been sent.
fn end(to: &mut SendStream<Bytes>, trailers: Option<HeaderMap>) -> Result<(), ::h2::Error> {
    match trailers {
        Some(trailers) => to.send_trailers(trailers),
        None => to.send_data(Bytes::new(), true),
    }
}

/// Ends a failed request: with an answer if one is still possible, otherwise so that the client can tell that the
/// answer was cut. A gRPC call can always get trailers, which tell the client that it may retry.
fn fail(exchange: &Exchange<'_>, client: &mut ClientSide, failure: Failure) -> Ended {
    let response = failure.response(exchange.flow.progress());
    let ClientSide { back, grpc, .. } = client;
    let reset = match failure {
        Failure::ClientGone => return response.ended,
        Failure::AppReset(reason) | Failure::Unprocessed(reason) => Some(reason),
        _ => None,
    };
    let reason = reset.unwrap_or_else(|| reason(response.ended));
    match (&mut back.answer, response.status) {
        (Some(answer), _) if *grpc && reset.is_none() => {
            // If the client has gone, there is nothing to end, so ignore the error.
            let _ = answer.send_trailers(grpc::trailers(Code::Unavailable, response.why));
        }
        (Some(answer), _) => answer.send_reset(reason),
        (None, Some(status)) if reset.is_none() => {
            exchange.flow.answers(status, false);
            refuse(&mut back.respond, status, response.why, *grpc, exchange.request.head_only);
        }
        (None, _) => back.respond.send_reset(reason),
    }
    response.ended
}

/// Sends a complete answer of our own.
pub fn refuse(respond: &mut SendResponse<Bytes>, status: u16, why: &str, grpc: bool, head_only: bool) {
    // If the client has gone, it needs no answer, so ignore errors.
    if grpc {
        let _ = respond.send_response(grpc::trailers_only(grpc::code_of(status), why), true);
        return;
    }
    let mut head = TypedHead::default();
    let text = failure::put_head(status, why, &mut head);
    if let Some(head) = head.into_response()
        && let Ok(mut sent) = respond.send_response(head, head_only)
        && !head_only
    {
        let _ = sent.send_data(text.into(), true);
    }
}

impl ClientSide {
    /// Runs `work`, during which nothing is read from the client, and ends it if the client resets the stream: a
    /// request that the client no longer waits for must not be sent to the app.
    async fn watched<T>(&mut self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let mut work = pin!(work);
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(done) => Poll::Ready(done),
            Poll::Pending => self.back.respond.poll_reset(cx).map(|gone| Err(client_gone(gone, &self.reset))),
        })
        .await
    }
}

impl RequestBody {
    fn new(from: RecvStream) -> Self {
        Self { from, kept: Some(Vec::new()), kept_bytes: 0, sent: 0, trailers: None }
    }

    /// Whether the request has no body and no trailers at all.
    fn is_empty(&self) -> bool {
        self.kept_bytes == 0 && self.is_whole()
    }

    /// Whether nothing follows the last chunk that was read.
    fn is_whole(&self) -> bool {
        let all_sent = self.kept.as_ref().is_none_or(|kept| kept.len() == self.sent);
        all_sent && self.from.is_end_stream() && self.trailers.is_none()
    }

    /// The next chunk, and whether it is new rather than kept from an earlier try. At the end it returns `None`, and
    /// `trailers` is set if there are any. `keep` tells whether to keep the chunk for another try.
    async fn next(&mut self, keep: bool) -> Result<Option<(Bytes, bool)>, ::h2::Error> {
        if let Some(chunk) = self.kept.as_ref().and_then(|kept| kept.get(self.sent)) {
            self.sent += 1;
            return Ok(Some((chunk.clone(), false)));
        }
        let Some(chunk) = poll_fn(|cx| self.from.poll_data(cx)).await.transpose()? else {
            if self.trailers.is_none() {
                self.trailers = poll_fn(|cx| self.from.poll_trailers(cx)).await?;
            }
            return Ok(None);
        };
        // Count at least 1 KiB per chunk, because even a small one takes memory to keep.
        self.kept_bytes += chunk.len().max(1024);
        self.kept = self.kept.take().filter(|_| keep && self.kept_bytes <= MAX_REPLAY);
        if let Some(kept) = &mut self.kept {
            // Copy it, because the chunk itself keeps the whole read buffer alive.
            kept.push(Bytes::copy_from_slice(&chunk));
            self.sent += 1;
        }
        Ok(Some((chunk, true)))
    }

    /// Returns bytes to the client's window, so that it may send that many more.
    fn took(&mut self, bytes: usize) {
        // This fails only if the stream has ended meanwhile, when it needs no window.
        let _ = self.from.flow_control().release_capacity(bytes);
    }

    /// Rewinds to the start for another try. Returns false if the beginning is no longer kept.
    fn rewind(&mut self) -> bool {
        self.sent = 0;
        self.kept.is_some()
    }
}

/// Records how the client has ended the stream, so that the app's stream is reset with the same reason.
fn client_gone(how: Result<Reason, ::h2::Error>, reset: &Cell<Option<Reason>>) -> Failure {
    reset.set(how.map_or_else(|error| error.reason(), Some));
    Failure::ClientGone
}

/// The failure that an error on the app's side means.
fn app_failed(error: ::h2::Error) -> Failure {
    match error.reason() {
        _ if upstream::was_unprocessed(&error) => Failure::Unprocessed(Reason::REFUSED_STREAM),
        Some(reason) if error.is_reset() && error.is_remote() => Failure::AppReset(reason),
        Some(_) => Failure::AppBroken("the app breaks the rules of HTTP/2"),
        None => Failure::AppGone(Lost::Closed),
    }
}

/// Approximate size of a head while it waits, in bytes.
fn size_of(head: &Request<()>) -> usize {
    head.uri().path().len()
        + head.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>()
}
