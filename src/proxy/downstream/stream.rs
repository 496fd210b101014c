//! One stream: a request like any other, from its fields to its last frame.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use ::h2::server::SendResponse;
use ::h2::{Reason, RecvStream};
use bytes::Bytes;
use http::request::Parts;

use super::streams::{Ending, Http2Connection};
use crate::config::UpstreamProtocol;
use crate::metrics::Ended;
use crate::proxy::buffer::Buffer;
use crate::proxy::http1::head::{Reject, Request, URI_TOO_LONG};
use crate::proxy::http2::adapter::Adapter;
use crate::proxy::http2::grpc;
use crate::proxy::http2::head;
use crate::proxy::http2::head::reason;
use crate::proxy::request::exchange::{After, AppHead, Client, Exchange, Flow};
use crate::proxy::request::failure::Failure;
use crate::proxy::request::forward::{Finish, forward};
use crate::proxy::request::long_poll::LongPoll;
use crate::proxy::request::relay_http2;
use crate::proxy::request_log::{RequestLog, Totals};

const NO_GRPC: Reject =
    Reject { status: 501, why: "the app speaks HTTP/1.1 only (--upstream-protocol), which can't carry gRPC" };

/// Serves a newly accepted stream.
pub async fn serve(
    connection: Rc<Http2Connection>,
    id: u32,
    request: http::Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let (worker, since) = (&*connection.worker, Instant::now());
    let (gate, ledger) = (&worker.shared.gate, &worker.ledger);
    let Ok(mut in_flight) = gate.admit() else {
        worker.shard.request(0, Ended::Unsent, Duration::ZERO);
        connection.forget(id);
        return respond.send_reset(Reason::REFUSED_STREAM);
    };
    ledger.assign();
    let entry = ledger.enter(connection.peer);
    // The drain and the sweeper wake the stream through this task's waker.
    poll_fn(|cx| {
        entry.register(cx);
        Poll::Ready(())
    })
    .await;

    let (parts, body) = request.into_parts();
    let call = grpc::is_call_by(&parts.headers);
    let settings = &worker.shared.settings;
    let http2 = worker.speaks_http2(&connection.route, true);
    let mut head = AppHead::new(call || http2);
    let mut request = match read_head(&connection, &parts, &body, call, &mut head) {
        Ok(request) => request,
        Err(reject) => {
            let head_only = parts.method == http::Method::HEAD;
            relay_http2::refuse(&mut respond, reject.status, reject.why, call, head_only);
            let (in_flight, totals, ended) = (in_flight.into_owned(gate), Totals::default(), Ended::Rejected);
            worker.shard.request(reject.status, ended, since.elapsed());
            let ending = Ending { log: None, totals, ended, _in_flight: in_flight, _entry: entry };
            return connection.ended(id, ending);
        }
    };
    worker.take_in(&mut request, &connection.route, &mut in_flight, since, id == 1);
    let in_flight = in_flight.into_owned(gate);
    let path = parts.uri.path_and_query().map_or("", |path| path.as_str());
    let (method, target) = (parts.method.as_str().as_bytes(), path.as_bytes());
    entry.begin(method, target, since);
    let long_poll = LongPoll::of(&settings.long_polls, method, target);
    let log = RequestLog::new(since, &request, (method, target), &connection.peer_text, settings.access_log);

    let (route, flow) = (&*connection.route, Flow::default());
    let exchange = Exchange { worker, route, http2, entry: &entry, request: &request, long_poll, flow };
    // Only the HTTP/1.1 path can end an event stream or a long poll early.
    let by_itself = !request.reopens && long_poll.is_none();
    let ended = match head {
        AppHead::Http2(head) if call || by_itself => {
            relay_http2::relay(&exchange, *head, call, body, respond).await
        }
        head => by_http1(&connection, &exchange, body, respond, head).await,
    };
    if exchange.flow.after() == After::AppGoes {
        connection.app_goes.set(true);
    }
    let totals = exchange.flow.totals();
    let ending = Ending { log: Some(log), totals, ended, _in_flight: in_flight, _entry: entry };
    connection.ended(id, ending);
}

/// Writes the app's version of a request's head to `head`; `call` if it is a gRPC call.
fn read_head(
    connection: &Http2Connection,
    parts: &Parts,
    body: &RecvStream,
    call: bool,
    head: &mut AppHead,
) -> Result<Request, Reject> {
    let shared = &connection.worker.shared;
    let sender = shared.sender(
        &connection.peer_text,
        &connection.channel,
        &connection.route.host,
        connection.route.pool.keep_alive.is_asked(),
    );
    let (max, ended) = (shared.settings.limits.max_fields, body.is_end_stream());
    let request = match head {
        AppHead::Http1(out) => head::request(parts, max, ended, sender, out),
        AppHead::Http2(out) => head::request(parts, max, ended, sender, &mut **out),
    }?;
    // A call needs trailers and both directions at once.
    let refused = call && shared.settings.upstream_protocol == UpstreamProtocol::Http1;
    match request.target.len() > shared.settings.limits.max_uri {
        true => Err(URI_TOO_LONG),
        false if refused => Err(NO_GRPC),
        false => Ok(request),
    }
}

/// Sends the request to the app over HTTP/1.1, and the response to the client.
async fn by_http1(
    connection: &Http2Connection,
    exchange: &Exchange<'_>,
    body: RecvStream,
    respond: SendResponse<Bytes>,
    head: AppHead,
) -> Ended {
    let adapter = Adapter::new(exchange.request.framing, exchange.request.head_only, body, respond);
    let (reader, writer) = adapter.split();
    let peer = connection.peer_text.clone();
    let channel = connection.channel.clone();
    let mut client = Client { reader, writer, buf: Buffer::default(), peer, channel };
    let ended = match forward(&mut client, exchange, head).await {
        Ok(Finish::Answered(ended)) => ended,
        // Unreachable: a stream can't ask for an upgrade.
        Ok(Finish::Upgraded(..)) => Ended::AppBroken,
        Err(failure) => fail(&adapter, exchange, failure),
    };
    if !adapter.is_whole() && ended != Ended::ClientGone {
        adapter.reset(reason(ended));
    }
    ended
}

/// Ends a failed request, with an error response if one is still possible.
fn fail(adapter: &Adapter, exchange: &Exchange<'_>, failure: Failure) -> Ended {
    let response = failure.response(exchange.flow.progress());
    if let Some(status) = response.status {
        exchange.flow.answers(status, false);
        adapter.respond(|respond, head_only| {
            relay_http2::refuse(respond, status, response.why, false, head_only);
        });
    }
    response.ended
}
