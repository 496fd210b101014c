//! The two directions of a tunnel: what they relay, the state they share, and how a WebSocket ends between two
//! messages.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::task::Poll;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest};
use tokio::sync::Notify;

use super::websocket::Frames;
use crate::metrics::Ended;
use crate::proxy::buffer::Buffer;
use crate::proxy::stream;
use crate::upstream;

/// One direction of a tunnel.
#[derive(Default)]
pub struct Direction {
    /// Bytes relayed.
    pub moved: Cell<u64>,
    /// It is waiting for a message's first byte.
    pub rests: Cell<bool>,
    /// Its sink has not yet taken everything that was read.
    writing: Cell<bool>,
    /// A message has begun and not ended yet.
    inside: Cell<bool>,
    /// Its source has sent a Close.
    closed: Cell<bool>,
    /// Its progress towards the end.
    stage: Cell<Stage>,
}

/// The progress of a WebSocket's direction towards its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It relays what arrives.
    #[default]
    Passes,
    /// It still relays, and has been between two messages since the end was requested.
    Reached,
    /// It is between two messages and relays nothing more.
    Stopped,
    /// Its sink has been sent a Close, or its source has ended.
    Closed,
}

/// Which end of a direction failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// The end it reads from.
    Source,
    /// The end it writes to.
    Sink,
}

/// The state that the two directions share.
#[derive(Default)]
pub struct Ends {
    /// From the client to the app.
    pub up: Direction,
    /// From the app to the client.
    pub down: Direction,
    /// The tunnel has to end.
    pub close_requested: Cell<bool>,
    /// Nothing has moved for too long.
    pub quiet: Cell<bool>,
    /// A direction's sink got our Close.
    close_sent: Cell<bool>,
    /// A direction has reached another stage, so the other futures have to be polled again.
    pub news: Cell<bool>,
    /// One direction has ended.
    half: Cell<bool>,
    whole: Notify,
}

/// The half of a connection that is read from.
pub trait Half: AsyncRead + Unpin {
    /// Returns once the connection has failed, even after a regular end.
    fn failed(&self) -> impl Future<Output = ()>;
}

impl Half for stream::ClientReader<'_> {
    fn failed(&self) -> impl Future<Output = ()> {
        stream::Source::failed(self)
    }
}

impl Half for upstream::UpstreamReader<'_> {
    async fn failed(&self) {
        let _ = match self {
            Self::Tcp(half) => half.as_ref().ready(Interest::ERROR).await,
            Self::Tls(half) => half.tcp().ready(Interest::ERROR).await,
            Self::Unix(half) => half.as_ref().ready(Interest::ERROR).await,
        };
    }
}

/// Returns once `holds` is true. Checked whenever the tunnel's task is awake.
pub fn when(holds: impl Fn() -> bool) -> impl Future<Output = ()> {
    poll_fn(move |_| if holds() { Poll::Ready(()) } else { Poll::Pending })
}

impl Direction {
    /// Whether the direction has reached `stage`.
    pub fn is(&self, stage: Stage) -> bool {
        self.stage.get() >= stage
    }
}

impl Ends {
    /// Whether both directions are between two messages and idle.
    pub fn rest(&self) -> bool {
        self.up.rests.get() && self.down.rests.get() && !self.close_requested.get()
    }

    /// Whether bytes that were read are still to be written.
    pub fn is_writing(&self) -> bool {
        self.up.writing.get() || self.down.writing.get()
    }

    /// Moves a direction to its next stage.
    fn advance(&self, direction: &Direction, to: Stage) {
        if !direction.is(to) {
            direction.stage.set(to);
            self.news.set(true);
        }
    }

    /// Whether a direction that is between two messages stops there. Not while the other one is still inside its
    /// first message: a peer that gets a Close soon gives up on what it is sending, so both peers have to get it
    /// together.
    fn stops(&self, (own, other): (&Direction, &Direction)) -> bool {
        if !self.close_requested.get() {
            return false;
        }
        self.advance(own, Stage::Reached);
        self.quiet.get() || other.is(Stage::Reached)
    }

