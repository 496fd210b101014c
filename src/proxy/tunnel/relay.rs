//! Tunnels: relays an upgraded connection, one of `--tcp` or one of a captured port both ways until both sides have
//! ended. A drain ends a WebSocket with a Close frame between two messages, and a connection to a captured port where
//! it is quiet; any other tunnel runs until the deadline. A reset of one side is passed on to the other.

use std::future::{Future, pending, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::directions::{Ends, Failed, Stage, direction, when};
use super::websocket::{close_to_app, close_to_client};
use crate::metrics::Ended;
use crate::proxy::buffer::Buffer;
use crate::proxy::connection::{Next, ParkedTunnel, Tunnel, TunnelKind, TunnelState};
use crate::proxy::parking;
use crate::proxy::stream::Stream;
use crate::proxy::worker::Worker;
use crate::upstream::{self, Connection};

/// Time limit for both sides to answer our Close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Relays until both sides have ended, the drain ends the tunnel, or nothing has moved for a while. Returns what
/// becomes of the client's connection.
pub async fn run(tunnel: Box<Tunnel>, worker: &Worker) -> Next {
    let Tunnel { mut client, mut app, mut app_buf, mut client_buf, mut state } = *tunnel;
    let (ends, mut watch) = (Ends::default(), Watch::new(&state, worker));
    let websocket = state.kind == TunnelKind::WebSocket;
    let backend = app.backend().clone();
    let ended = {
        let sides = TunnelSides {
            client: &mut client,
            client_buf: &mut client_buf,
            app: &mut app,
            app_buf: &mut app_buf,
        };
        let mut relaying = pin!(relay(sides, websocket, worker, &ends));
        poll_fn(|cx| {
            state.entry.register(cx);
            if let Poll::Ready(ended) = relaying.as_mut().poll(cx) {
                return Poll::Ready(Some(ended));
            }
            if worker.shared.forced() {
                return Poll::Ready(Some(Ended::Cut));
            }
            let over = watch.is_over(&ends, worker);
            (state.app_owes, state.moved_at) = (watch.app_owes, watch.moved_at);
            if over && !ends.quiet.replace(true) {
                return match websocket {
                    true => relaying.as_mut().poll(cx).map(Some),
                    false => Poll::Ready(Some(Ended::TimedOut)),
                };
            }
            let to_end = state.is_to_end(&worker.shared, &backend, worker.ledger.now_ms());
            if to_end && matches!(state.kind, TunnelKind::Opaque { .. }) && !ends.is_writing() {
                return Poll::Ready(Some(Ended::QuietEnded));
            }
            if state.entry.expired() && ends.rest() && !to_end {
                return Poll::Ready(None);
            }
            state.entry.set_deadline(worker.deadline(watch.interval));
            Poll::Pending
        })
        .await
    };
    state.totals.sent += ends.down.moved.get();
    state.totals.received += ends.up.moved.get();
    state.unheard = watch.unheard;
    let Some(ended) = ended else { return park(client, app, state) };
    state.log.write(&worker.shard, state.totals, ended);
    let reset = match ended {
        Ended::Cut => true,
        Ended::ClientGone | Ended::AppGone | Ended::TimedOut => !websocket,
        _ => false,
    };
    if reset {
        client.reset_on_close();
        reset_on_close(&mut app);
        return Next::Closed;
    }
    Next::Close(client, state.connected)
}

/// Loses nothing: both directions are between two messages, and no byte is buffered.
fn park(client: Stream, app: Connection, state: TunnelState) -> Next {
    match (client.rest(), app.park()) {
        (Ok(client), Ok(app)) => Next::ParkTunnel(ParkedTunnel { client, app, state }),
        _ => Next::Closed,
    }
}

/// Makes a parked tunnel usable by a task; `None` if the runtime doesn't take its sockets, which are then closed.
pub fn unpark(parked: ParkedTunnel, worker: &Worker) -> Option<Box<Tunnel>> {
    let ParkedTunnel { client, app, state } = parked;
    match (client.go_on(), app.unpark()) {
        (Ok(client), Ok(app)) => {
            let (app_buf, client_buf) = (Buffer::default(), Buffer::default());
            Some(Box::new(Tunnel { client, app, app_buf, client_buf, state }))
        }
        _ => {
            state.log.write(&worker.shard, state.totals, Ended::Cut);
            None
        }
    }
}

/// A tunnel's two connections, and the bytes read from each and not yet passed on.
struct TunnelSides<'a> {
    client: &'a mut Stream,
    client_buf: &'a mut Buffer,
    app: &'a mut Connection,
    app_buf: &'a mut Buffer,
}

