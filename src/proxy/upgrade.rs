//! Tunnels: an upgraded connection or one of `--tcp`, bytes both ways until both sides have ended. A WebSocket is told to
//! go by a Close frame on a frame boundary; any other tunnel can only run on until the deadline, and what resets one
//! side of it resets the other.

use std::cell::Cell;
use std::future::{Future, pending, poll_fn};
use std::os::fd::AsFd;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest};
use tokio::sync::Notify;
use tokio::task::spawn_local;

use super::buffer::Buffer;
use super::conn::shut;
use super::frames::{Frames, close_to_app, close_to_client};
use super::park;
use super::plane::Worker;
use super::record::{Record, Totals};
use super::stream::{self, Stream};
use crate::drain::gate::{Connected, InFlightTunnel};
use crate::drain::ledger::{Class, Place};
use crate::metrics::Ended;
use crate::upstream::{self, Connection, Parked};

/// Both sides have so long to answer a Close of ours.
const CLOSING: Duration = Duration::from_secs(2);

/// A connection that has just become a tunnel, or one that has rested and goes on.
pub struct Upgraded {
    /// The app's connection, and what was read from it and not yet passed on.
    pub app: Connection,
    /// See `app`.
    pub app_buf: Buffer,
    /// What was read from the client and not yet passed on.
    pub client_buf: Buffer,
    /// What else is known of it.
    pub tunnel: Tunnel,
}

/// What is known of a tunnel besides its two connections.
pub struct Tunnel {
    /// A WebSocket, whose frames are followed.
    pub websocket: bool,
    /// One of `--tcp`, whose client has sent nothing yet: a health check never does, so it is no arrival so far.
    pub unheard: bool,
    /// Counted until the tunnel closes; a probe isn't.
    pub in_flight: Option<InFlightTunnel>,
    /// Written once it has closed.
    pub record: Record,
    /// Of the handshake, and of what has passed since.
    pub totals: Totals,
    /// When something moved last, in milliseconds of the ledger's clock.
    pub moved_at: u64,
}

/// A tunnel between two frames over which nothing moves: no task and no buffer, only this.
pub struct Resting {
    /// The client's connection.
    pub client: stream::Resting,
    /// The app's connection.
    pub app: Parked,
    /// What else is known of it.
    pub tunnel: Tunnel,
    place: Place,
    connected: Connected,
}

/// One direction of a tunnel.
#[derive(Default)]
struct Direction {
    /// Bytes that it has passed on.
    moved: Cell<u64>,
    /// It waits for a frame's first byte.
    rests: Cell<bool>,
}

/// Which end of a direction failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failed {
    Source,
    Sink,
}

/// What the two directions know of each other.
#[derive(Default)]
struct Ends {
    up: Direction,
    down: Direction,
    /// The tunnel is to end.
    told: Cell<bool>,
    /// Nothing has moved for too long.
    quiet: Cell<bool>,
    /// A direction got its Close from us.
    ours: Cell<bool>,
    ours_sent: Notify,
    /// One direction has ended.
    half: Cell<bool>,
    whole: Notify,
}

/// The half of a connection that is read from.
trait Half: AsyncRead + Unpin {
    /// Returns once the connection has failed, also after its orderly end.
    fn failed(&self) -> impl Future<Output = ()>;
}

impl Half for stream::Reader<'_> {
    fn failed(&self) -> impl Future<Output = ()> {
        stream::Source::failed(self)
    }
}

impl Half for upstream::Reader<'_> {
    async fn failed(&self) {
        let _ = match self {
            Self::Tcp(half) => half.as_ref().ready(Interest::ERROR).await,
            Self::Tls(half) => half.tcp().ready(Interest::ERROR).await,
            Self::Unix(half) => half.as_ref().ready(Interest::ERROR).await,
        };
    }
}

impl Resting {
    /// When something moved last, in milliseconds of the ledger's clock.
    pub fn moved_at(&self) -> u64 {
        self.tunnel.moved_at
    }

    /// Relays again.
    pub fn go_on(self, worker: &Rc<Worker>) {
        let Self { client, app, tunnel, place, connected } = self;
        match (client.go_on(), app.unpark()) {
            (Ok(client), Ok(app)) => {
                let upgraded =
                    Upgraded { app, app_buf: Buffer::default(), client_buf: Buffer::default(), tunnel };
                spawn_local(Box::new(upgraded).run(client, place, connected, worker.clone()));
            }
            // Both connections are closed by now.
            _ => tunnel.record.write(worker, tunnel.totals, Ended::Cut),
        }
    }
}

impl Upgraded {
    /// Goes on in a task of its own, which is a fraction of the size of the one that served the handshake.
    pub fn begin(self: Box<Self>, client: Stream, place: Place, connected: Connected, worker: Rc<Worker>) {
        place.set_class(if self.tunnel.websocket { Class::WebSocket } else { Class::Tunnel });
        keep_alive(client.tcp());
        spawn_local(self.run(client, place.hand_over(), connected, worker));
    }

