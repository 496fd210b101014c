//! HTTP/2 to the app, with prior knowledge (RFC 9113 §3.3) or by ALPN: one thread's connections, shared by streams.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{self, ResponseFuture, SendRequest};
use h2::{Ping, PingPong, SendStream};
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::task::spawn_local;

use super::backends::{Backend, ServerGuard};
use super::slots::{Sharing, Slot};
use super::stream::UpstreamSocket;

/// Flow-control window of one stream from the app, in bytes.
const STREAM_WINDOW: u32 = 64 * 1024;
/// Flow-control window of a connection: large enough that slow readers never block other streams.
const CONNECTION_WINDOW: u32 = 64 * 1024 * 1024;
/// Maximum bytes that one stream queues for the app's window.
const SEND_BUFFER: usize = 64 * 1024;
/// Number of reset streams per connection whose late frames are tolerated.
const MAX_RESET_STREAMS: usize = 1000;
/// Connections per thread.
const MAX_CONNECTIONS: usize = 256;
/// Attempts to find a connection with room; an app that closes each new connection counts as full.
const MAX_ATTEMPTS: usize = 3;
/// Idle time after which a connection is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// With streams in flight and no byte from the app for this long, the connection is checked with a PING.
const PING_DELAY: Duration = Duration::from_secs(20);
/// Time limit for the answer to a PING. A busy app may take a while.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// gRPC servers close the connection of a client that sends PINGs more often without data in between (gRFC A8: 5
/// minutes).
const PING_INTERVAL: Duration = Duration::from_secs(305);

/// The right to one stream on a connection, counted there and at the app's server.
#[derive(Debug)]
pub struct Lease {
    stream: StreamGuard,
    server: ServerGuard,
}

impl Lease {
    pub(super) fn new(stream: StreamGuard, server: ServerGuard) -> Self {
        Self { stream, server }
    }

    /// Returns the connection's server.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.server.backend
    }

    /// Whether the connection was opened for this stream.
    pub fn is_first(&self) -> bool {
        self.stream.first
    }

    /// Opens the stream. `end`: the request has no body.
    ///
    /// # Errors
    /// [`was_unprocessed`] holds if the connection takes no more streams.
    pub fn send(
        &mut self,
        request: Request<()>,
        end: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        self.stream.sender.send_request(request, end)
    }
}

/// Counts one stream on a connection.
#[derive(Debug)]
pub(super) struct StreamGuard {
    sender: SendRequest<Bytes>,
    activity: Rc<Activity>,
    /// The connection was opened for this stream.
    first: bool,
    _sharing: Sharing,
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.activity.streams.set(self.activity.streams.get() - 1);
        self.activity.idle_since.set(Instant::now());
    }
}

/// Whether the app has not processed the stream that failed with this error, so that any request may be retried: the
/// stream was refused, or its number is above the last one of a GOAWAY (RFC 9113 §8.7).
pub fn was_unprocessed(error: &h2::Error) -> bool {
    error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM))
}

/// State shared by a connection's task and its streams.
#[derive(Debug)]
struct Activity {
    streams: Cell<usize>,
    /// There has been a stream.
    used: Cell<bool>,
    idle_since: Cell<Instant>,
    /// Incremented by each read that brought bytes.
    heard: Cell<u64>,
}

#[derive(Debug)]
struct SharedConnection {
    backend: Arc<Backend>,
    sender: SendRequest<Bytes>,
    activity: Rc<Activity>,
}

impl SharedConnection {
    /// Neither closed nor going away.
    fn is_open(&self) -> bool {
        takes_streams(&mut self.sender.clone())
    }

    fn has_room(&self) -> bool {
        self.activity.streams.get() < self.sender.current_max_send_streams()
    }
}

fn takes_streams(sender: &mut SendRequest<Bytes>) -> bool {
    !matches!(sender.poll_ready(&mut Context::from_waker(Waker::noop())), Poll::Ready(Err(_)))
}