    /// Returns how the tunnel ended. `Err`: a direction failed; true if on the app's side.
    pub fn response(&self, ended: Result<(), bool>, websocket: bool) -> Ended {
        // A side that has sent a Close may leave in the middle of the other's message.
        let cut = |direction: &Direction, back: &Direction| direction.inside.get() && !back.closed.get();
        let (from_client, from_app) = (cut(&self.up, &self.down), cut(&self.down, &self.up));
        match ended {
            _ if self.quiet.get() => Ended::TimedOut,
            Ok(()) | Err(true) if from_app => Ended::AppGone,
            Err(true) if from_client || !websocket => Ended::AppGone,
            Ok(()) if from_client => Ended::ClientGone,
            _ if self.close_sent.get() => Ended::WebSocketEnded,
            Err(_) => Ended::ClientGone,
            Ok(()) => Ended::Complete,
        }
    }

    /// Called when one direction has ended: waits for the other one, unless this one's source fails.
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

/// Relays one direction until its source ends. With `close` it is a WebSocket's: on request it stops between two
/// messages and sends a Close.
pub async fn direction<S, D>(
    ends: &Ends,
    source: &mut S,
    buf: &mut Buffer,
    sink: &mut D,
    close: Option<&[u8]>,
    (own, other): (&Direction, &Direction),
) -> Result<(), Failed>
where
    S: Half,
    D: AsyncWrite + Unpin,
{
    let mut frames = Frames::default();
    loop {
        let unread = buf.unread();
        own.moved.set(own.moved.get() + unread.len() as u64);
        let n = unread.len();
        if let Some(close) = close {
            let boundary = frames.follow(unread);
            own.closed.set(frames.closed());
            if (boundary > 0 || frames.at_boundary()) && ends.stops((own, other)) {
                // What follows the last message is dropped.
                let last = &unread[..boundary];
                own.inside.set(boundary > 0);
                sink.write_all(last).await.map_err(|_| Failed::Sink)?;
                own.inside.set(false);
                buf.consume(n);
                return send_close(ends, source, buf, sink, close, (own, other), frames).await;
            }
            own.inside.set(n > 0);
        }
        own.writing.set(n > 0);
        sink.write_all(unread).await.map_err(|_| Failed::Sink)?;
        own.writing.set(false);
        own.inside.set(!frames.at_boundary());
        let filled = n > 0 && n == buf.capacity();
        buf.consume(n);
        if filled {
            buf.grow();
        }
        let between = close.is_some() && frames.at_boundary();
        let read = poll_fn(|cx| match buf.poll_fill(cx, source) {
            Poll::Ready(read) => Poll::Ready(read.map_err(|_| Failed::Source)),
            Poll::Pending if between && ends.stops((own, other)) => Poll::Ready(Ok(usize::MAX)),
            Poll::Pending => Poll::Pending,
        });
        own.rests.set(frames.at_boundary() && !frames.closed());
        let read = read.await?;
        own.rests.set(false);
        if read == 0 {
            ends.advance(own, Stage::Closed);
            let _ = sink.shutdown().await;
            if close.is_some() {
                return Ok(());
            }
            return ends.other_half(source).await;
        }
    }
}

/// Ends a direction that has stopped between two messages. Its sink gets our Close once the other direction has
/// stopped too; further bytes from the source are read and dropped until it closes as well.
async fn send_close<S, D>(
    ends: &Ends,
    source: &mut S,
    buf: &mut Buffer,
    sink: &mut D,
    close: &[u8],
    (own, other): (&Direction, &Direction),
    mut frames: Frames,
) -> Result<(), Failed>
where
    S: Half,
    D: AsyncWrite + Unpin,
{
    ends.advance(own, Stage::Stopped);
    when(|| ends.quiet.get() || other.is(Stage::Stopped)).await;
    if !frames.closed() {
        ends.close_sent.set(true);
        sink.write_all(close).await.map_err(|_| Failed::Sink)?;
    }
    ends.advance(own, Stage::Closed);
    while !(frames.closed() && frames.at_boundary()) {
        if buf.fill(source).await.map_err(|_| Failed::Source)? == 0 {
            let _ = sink.shutdown().await;
            break;
        }
        frames.follow(buf.unread());
        let n = buf.unread().len();
        buf.consume(n);
    }
    Ok(())
}
