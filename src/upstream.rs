//! The app's side: connect, keep connections for reuse, and retire them before the app would.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream, lookup_host, tcp, unix};

use crate::config::UpstreamAddr;

/// One attempt to connect may take so long; an app on the same host answers at once or never.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Idle connections are kept so long where the app doesn't say; Node closes its own after 5 s.
const KEEP_ALIVE: Duration = Duration::from_secs(4);
/// However long the app would keep it, a connection that rests longer isn't worth its memory.
const KEEP_ALIVE_MOST: Duration = Duration::from_secs(60);
/// The app may count its timeout from a little before we do.
const KEEP_ALIVE_MARGIN: Duration = Duration::from_secs(1);
/// Idle connections kept per thread.
const POOL: usize = 1024;

/// A connection to the app.
#[derive(Debug)]
pub enum Stream {
    /// By TCP.
    Tcp(TcpStream),
    /// By unix socket.
    Unix(UnixStream),
}

/// The half that reads from the app.
#[derive(Debug)]
pub enum Reader<'s> {
    /// By TCP.
    Tcp(tcp::ReadHalf<'s>),
    /// By unix socket.
    Unix(unix::ReadHalf<'s>),
}

/// The half that writes to the app.
#[derive(Debug)]
pub enum Writer<'s> {
    /// By TCP.
    Tcp(tcp::WriteHalf<'s>),
    /// By unix socket.
    Unix(unix::WriteHalf<'s>),
}

impl Stream {
    /// Both halves, usable side by side.
    pub fn split(&mut self) -> (Reader<'_>, Writer<'_>) {
        match self {
            Self::Tcp(stream) => {
                let (reader, writer) = stream.split();
                (Reader::Tcp(reader), Writer::Tcp(writer))
            }
            Self::Unix(stream) => {
                let (reader, writer) = stream.split();
                (Reader::Unix(reader), Writer::Unix(writer))
            }
        }
    }

    /// Ready once the app has closed it, or sent what nobody asked for.
    pub fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut byte = [0];
        Pin::new(&mut self.split().0).poll_read(cx, &mut ReadBuf::new(&mut byte)).map(drop)
    }

    /// [`Stream::is_alive`], asked of the kernel: the runtime lets a task look at only so many streams in one go.
    fn is_quiet(&self) -> bool {
        let mut byte = [MaybeUninit::uninit()];
        let peeked = match self {
            Self::Tcp(stream) => SockRef::from(stream).peek(&mut byte),
            Self::Unix(stream) => SockRef::from(stream).peek(&mut byte),
        };
        matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Fit for another request. Costs no system call while nothing has arrived.
    fn is_alive(&mut self) -> bool {
        self.poll_end(&mut Context::from_waker(Waker::noop())).is_pending()
    }
}

impl AsyncRead for Reader<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_read(cx, buf),
            Self::Unix(half) => Pin::new(half).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Writer<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_write(cx, buf),
            Self::Unix(half) => Pin::new(half).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_shutdown(cx),
            Self::Unix(half) => Pin::new(half).poll_shutdown(cx),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().split().0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().split().1).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().split().1).poll_shutdown(cx)
    }
}

/// Connects to the app once; tries each address that its name has.
pub async fn connect(addr: &UpstreamAddr) -> io::Result<Stream> {
    let attempt = async {
        match addr {
            UpstreamAddr::Unix(path) => UnixStream::connect(path).await.map(Stream::Unix),
            UpstreamAddr::Tcp { host, port } => {
                let stream = match host.parse() {
                    Ok(ip) => TcpStream::connect(SocketAddr::new(ip, *port)).await?,
                    // Always loopback (RFC 6761 §6.3), so nobody has to be asked for it.
                    Err(_) if host == "localhost" => {
                        let both = [
                            SocketAddr::from((Ipv4Addr::LOCALHOST, *port)),
                            (Ipv6Addr::LOCALHOST, *port).into(),
                        ];
                        TcpStream::connect(&both[..]).await?
                    }
                    Err(_) => {
                        // An orchestrator takes a container's name away while it replaces the container.
                        let named = lookup_host((host.as_str(), *port)).await;
                        let addrs = named.map_err(|error| io::Error::new(io::ErrorKind::NotFound, error))?;
                        TcpStream::connect(&addrs.collect::<Vec<_>>()[..]).await?
                    }
                };
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
        }
    };
    tokio::time::timeout(CONNECT_TIMEOUT, attempt)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// The app lives, but its queue of connections is full: a unix socket says so at once, TCP waits.
pub fn is_full(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

/// Nobody listens there: the app crashed, restarts or has not started yet. Nothing was sent.
pub fn is_down(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NotFound};
    matches!(error.kind(), ConnectionRefused | HostUnreachable | NotFound)
}

#[derive(Debug)]
struct Idle {
    stream: Stream,
    until: Instant,
}

/// The connections of one thread that rest between requests.
#[derive(Debug, Default)]
pub struct Pool {
    idle: RefCell<VecDeque<Idle>>,
}

impl Pool {
    /// The connection that rested the shortest, if one is alive and not about to be closed by the app.
    pub fn take(&self) -> Option<Stream> {
        let now = Instant::now();
        let mut idle = self.idle.borrow_mut();
        while let Some(mut newest) = idle.pop_back() {
            if newest.until > now && newest.stream.is_alive() {
                return Some(newest.stream);
            }
        }
        None
    }

    /// Keeps a connection whose last answer has been read to its end. `timeout` is the app's `Keep-Alive: timeout=`.
    pub fn put(&self, stream: Stream, timeout: Option<Duration>) {
        let rest = match timeout {
            Some(timeout) => timeout.saturating_sub(KEEP_ALIVE_MARGIN).max(timeout / 2).min(KEEP_ALIVE_MOST),
            None => KEEP_ALIVE,
        };
        let mut idle = self.idle.borrow_mut();
        if idle.len() == POOL {
            idle.pop_front();
        }
        idle.push_back(Idle { stream, until: Instant::now() + rest });
    }

    /// Closes what rested too long or was closed by the app.
    pub fn retire(&self) {
        let now = Instant::now();
        self.idle.borrow_mut().retain(|idle| idle.until > now && idle.stream.is_quiet());
    }

    /// Closes all of them, so that an app which waits for its connections can leave.
    pub fn clear(&self) {
        self.idle.borrow_mut().clear();
    }
}
