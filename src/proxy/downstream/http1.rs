//! One client connection: its requests one after another, the idle time between them, and how it closes.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::config::Limits;
use crate::drain::gate::{Connected, InFlight, InFlightOwned, InFlightTunnel};
use crate::drain::ledger::{Class, LedgerEntry};
use crate::metrics::Ended;
use crate::proxy::buffer::Buffer;
use crate::proxy::connection::{Http2, Idle, Next, Opaque, Tunnel, TunnelKind, TunnelState};
use crate::proxy::first_bytes::{PREFACE, begins_http2, is_http};
use crate::proxy::http1::head::{self, Reject, Request, URI_TOO_LONG, Upgrade};
use crate::proxy::parking;
use crate::proxy::request::exchange::{After, AppHead, Client, Exchange, Flow};
use crate::proxy::request::failure::{self, Failure, LAST_WRITE_TIMEOUT};
use crate::proxy::request::forward::{Finish, forward};
use crate::proxy::request::long_poll::LongPoll;
use crate::proxy::request_log::{RequestLog, Totals};
use crate::proxy::route::Route;
use crate::proxy::shared::{FIRST_REQUEST_TIMEOUT, Shared};
use crate::proxy::socket::keep_alive;
use crate::proxy::stream::{ClientReader, ClientWriter, Stream};
use crate::proxy::worker::Worker;
use crate::upstream::Connection;

/// Time for the bytes that tell what a connection to a captured port speaks; without them it isn't HTTP.
const UNDECIDED_TIMEOUT: Duration = Duration::from_secs(1);

/// What happens to a connection that serves no further request here.
enum Close {
    /// The peer has already closed it.
    Gone,
    /// Close our side first, then wait for the peer's, so that the last response isn't lost.
    Linger,
    /// Reset it, because a response was cut off.
    Reset,
    /// Keep it: it is parked until its next request.
    Rests,
    /// Keep it: it is now a tunnel to the app.
    Tunnels(Box<Upgraded>),
    /// Keep it: it speaks HTTP/2; these bytes of it were read.
    Http2(Buffer),
    /// Keep it: it isn't HTTP; these bytes of it were read.
    Opaque(Buffer, InFlightOwned),
}

/// The result of a 101 response, without the client's side.
struct Upgraded {
    app: Connection,
    app_buf: Buffer,
    client_buf: Buffer,
    websocket: bool,
    in_flight: InFlightTunnel,
    log: RequestLog,
    totals: Totals,
}

/// Why no request head was read.
enum NoHead {
    /// The client disconnected.
    Gone,
    /// The connection speaks HTTP/2.
    Http2,
    /// The connection isn't HTTP.
    Opaque,
    /// The head can't be served.
    Refused(Reject),
}

impl From<Reject> for NoHead {
    fn from(reject: Reject) -> Self {
        Self::Refused(reject)
    }
}

/// Serves a connection's requests as HTTP/1.1 until something else has to take over, and returns that. `accepted` is
/// the time of the accept while the first request is still to come.
pub async fn serve(
    mut stream: Stream,
    peer: SocketAddr,
    connected: Connected,
    route: Rc<Route>,
    mut accepted: Option<Instant>,
    worker: &Worker,
) -> Next {
    let entry = worker.ledger.enter(peer);
    let close = {
        let channel = stream.channel();
        let (reader, writer) = stream.split();
        let peer = peer.ip().to_canonical().to_string();
        let mut client = Client { reader, writer, buf: Buffer::default(), peer, channel };
        let mut serving = pin!(serve_requests(&mut client, worker, &route, &entry, &mut accepted));
        // The drain and the sweeper wake the connection through this task's waker.
        poll_fn(|cx| {
            entry.register(cx);
            serving.as_mut().poll(cx)
        })
        .await
    };
    match close {
        Close::Http2(read) => Next::Http2(Http2 { stream, read, entry, connected, route }),
        Close::Opaque(client_buf, in_flight) => {
            worker.ledger.assign();
            let in_flight = Some(in_flight);
            let opaque = Opaque { client: stream, peer, client_buf, app: None, in_flight, connected, route };
            Next::Opaque(Box::new(opaque))
        }
        Close::Tunnels(upgraded) => Next::Tunnel(upgraded.tunnel(stream, entry, connected, worker)),
        Close::Rests => match stream.rest() {
            Ok(stream) => Next::Park(Idle { stream, peer, connected, route, accepted }),
            Err(_) => Next::Closed,
        },
        Close::Reset => {
            stream.reset_on_close();
            Next::Closed
        }
        Close::Gone => Next::Closed,
        Close::Linger => Next::Close(stream, connected),
    }
}