    /// Relays until both sides have ended, or the drain ends it, and closes the client's connection; or until nothing
    /// has moved for a while, and parks it.
    pub async fn run(
        mut self: Box<Self>,
        mut client: Stream,
        place: Place,
        connected: Connected,
        worker: Rc<Worker>,
    ) {
        let (ends, mut watch) = (Ends::default(), Watch::new(&self.tunnel, &worker));
        let websocket = self.tunnel.websocket;
        let backend = self.app.backend().clone();
        let ended = {
            let mut relaying = pin!(self.relay(&mut client, &worker, &ends));
            poll_fn(|cx| {
                place.register(cx);
                if let Poll::Ready(ended) = relaying.as_mut().poll(cx) {
                    return Poll::Ready(Some(ended));
                }
                if worker.plane.forced() {
                    return Poll::Ready(Some(Ended::Cut));
                }
                if watch.is_over(&ends, &worker) && !ends.quiet.replace(true) {
                    return match websocket {
                        true => relaying.as_mut().poll(cx).map(Some),
                        false => Poll::Ready(Some(Ended::TimedOut)),
                    };
                }
                if place.expired() && ends.rest() && !worker.plane.ends_tunnel(websocket, &backend) {
                    return Poll::Ready(None);
                }
                place.set_deadline(worker.deadline(watch.look));
                Poll::Pending
            })
            .await
        };
        let tunnel = &mut self.tunnel;
        tunnel.totals.sent += ends.down.moved.get();
        tunnel.totals.received += ends.up.moved.get();
        (tunnel.unheard, tunnel.moved_at) = (watch.unheard, watch.moved_at);
        let Some(ended) = ended else { return self.park(client, place, connected, &worker) };
        tunnel.record.write(&worker, tunnel.totals, ended);
        let reset = match ended {
            Ended::Cut => true,
            Ended::ClientGone | Ended::AppGone | Ended::TimedOut => !websocket,
            _ => false,
        };
        if reset {
            client.reset_on_close();
            reset_on_close(&mut self.app);
        }
        drop((self, place));
        if !reset {
            shut(client, connected, &worker).await;
        }
    }

    /// Nothing of it is lost: both directions stand between two frames, and no byte is buffered.
    fn park(self, client: Stream, place: Place, connected: Connected, worker: &Rc<Worker>) {
        let Self { app, tunnel, .. } = self;
        if let (Ok(client), Ok(app)) = (client.rest(), app.park()) {
            let place = place.hand_over();
            worker.parking.park_tunnel(Resting { client, app, tunnel, place, connected }, worker);
        }
    }

    async fn relay(&mut self, client: &mut Stream, worker: &Worker, ends: &Ends) -> Ended {
        let Self { app, app_buf, client_buf, tunnel: Tunnel { websocket, .. } } = self;
        let (mut app_reader, mut app_writer, backend) = app.split();
        let (mut reader, mut writer) = client.split();
        let (to_app, to_client) = (close_to_app(), close_to_client());
        let to_app = websocket.then_some(&to_app[..]);
        let to_client = websocket.then_some(&to_client[..]);
        let up = direction(ends, &mut reader, client_buf, &mut app_writer, to_app, &ends.up);
        let down = direction(ends, &mut app_reader, app_buf, &mut writer, to_client, &ends.down);
        // A direction that fails takes the other with it: nobody is left to read that one.
        let both = async {
            let up = async { up.await.map_err(|failed| failed == Failed::Sink) };
            let down = async { down.await.map_err(|failed| failed == Failed::Source) };
            tokio::try_join!(up, down).map(drop)
        };
        let told = async {
            if !*websocket {
                return pending().await;
            }
            tokio::select! {
                () = worker.plane.stream_end(backend) => {}
                () = poll_fn(|_| if ends.quiet.get() { Poll::Ready(()) } else { Poll::Pending }) => {}
            }
            ends.told.set(true);
            // One that stands in the middle of a frame gets no Close; nobody waits for it again when it was too quiet.
            let sent = ends.ours_sent.notified();
            match ends.quiet.get() {
                true => drop(tokio::time::timeout(CLOSING, sent).await),
                false => sent.await,
            }
            tokio::time::sleep(CLOSING).await;
            Ok(())
        };
        // `told` first: it sets what the directions look at in the same poll.
        let ended = tokio::select! {
            biased;
            ended = told => ended,
            ended = both => ended,
        };
        match ended {
            _ if ends.quiet.get() => Ended::TimedOut,
            _ if ends.ours.get() => Ended::WebSocketEnded,
            Err(app) if app && !*websocket => Ended::AppGone,
            Err(_) => Ended::ClientGone,
            Ok(()) => Ended::Complete,
        }
    }
}