/// An attempt to connect, shared by all that wait for it.
#[derive(Debug)]
struct Opening {
    backend: Arc<Backend>,
    ended: watch::Receiver<Option<io::ErrorKind>>,
}

/// One thread's connections.
#[derive(Debug, Default)]
pub struct Connections {
    open: RefCell<Vec<SharedConnection>>,
    opening: RefCell<Vec<Opening>>,
}

impl Connections {
    /// Reserves one more stream to this server, on a connection opened by `connect` if none has room.
    ///
    /// # Errors
    /// Those of `connect`; `WouldBlock` if the app takes no more streams for now, `InvalidData` if it doesn't speak
    /// HTTP/2.
    pub(super) async fn room<F>(
        self: &Rc<Self>,
        backend: &Arc<Backend>,
        head: usize,
        connect: impl FnOnce() -> F + Clone,
    ) -> io::Result<StreamGuard>
    where
        F: Future<Output = io::Result<(UpstreamSocket, Slot)>> + 'static,
    {
        for _ in 0..MAX_ATTEMPTS {
            if let Some(room) = self.find(backend) {
                return Ok(room);
            }
            let opening = self.opening(backend);
            let mut ended = opening.unwrap_or_else(|| self.start(backend, head, connect.clone()));
            // The sender was dropped without an error: the connection is open.
            if let Ok(failed) = ended.wait_for(Option::is_some).await {
                return Err(failed.unwrap_or(io::ErrorKind::Other).into());
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn find(&self, backend: &Arc<Backend>) -> Option<StreamGuard> {
        let mut open = self.open.borrow_mut();
        loop {
            let fits = |it: &SharedConnection| Arc::ptr_eq(&it.backend, backend) && it.has_room();
            let at = open.iter().position(fits)?;
            let (mut sender, activity) = (open[at].sender.clone(), open[at].activity.clone());
            if takes_streams(&mut sender) {
                let first = !activity.used.replace(true);
                activity.streams.set(activity.streams.get() + 1);
                backend.habit.keeps();
                return Some(StreamGuard { sender, activity, first, _sharing: Sharing::begin() });
            }
            backend.habit.closes();
            open.swap_remove(at);
        }
    }

    fn opening(&self, backend: &Arc<Backend>) -> Option<watch::Receiver<Option<io::ErrorKind>>> {
        let opening = self.opening.borrow();
        opening.iter().find(|it| Arc::ptr_eq(&it.backend, backend)).map(|it| it.ended.clone())
    }

    /// Runs in a task of its own, so that it continues for the others if its first caller gives up.
    fn start<F>(
        self: &Rc<Self>,
        backend: &Arc<Backend>,
        head: usize,
        connect: impl FnOnce() -> F,
    ) -> watch::Receiver<Option<io::ErrorKind>>
    where
        F: Future<Output = io::Result<(UpstreamSocket, Slot)>> + 'static,
    {
        let (end, ended) = watch::channel(None);
        if self.open.borrow().len() >= MAX_CONNECTIONS {
            end.send_replace(Some(io::ErrorKind::WouldBlock));
            return ended;
        }
        self.opening.borrow_mut().push(Opening { backend: backend.clone(), ended: ended.clone() });
        let (all, backend, connecting) = (self.clone(), backend.clone(), connect());
        spawn_local(async move {
            let opened = async {
                let (stream, slot) = connecting.await?;
                handshake(stream, head).await.map(|(sender, driver)| (sender, driver, slot))
            };
            let opened = opened.await;
            all.opening.borrow_mut().retain(|it| !Arc::ptr_eq(&it.backend, &backend));
            match opened {
                Ok((sender, driver, _slot)) => {
                    let activity = driver.activity.clone();
                    all.open.borrow_mut().push(SharedConnection { backend, sender, activity });
                    drop(end);
                    driver.run().await;
                }
                Err(error) => drop(end.send_replace(Some(error.kind()))),
            }
        });
        ended
    }

    /// Takes no new streams to servers that are gone, and closes connections that were idle for too long. Each closes
    /// once its last stream has ended.
    pub fn retire(&self) {
        self.open.borrow_mut().retain(|it| {
            let rested =
                it.activity.streams.get() == 0 && it.activity.idle_since.get().elapsed() > IDLE_TIMEOUT;
            let open = it.is_open();
            if !open {
                it.backend.habit.closes();
            }
            !it.backend.is_gone() && !rested && open
        });
    }

    /// Closes all connections, each with its last stream.
    pub fn clear(&self) {
        self.open.borrow_mut().clear();
    }
}

/// Does the HTTP/2 handshake. Returns once the app has answered, so that its settings are known and nothing is sent
/// to an app that accepts connections but never reads.
async fn handshake(stream: UpstreamSocket, head: usize) -> io::Result<(SendRequest<Bytes>, Driver)> {
    let activity = Activity {
        streams: Cell::new(0),
        used: Cell::new(false),
        idle_since: Cell::new(Instant::now()),
        heard: Cell::new(0),
    };
    let activity = Rc::new(activity);
    let io = Heard { stream, activity: activity.clone() };
    let mut builder = client::Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(MAX_RESET_STREAMS)
        .max_header_list_size(u32::try_from(head).unwrap_or(u32::MAX));
    let answered = async {
        let (sender, mut connection) = builder.handshake(io).await.map_err(no_http2)?;
        let mut pings = connection.ping_pong().ok_or(io::ErrorKind::Other)?;
        pings.send_ping(Ping::opaque()).map_err(no_http2)?;
        poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
            Poll::Ready(Ok(())) => Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into())),
            Poll::Ready(Err(error)) => Poll::Ready(Err(no_http2(error))),
            Poll::Pending => pings.poll_pong(cx).map_ok(drop).map_err(no_http2),
        })
        .await?;
        Ok((sender, Driver { connection, pings, activity }))
    };
    tokio::time::timeout(PING_TIMEOUT, answered).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// An app that closes at once may be shutting down, and nothing was sent to it. One that sends anything else speaks