impl Upgraded {
    fn tunnel(
        self,
        client: Stream,
        entry: LedgerEntry,
        connected: Connected,
        worker: &Worker,
    ) -> Box<Tunnel> {
        let Self { app, app_buf, client_buf, websocket, in_flight, log, totals } = self;
        entry.set_class(if websocket { Class::WebSocket } else { Class::Tunnel });
        keep_alive(client.tcp());
        let moved_at = worker.ledger.now_ms();
        let kind = if websocket { TunnelKind::WebSocket } else { TunnelKind::Raw };
        let state = TunnelState {
            kind,
            app_owes: false,
            unheard: false,
            in_flight,
            log,
            totals,
            moved_at,
            entry,
            connected,
        };
        Box::new(Tunnel { client, app, app_buf, client_buf, state })
    }
}

async fn serve_requests(
    client: &mut Client<ClientReader<'_>, ClientWriter<'_>>,
    worker: &Worker,
    route: &Route,
    entry: &LedgerEntry,
    accepted: &mut Option<Instant>,
) -> Close {
    loop {
        if let Some(close) = first_byte(client, worker, entry, *accepted).await {
            return close;
        }
        let first = accepted.take().is_some();
        entry.set_deadline(0);
        let Ok(in_flight) = worker.shared.gate.admit() else {
            worker.shard.request(503, Ended::Unsent, Duration::ZERO);
            return refuse(client, 503, "shutting down; the request was not processed, send it again", false)
                .await;
        };
        if let Some(close) = one_request(client, worker, route, entry, in_flight, first).await {
            return close;
        }
        entry.end();
    }
}

/// Waits for a request's first byte without holding a buffer. Returns `Some` if no request will come.
async fn first_byte(
    client: &mut Client<ClientReader<'_>, ClientWriter<'_>>,
    worker: &Worker,
    entry: &LedgerEntry,
    accepted: Option<Instant>,
) -> Option<Close> {
    if !client.buf.is_empty() {
        return None;
    }
    let shared = &worker.shared;
    let idle_timeout = shared.settings.limits.idle_timeout;
    let Client { reader, buf, .. } = client;
    let (mut armed, mut overdue, mut closing_since) = (false, false, None);
    poll_fn(|cx| {
        match buf.poll_fill(cx, reader) {
            Poll::Ready(Ok(n)) if n > 0 => return Poll::Ready(None),
            Poll::Ready(Ok(_)) => return Poll::Ready(Some(Close::Linger)),
            Poll::Ready(Err(_)) => return Poll::Ready(Some(Close::Gone)),
            Poll::Pending => {}
        }
        if shared.closing_idle() {
            let since = *closing_since.get_or_insert_with(Instant::now);
            let fresh = accepted.is_some_and(|at| at.elapsed() < FIRST_REQUEST_TIMEOUT);
            // A partial TLS record is the beginning of a request.
            let begun = reader.has_partial() && since.elapsed() < FIRST_REQUEST_TIMEOUT;
            let waits = (fresh || begun) && !shared.forced();
            if !waits && !reader.has_unread() {
                return Poll::Ready(Some(Close::Linger));
            }
            entry.set_deadline(worker.deadline(FIRST_REQUEST_TIMEOUT));
        } else if entry.expired() && reader.has_partial() {
            if overdue {
                return Poll::Ready(Some(Close::Linger));
            }
            overdue = true;
            entry.set_deadline(worker.deadline(shared.settings.limits.head_timeout));
        } else if entry.expired() {
            return Poll::Ready(Some(if idle_timeout > parking::PARK_AFTER {
                Close::Rests
            } else {
                Close::Linger
            }));
        } else if !armed {
            entry.set_deadline(worker.deadline(idle_timeout.min(parking::PARK_AFTER)));
            armed = true;
        }
        Poll::Pending
    })
    .await
}