async fn relay(sides: TunnelSides<'_>, websocket: bool, worker: &Worker, ends: &Ends) -> Ended {
    let TunnelSides { client, client_buf, app, app_buf } = sides;
    let (mut app_reader, mut app_writer, backend) = app.split();
    let (mut reader, mut writer) = client.split();
    let (to_app, to_client) = (close_to_app(), close_to_client());
    let to_app = websocket.then_some(&to_app[..]);
    let to_client = websocket.then_some(&to_client[..]);
    let up = direction(ends, &mut reader, client_buf, &mut app_writer, to_app, (&ends.up, &ends.down));
    let down = direction(ends, &mut app_reader, app_buf, &mut writer, to_client, (&ends.down, &ends.up));
    // If one direction fails to write, the other ends too: nothing reads from that peer any more.
    let both = async {
        let up = async { up.await.map_err(|failed| failed == Failed::Sink) };
        let down = async { down.await.map_err(|failed| failed == Failed::Source) };
        tokio::try_join!(up, down).map(drop)
    };
    let close_requested = async {
        if !websocket {
            return pending().await;
        }
        tokio::select! {
            () = worker.shared.stream_end(backend) => {}
            () = when(|| ends.quiet.get()) => {}
        }
        ends.close_requested.set(true);
        // A direction that was quiet for too long in the middle of a message is not waited for again.
        let closed = when(|| ends.up.is(Stage::Closed) && ends.down.is(Stage::Closed));
        match ends.quiet.get() {
            true => drop(tokio::time::timeout(CLOSE_TIMEOUT, closed).await),
            false => closed.await,
        }
        tokio::time::sleep(CLOSE_TIMEOUT).await;
        Ok(())
    };
    let mut relaying = pin!(async {
        // `told` comes first: it sets flags that the directions read in the same poll.
        tokio::select! {
            biased;
            ended = close_requested => ended,
            ended = both => ended,
        }
    });
    let ended = poll_fn(|cx| {
        let ended = relaying.as_mut().poll(cx);
        if ended.is_pending() && ends.news.take() {
            cx.waker().wake_by_ref();
        }
        ended
    });
    ends.response(ended.await, websocket)
}

/// Checks a tunnel's progress after each poll.
struct Watch {
    unheard: bool,
    /// The client sent the last byte.
    app_owes: bool,
    /// Bytes moved so far, up and down.
    moved: (u64, u64),
    moved_at: u64,
    /// The time between checks.
    interval: Duration,
}

impl Watch {
    fn new(tunnel: &TunnelState, worker: &Worker) -> Self {
        let timeout = worker.shared.settings.limits.tunnel_timeout;
        let interval = if timeout.is_zero() { parking::PARK_AFTER } else { parking::PARK_AFTER.min(timeout) };
        let TunnelState { unheard, app_owes, moved_at, .. } = *tunnel;
        Self { unheard, app_owes, moved: (0, 0), moved_at, interval }
    }

    /// Whether nothing has moved for `--tunnel-timeout`.
    fn is_over(&mut self, ends: &Ends, worker: &Worker) -> bool {
        if self.unheard && ends.up.moved.get() > 0 {
            self.unheard = false;
            worker.arrival(Instant::now(), true);
        }
        let moved = (ends.up.moved.get(), ends.down.moved.get());
        if moved != self.moved {
            // Within one poll the client's bytes were relayed first.
            self.app_owes = moved.1 == self.moved.1;
            (self.moved, self.moved_at) = (moved, worker.ledger.now_ms());
        }
        worker.too_quiet(self.moved_at)
    }
}

/// Makes the close of the app's connection a reset. A unix socket has no reset: it just ends.
fn reset_on_close(app: &mut Connection) {
    let _ = match app.split().1 {
        upstream::UpstreamWriter::Tcp(half) => SockRef::from(half.as_ref()).set_linger(Some(Duration::ZERO)),
        upstream::UpstreamWriter::Tls(half) => SockRef::from(half.tcp()).set_linger(Some(Duration::ZERO)),
        upstream::UpstreamWriter::Unix(_) => Ok(()),
    };
}
