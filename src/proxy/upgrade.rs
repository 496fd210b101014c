//! Tunnels: an upgraded connection, bytes both ways until both sides have ended. A WebSocket is told to go by a
//! Close frame on a frame boundary; any other tunnel can only run on until the deadline.

use std::cell::Cell;
use std::future::{Future, pending, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::buffer::{Buffer, Store};
use super::conn::shut;
use super::error::Failure;
use super::exchange::reset_on_close;
use super::frames::{Frames, close_to_app, close_to_client};
use super::plane::Worker;
use super::record::{Record, Totals};
use crate::drain::gate::{Connected, InFlightTunnel};
use crate::drain::ledger::{Class, Place};
use crate::metrics::Ended;
use crate::upstream::Connection;

/// Both sides have so long to answer a Close of ours.
const CLOSING: Duration = Duration::from_secs(2);

/// An upgraded connection, ready to be relayed.
pub struct Tunnel {
    /// The app's connection, and what was read from it and not yet passed on.
    pub app: Connection,
    /// See `app`.
    pub app_buf: Buffer,
    /// What was read from the client and not yet passed on.
    pub client_buf: Buffer,
    /// A WebSocket, whose frames are followed.
    pub websocket: bool,
    /// Counted until the tunnel closes; a probe isn't.
    pub in_flight: Option<InFlightTunnel>,
    /// Written once it has closed.
    pub record: Record,
    /// Of the handshake.
    pub totals: Totals,
}

/// What the two directions know of each other.
#[derive(Default)]
struct Ends {
    /// The drain wants the tunnel to end.
    told: Cell<bool>,
    /// A direction got its Close from us.
    ours: Cell<bool>,
    ours_sent: Notify,
    sent: Cell<u64>,
    received: Cell<u64>,
}

impl Tunnel {
    /// Relays until both sides have ended, or the drain ends it, and closes the client's connection.
    pub async fn run(
        mut self: Box<Self>,
        mut client: TcpStream,
        place: Place,
        connected: Connected,
        worker: Rc<Worker>,
    ) {
        place.set_class(if self.websocket { Class::WebSocket } else { Class::Tunnel });
        keep_alive(&client);
        let ends = Ends::default();
        let ended = {
            let mut relaying = pin!(self.relay(&mut client, &worker, &ends));
            poll_fn(|cx| {
                place.register(cx);
                match relaying.as_mut().poll(cx) {
                    Poll::Pending if worker.plane.forced() => Poll::Ready(Ended::Cut),
                    polled => polled,
                }
            })
            .await
        };
        self.totals.sent += ends.sent.get();
        self.totals.received += ends.received.get();
        self.record.write(&worker, self.totals, ended);
        drop((self, place));
        match ended {
            Ended::Cut => reset_on_close(&client),
            _ => shut(client, connected, &worker).await,
        }
    }

    async fn relay(&mut self, client: &mut TcpStream, worker: &Worker, ends: &Ends) -> Ended {
        let Self { app, app_buf, client_buf, websocket, .. } = self;
        let (mut app_reader, mut app_writer, backend) = app.split();
        let (mut reader, mut writer) = client.split();
        let (to_app, to_client) = (close_to_app(), close_to_client());
        let to_app = websocket.then_some(&to_app[..]);
        let to_client = websocket.then_some(&to_client[..]);
        let store = &worker.store;
        let up = direction(store, ends, &mut reader, client_buf, &mut app_writer, to_app, &ends.received);
        let down = direction(store, ends, &mut app_reader, app_buf, &mut writer, to_client, &ends.sent);
        // A direction that fails takes the other with it: nobody is left to read that one.
        let both = async { tokio::try_join!(up, down).map(drop) };
        let told = async {
            if !*websocket {
                return pending().await;
            }
            worker.plane.stream_end(backend).await;
            ends.told.set(true);
            ends.ours_sent.notified().await;
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
            _ if ends.ours.get() => Ended::WebSocketEnded,
            Err(_) => Ended::ClientGone,
            Ok(()) => Ended::Complete,
        }
    }
}

/// A peer that vanished without a word would hold its tunnel, and a drain, for ever.
fn keep_alive(client: &TcpStream) {
    let probes =
        TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(20));
    let _ = SockRef::from(client).set_tcp_keepalive(&probes.with_retries(3));
}

/// Relays one direction until its source ends. With `close` it is a WebSocket's: once told to end, the sink gets
/// that frame at the next boundary, and what the source still sends is read and dropped until it closes too.
async fn direction<S, D>(
    store: &Store,
    ends: &Ends,
    source: &mut S,
    buf: &mut Buffer,
    sink: &mut D,
    close: Option<&[u8]>,
    moved: &Cell<u64>,
) -> Result<(), Failure>
where
    S: AsyncRead + Unpin,
    D: AsyncWrite + Unpin,
{
    let mut frames = Frames::default();
    let mut closed_by_us = false;
    loop {
        let unread = buf.unread();
        let boundary = if close.is_some() { frames.follow(unread) } else { 0 };
        moved.set(moved.get() + unread.len() as u64);
        // A frame that has begun goes on to its end; what follows the boundary then is dropped.
        let ending = ends.told.get() && !closed_by_us;
        let pass = match (closed_by_us, ending && boundary > 0 && !frames.closed()) {
            (true, _) => 0,
            (false, true) => boundary,
            (false, false) => unread.len(),
        };
        sink.write_all(&unread[..pass]).await.map_err(|_| Failure::ClientGone)?;
        let n = buf.unread().len();
        buf.consume(n);
        if frames.closed() && frames.at_boundary() && closed_by_us {
            return Ok(());
        }
        let at_boundary = boundary > 0 || frames.at_boundary();
        if let Some(close) = close.filter(|_| ending && at_boundary && !frames.closed()) {
            closed_by_us = true;
            ends.ours.set(true);
            ends.ours_sent.notify_one();
            sink.write_all(close).await.map_err(|_| Failure::ClientGone)?;
        }
        let waits_to_end = close.is_some() && !closed_by_us && !ends.told.get();
        let read = poll_fn(|cx| match buf.poll_fill(cx, source, store) {
            Poll::Ready(read) => Poll::Ready(read.map_err(|_| Failure::ClientGone)),
            Poll::Pending if waits_to_end && ends.told.get() => Poll::Ready(Ok(usize::MAX)),
            Poll::Pending => Poll::Pending,
        });
        if read.await? == 0 {
            let _ = sink.shutdown().await;
            return Ok(());
        }
    }
}