/// Serves one request whose first byte has arrived; `first` if it is the connection's first. Returns `Some` if this
/// loop ends.
async fn one_request(
    client: &mut Client<ClientReader<'_>, ClientWriter<'_>>,
    worker: &Worker,
    route: &Route,
    entry: &LedgerEntry,
    mut in_flight: InFlight<'_>,
    first: bool,
) -> Option<Close> {
    let since = Instant::now();
    let mut head = AppHead::new(worker.speaks_http2(route, false));
    let mut request = match read_head(client, worker, route, entry, &mut head, first).await {
        Ok(request) => request,
        Err(NoHead::Gone) => return Some(Close::Gone),
        Err(NoHead::Http2) => return Some(Close::Http2(std::mem::take(&mut client.buf))),
        Err(NoHead::Opaque) => {
            let in_flight = in_flight.into_owned(&worker.shared.gate);
            return Some(Close::Opaque(std::mem::take(&mut client.buf), in_flight));
        }
        Err(NoHead::Refused(reject)) => {
            let ended = if reject.status == 503 { Ended::Unsent } else { Ended::Rejected };
            worker.shard.request(reject.status, ended, since.elapsed());
            return Some(refuse(client, reject.status, reject.why, false).await);
        }
    };
    worker.take_in(&mut request, route, &mut in_flight, since, first);
    let unread = client.buf.unread();
    let (method, target) = (&unread[request.method.clone()], &unread[request.target.clone()]);
    entry.begin(method, target, since);
    let long_poll = LongPoll::of(&worker.shared.settings.long_polls, method, target);
    let log =
        RequestLog::new(since, &request, (method, target), &client.peer, worker.shared.settings.access_log);
    client.buf.consume(request.len);

    let exchange = Exchange {
        worker,
        route,
        http2: worker.speaks_http2(route, false),
        entry,
        request: &request,
        long_poll,
        flow: Flow::default(),
    };
    let finish = forward(client, &exchange, head).await;
    let flow = &exchange.flow;
    let (ended, close) = match finish {
        Ok(Finish::Answered(ended)) => (ended, (flow.after() != After::Stays).then_some(Close::Linger)),
        Ok(Finish::Upgraded(app, app_buf)) => {
            let websocket = request.upgrade == Upgrade::WebSocket;
            let client_buf = std::mem::take(&mut client.buf);
            let in_flight = in_flight.into_tunnel(&worker.shared.gate);
            let totals = flow.totals();
            let upgraded = Upgraded { app, app_buf, client_buf, websocket, in_flight, log, totals };
            return Some(Close::Tunnels(Box::new(upgraded)));
        }
        Err(failure) => {
            let (ended, close) = fail(client, &exchange, failure).await;
            (ended, Some(close))
        }
    };
    log.write(&worker.shard, flow.totals(), ended);
    close
}