impl Ends {
    /// Nothing is under way in either direction.
    fn rest(&self) -> bool {
        self.up.rests.get() && self.down.rests.get() && !self.told.get()
    }

    /// One direction has ended: waits for the other one, unless this one's source goes away for sure.
    async fn other_half(&self, source: &impl Half) -> Result<(), Failed> {
        if self.half.replace(true) {
            self.whole.notify_one();
            return Ok(());
        }
        tokio::select! {
            biased;
            () = self.whole.notified() => Ok(()),
            () = source.failed() => Err(Failed::Source),
        }
    }
}

/// Looks after each poll what has come of a tunnel.
struct Watch {
    unheard: bool,
    moved: u64,
    moved_at: u64,
    /// How often it is looked at.
    look: Duration,
}

impl Watch {
    fn new(tunnel: &Tunnel, worker: &Worker) -> Self {
        let timeout = worker.plane.settings.limits.tunnel_timeout;
        let look = if timeout.is_zero() { park::AFTER } else { park::AFTER.min(timeout) };
        Self { unheard: tunnel.unheard, moved: 0, moved_at: tunnel.moved_at, look }
    }

    /// Whether nothing has moved for `--tunnel-timeout`.
    fn is_over(&mut self, ends: &Ends, worker: &Worker) -> bool {
        if self.unheard && ends.up.moved.get() > 0 {
            self.unheard = false;
            worker.arrival(Instant::now(), true);
        }
        let moved = ends.up.moved.get() + ends.down.moved.get();
        if moved != self.moved {
            (self.moved, self.moved_at) = (moved, worker.ledger.now_ms());
        }
        worker.too_quiet(self.moved_at)
    }
}

/// A peer that vanished without a word would hold its tunnel, and a drain, for ever.
pub fn keep_alive(client: &impl AsFd) {
    let probes =
        TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(20));
    let _ = SockRef::from(client).set_tcp_keepalive(&probes.with_retries(3));
}

/// Resets the connection to the app when it is closed. A unix socket has no reset: it ends.
fn reset_on_close(app: &mut Connection) {
    let _ = match app.split().1 {
        upstream::Writer::Tcp(half) => SockRef::from(half.as_ref()).set_linger(Some(Duration::ZERO)),
        upstream::Writer::Tls(half) => SockRef::from(half.tcp()).set_linger(Some(Duration::ZERO)),
        upstream::Writer::Unix(_) => Ok(()),
    };
}

/// Relays one direction until its source ends. With `close` it is a WebSocket's: once told to end, the sink gets
/// that frame at the next boundary, and what the source still sends is read and dropped until it closes too.
async fn direction<S, D>(
    ends: &Ends,
    source: &mut S,
    buf: &mut Buffer,
    sink: &mut D,
    close: Option<&[u8]>,
    own: &Direction,
) -> Result<(), Failed>
where
    S: Half,
    D: AsyncWrite + Unpin,
{
    let mut frames = Frames::default();
    let mut closed_by_us = false;
    loop {
        let unread = buf.unread();
        let boundary = if close.is_some() { frames.follow(unread) } else { 0 };
        own.moved.set(own.moved.get() + unread.len() as u64);
        // A frame that has begun goes on to its end; what follows the boundary then is dropped.
        let ending = ends.told.get() && !closed_by_us;
        let pass = match (closed_by_us, ending && boundary > 0 && !frames.closed()) {
            (true, _) => 0,
            (false, true) => boundary,
            (false, false) => unread.len(),
        };
        sink.write_all(&unread[..pass]).await.map_err(|_| Failed::Sink)?;
        let n = buf.unread().len();
        let filled = n > 0 && n == buf.capacity();
        buf.consume(n);
        if filled {
            buf.grow();
        }
        if frames.closed() && frames.at_boundary() && closed_by_us {
            return Ok(());
        }
        let at_boundary = boundary > 0 || frames.at_boundary();
        if let Some(close) = close.filter(|_| ending && at_boundary && !frames.closed()) {
            closed_by_us = true;
            ends.ours.set(true);
            ends.ours_sent.notify_one();
            sink.write_all(close).await.map_err(|_| Failed::Sink)?;
        }
        let waits_to_end = close.is_some() && !closed_by_us && !ends.told.get();
        let read = poll_fn(|cx| match buf.poll_fill(cx, source) {
            Poll::Ready(read) => Poll::Ready(read.map_err(|_| Failed::Source)),
            Poll::Pending if waits_to_end && ends.told.get() => Poll::Ready(Ok(usize::MAX)),
            Poll::Pending => Poll::Pending,
        });
        own.rests.set(frames.at_boundary() && !frames.closed() && !closed_by_us);
        let read = read.await?;
        own.rests.set(false);
        if read == 0 {
            let _ = sink.shutdown().await;
            if close.is_some() {
                return Ok(());
            }
            return ends.other_half(source).await;
        }
    }
}