/// another protocol.
fn no_http2(error: h2::Error) -> io::Error {
    match error.is_io() || error.is_remote() {
        true => io::ErrorKind::ConnectionRefused.into(),
        false => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}

/// Drives a connection's frames.
struct Driver {
    connection: client::Connection<Heard, Bytes>,
    pings: PingPong,
    activity: Rc<Activity>,
}

impl Driver {
    /// Runs until the connection closes, or the app does not answer a PING. The remaining streams fail then.
    async fn run(self) {
        let Self { mut connection, mut pings, activity } = self;
        let mut dead = pin!(dies(&mut pings, &activity));
        poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
            Poll::Ready(ended) => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "an HTTP/2 connection to the app failed");
                }
                Poll::Ready(())
            }
            Poll::Pending => dead.as_mut().poll(cx),
        })
        .await;
    }
}

/// Returns when the app no longer answers.
async fn dies(pings: &mut PingPong, activity: &Activity) {
    let mut asked: Option<Instant> = None;
    loop {
        let heard = activity.heard.get();
        tokio::time::sleep(PING_DELAY).await;
        if activity.heard.get() != heard {
            asked = None;
            continue;
        }
        if activity.streams.get() == 0 || asked.is_some_and(|at| at.elapsed() < PING_INTERVAL) {
            continue;
        }
        asked = Some(Instant::now());
        if pings.send_ping(Ping::opaque()).is_err() {
            return;
        }
        match tokio::time::timeout(PING_TIMEOUT, poll_fn(|cx| pings.poll_pong(cx))).await {
            Ok(Ok(_)) => {}
            _ => {
                tracing::warn!("an HTTP/2 connection to the app is dead: no response to a PING");
                return;
            }
        }
    }
}

/// The app's stream, recording whether bytes came from it.
#[derive(Debug)]
struct Heard {
    stream: UpstreamSocket,
    activity: Rc<Activity>,
}

impl AsyncRead for Heard {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if polled.is_ready() {
            self.activity.heard.set(self.activity.heard.get() + 1);
        }
        polled
    }
}

impl AsyncWrite for Heard {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