/// Reads a request's head and writes the app's version of it to `head`. HTTP/2 may begin only in place of the `first`
/// request.
async fn read_head<R, W>(
    client: &mut Client<R, W>,
    worker: &Worker,
    route: &Route,
    entry: &LedgerEntry,
    head: &mut AppHead,
    first: bool,
) -> Result<Request, NoHead>
where
    R: AsyncRead + Unpin,
{
    let shared = &worker.shared;
    let limits = &shared.settings.limits;
    let mut looked = 0;
    // Only the first bytes of a connection to a captured port tell what it speaks.
    let mut undecided = route.captured.as_ref().filter(|_| first);
    loop {
        if undecided.is_some() {
            match is_http(client.buf.unread()) {
                Some(false) => return Err(NoHead::Opaque),
                Some(true) => {
                    undecided = None;
                    entry.set_deadline(worker.deadline(limits.head_timeout));
                }
                None => {}
            }
        }
        let is_http2 = first && begins_http2(client.buf.unread());
        if is_http2 && client.buf.unread().len() >= PREFACE.len() {
            return Err(NoHead::Http2);
        }
        if !is_http2 && (looked == 0 || head::ends_within(client.buf.unread(), looked)) {
            let asked = route.pool.keep_alive.is_asked();
            let sender = shared.sender(&client.peer, &client.channel, &route.host, asked);
            let (unread, max) = (client.buf.unread(), limits.max_fields);
            let parsed = match head {
                AppHead::Http1(out) => head::request(unread, max, sender, out),
                AppHead::Http2(out) => head::request(unread, max, sender, &mut **out),
            };
            if let Some(request) = parsed? {
                if request.len > limits.max_head || request.target.len() > limits.max_uri {
                    return Err(too_large(client.buf.unread(), limits).into());
                }
                entry.set_deadline(0);
                return Ok(request);
            }
        }
        if looked == 0 {
            let limit = if undecided.is_some() { UNDECIDED_TIMEOUT } else { limits.head_timeout };
            entry.set_deadline(worker.deadline(limit));
        }
        looked = client.buf.unread().len();
        if looked >= limits.max_head {
            return Err(too_large(client.buf.unread(), limits).into());
        }
        match read_more(client, shared, entry).await {
            Err(NoHead::Refused(reject)) if undecided.is_some() && reject.status == 408 => {
                return Err(NoHead::Opaque);
            }
            read => read?,
        }
    }
}

/// Reads more of a head.
async fn read_more<R, W>(
    client: &mut Client<R, W>,
    shared: &Shared,
    entry: &LedgerEntry,
) -> Result<(), NoHead>
where
    R: AsyncRead + Unpin,
{
    let Client { reader, buf, .. } = client;
    let read = poll_fn(|cx| match buf.poll_fill(cx, reader) {
        Poll::Ready(read) => Poll::Ready(Ok(read)),
        Poll::Pending if entry.expired() => {
            Poll::Ready(Err(Reject { status: 408, why: "the request's head came too slowly" }))
        }
        Poll::Pending if shared.forced() => {
            Poll::Ready(Err(Reject { status: 503, why: "shutting down; the request was not complete" }))
        }
        Poll::Pending => Poll::Pending,
    });
    match read.await? {
        Ok(0) | Err(_) => Err(NoHead::Gone),
        Ok(_) => Ok(()),
    }
}

/// Returns which part of a head is too large: the target, or the head as a whole (RFC 9110 §15.5.15, RFC 6585 §5).
fn too_large(head: &[u8], limits: &Limits) -> Reject {
    let target = head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
    match target.len() > limits.max_uri {
        true => URI_TOO_LONG,
        false => Reject { status: 431, why: "the request's head is too large (--max-head)" },
    }
}

/// Ends a failed request: with an error response if one is still possible, else by cutting the connection.
async fn fail<R, W: AsyncWrite + Unpin>(
    client: &mut Client<R, W>,
    exchange: &Exchange<'_>,
    failure: Failure,
) -> (Ended, Close) {
    let response = failure.response(exchange.flow.progress());
    let close = match response.status {
        // Half of an interim response is out: the client could not tell another response from the rest of it.
        Some(_) if exchange.flow.is_writing() => Close::Reset,
        Some(status) => {
            exchange.flow.answers(status, false);
            refuse(client, status, response.why, exchange.request.head_only).await
        }
        None if failure == Failure::ClientGone => Close::Gone,
        None => Close::Reset,
    };
    (response.ended, close)
}

/// Writes our own error response, after which the connection closes.
async fn refuse<R, W: AsyncWrite + Unpin>(
    client: &mut Client<R, W>,
    status: u16,
    why: &str,
    head_only: bool,
) -> Close {
    let answer = failure::answer(status, why, head_only);
    match tokio::time::timeout(LAST_WRITE_TIMEOUT, client.writer.write_all(&answer)).await {
        Ok(Ok(())) => Close::Linger,
        _ => Close::Reset,
    }
}
