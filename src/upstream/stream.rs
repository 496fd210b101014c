//! A connection to the app over TCP, TLS or a unix socket, and one attempt to open it.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};

use super::resolve::addresses;
use super::source;
use crate::config::UpstreamAddr;
use crate::tls::HTTP1;
use crate::tls::client::handshake;
use crate::tls::stream::{self as tls, Tls};

/// Time limit for one attempt to connect; an app on the same host answers at once or never.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection to the app.
#[derive(Debug)]
pub enum UpstreamSocket {
    /// Plain TCP.
    Tcp(TcpStream),
    /// TLS over TCP.
    Tls(Tls),
    /// A unix socket.
    Unix(UnixStream),
}

/// The half that reads from the app.
#[derive(Debug)]
pub enum UpstreamReader<'s> {
    /// Plain TCP.
    Tcp(tcp::ReadHalf<'s>),
    /// TLS over TCP.
    Tls(tls::ReadHalf<'s>),
    /// A unix socket.
    Unix(unix::ReadHalf<'s>),
}

/// The half that writes to the app.
#[derive(Debug)]
pub enum UpstreamWriter<'s> {
    /// Plain TCP.
    Tcp(tcp::WriteHalf<'s>),
    /// TLS over TCP.
    Tls(tls::WriteHalf<'s>),
    /// A unix socket.
    Unix(unix::WriteHalf<'s>),
}

impl UpstreamSocket {
    /// Returns both halves, which can be used concurrently.
    pub fn split(&mut self) -> (UpstreamReader<'_>, UpstreamWriter<'_>) {
        match self {
            Self::Tcp(stream) => {
                let (reader, writer) = stream.split();
                (UpstreamReader::Tcp(reader), UpstreamWriter::Tcp(writer))
            }
            Self::Tls(stream) => {
                let (reader, writer) = stream.split();
                (UpstreamReader::Tls(reader), UpstreamWriter::Tls(writer))
            }
            Self::Unix(stream) => {
                let (reader, writer) = stream.split();
                (UpstreamReader::Unix(reader), UpstreamWriter::Unix(writer))
            }
        }
    }

    /// Connects to the socket at this path.
    ///
    /// # Errors
    /// Those of connect(2).
    pub async fn unix(path: &Path) -> io::Result<Self> {
        UnixStream::connect(path).await.map(Self::Unix)
    }

    /// Ready once the app has closed the connection, or sent bytes that no request asked for.
    pub fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut byte = [0];
        Pin::new(&mut self.split().0).poll_read(cx, &mut ReadBuf::new(&mut byte)).map(drop)
    }

    /// Like [`UpstreamSocket::is_alive`], but asks the kernel: the runtime limits the number of streams that a task may poll
    /// in one go.
    pub fn is_quiet(&self) -> bool {
        let mut byte = [MaybeUninit::uninit()];
        let peeked = match self {
            Self::Tcp(stream) => SockRef::from(stream).peek(&mut byte),
            Self::Tls(stream) => SockRef::from(stream.tcp()).peek(&mut byte),
            Self::Unix(stream) => SockRef::from(stream).peek(&mut byte),
        };
        matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Whether it can take another request. Costs no system call while nothing has arrived.
    pub fn is_alive(&mut self) -> bool {
        self.poll_end(&mut Context::from_waker(Waker::noop())).is_pending()
    }
}

impl AsyncRead for UpstreamReader<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_read(cx, buf),
            Self::Tls(half) => Pin::new(half).poll_read(cx, buf),
            Self::Unix(half) => Pin::new(half).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for UpstreamWriter<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_write(cx, buf),
            Self::Tls(half) => Pin::new(half).poll_write(cx, buf),
            Self::Unix(half) => Pin::new(half).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_shutdown(cx),
            Self::Tls(half) => Pin::new(half).poll_shutdown(cx),
            Self::Unix(half) => Pin::new(half).poll_shutdown(cx),
        }
    }
}

impl AsyncRead for UpstreamSocket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().split().0).poll_read(cx, buf)
    }
}

impl AsyncWrite for UpstreamSocket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().split().1).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().split().1).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            // A session encrypts one piece at a time.
            Self::Tls(stream) => {
                let first = bufs.iter().find(|buf| !buf.is_empty());
                Pin::new(&mut stream.split().1).poll_write(cx, first.map_or(&[], |buf| buf))
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        !matches!(self, Self::Tls(_))
    }
}

/// Connects to the app once; tries each address of its name.
///
/// # Errors
/// Those of connect(2); `NotFound` if the name has no address.
pub async fn connect(addr: &UpstreamAddr) -> io::Result<UpstreamSocket> {
    let attempt = async {
        match addr {
            UpstreamAddr::Unix(path) => UpstreamSocket::unix(path).await,
            UpstreamAddr::Tcp { host, port } => by_name(host, *port).await.map(UpstreamSocket::Tcp),
            UpstreamAddr::Tls { host, port, name } => {
                handshake(by_name(host, *port).await?, name, HTTP1).await.map(UpstreamSocket::Tls)
            }
        }
    };
    tokio::time::timeout(CONNECT_TIMEOUT, attempt)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn by_name(host: &str, port: u16) -> io::Result<TcpStream> {
    match host.parse() {
        Ok(ip) => open(&[SocketAddr::new(ip, port)], None).await,
        // Always loopback (RFC 6761 §6.3), so no lookup is needed.
        Err(_) if host == "localhost" => {
            open(&[(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()], None).await
        }
        Err(_) => {
            // An orchestrator removes a container's name while it replaces the container.
            let named = addresses(host, port).await;
            open(&named.map_err(|error| io::Error::new(io::ErrorKind::NotFound, error))?, None).await
        }
    }
}

/// Connects over TCP to the first address that accepts; from `source`, if that is of its family.
///
/// # Errors
/// That of the last address.
pub async fn open(addrs: &[SocketAddr], source: Option<IpAddr>) -> io::Result<TcpStream> {
    let stream = match (addrs, source) {
        ([to], Some(from)) if to.is_ipv4() == from.is_ipv4() => source::connect(from, *to).await?,
        _ => TcpStream::connect(addrs).await?,
    };
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Whether the app is alive but its accept queue is full (a unix socket reports that at once, TCP waits), or our own
/// limit of connections is reached.
pub fn is_full(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || lacks_files(error)
}

/// Whether the limit of open files is reached, of this process or of the system.
pub fn lacks_files(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    error.kind() == io::ErrorKind::QuotaExceeded || matches!(errno, Some(Errno::MFILE | Errno::NFILE))
}

/// Whether no host answers: a container is gone, or another one is about to get its address.
pub fn is_lost(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::TimedOut
}

/// Whether the address refuses connections: the app crashed, restarts or has not started yet. Nothing was sent. A
/// reset comes from a listening socket that closes before it has accepted the connection.
pub fn is_down(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, NotFound};
    matches!(
        error.kind(),
        ConnectionRefused | ConnectionReset | ConnectionAborted | HostUnreachable | NotFound
    )
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn an_end_that_the_runtime_has_not_heard_of_is_known_to_the_kernel() {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut stream =
            UpstreamSocket::Tcp(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        let (app, _) = listener.accept().unwrap();
        assert!(stream.is_alive() && stream.is_quiet());
        drop(app);
        // Nothing is awaited from here on, so the runtime gets no events.
        let began = Instant::now();
        while stream.is_quiet() {
            assert!(began.elapsed() < Duration::from_secs(20), "the end does not come");
        }
        assert!(stream.is_alive(), "as far as the runtime knows");
    }

    #[tokio::test]
    async fn a_connection_that_a_closing_socket_resets_while_it_is_made_was_never_made() {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        let mut connecting = std::pin::pin!(open(std::slice::from_ref(&addr), None));
        let begun = connecting.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(begun.is_pending(), "the kernel has made it, and the runtime hasn't heard");
        drop(listener);
        let error = connecting.await.unwrap_err();
        assert!(is_down(&error), "{error}");
    }
}
