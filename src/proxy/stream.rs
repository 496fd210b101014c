//! The client's side of a connection, and what the request pipeline needs of it besides bytes.

use std::future::Future;
use std::io::{self, Read};
use std::net::Shutdown;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::HeaderMap;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, tcp};

use super::buffer::SIZE;
use super::http1::head::{Framing, HeadOut};
use super::socket;
use crate::tls::stream::{self as tls, Session, Tls};

/// Every HTTP/1.1 client skips an interim response (RFC 9110 §15.2).
const INTERIM: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The half that reads a request, always as HTTP/1.1, whatever the client speaks.
pub trait Source: AsyncRead + Unpin {
    /// Sends an interim response. Whether a client that has closed its sending side still reads can only be found out
    /// by sending something: a host that has closed completely answers with a reset. Returns false if the client has
    /// already gone; no other call reports that.
    fn nudge(&self) -> bool;
    /// Whether the client has definitely disconnected.
    fn has_failed(&self) -> bool;
    /// Returns once the client has definitely disconnected.
    fn failed(&self) -> impl Future<Output = ()>;
    /// Returns the bytes that the client has not acknowledged, according to the kernel.
    fn unacknowledged(&self) -> u32;
}

/// The half that writes the response. What it has accepted is in the socket.
pub trait Sink: AsyncWrite + Unpin {
    /// A response's head, as the client's protocol has it.
    type Head: HeadOut;
    /// The client's protocol marks the end of a body, so that content needs no coding.
    const MARKS_END: bool;
    /// Returns an empty head.
    fn head(&self) -> Self::Head;
    /// Begins a response, interim or final. Returns the bytes to be written before the body.
    ///
    /// # Errors
    /// `InvalidData` if the client's protocol can't express the head; any other if the client has gone.
    fn begin(&mut self, head: Self::Head, framing: Framing) -> io::Result<Vec<u8>>;
    /// The body ends with the bytes that are written next, and with these trailers.
    fn ends(&mut self, trailers: Option<HeaderMap>);
    /// Ends the body, if its last bytes have not done so.
    ///
    /// # Errors
    /// If the client has gone.
    fn end(&mut self) -> io::Result<()>;
    /// Returns the bytes written that the client has not acknowledged.
    fn unacknowledged(&self) -> u32;
}

/// What an app is told about a client's connection.
#[derive(Clone, Debug, Default)]
pub struct Channel {
    /// It is encrypted.
    pub https: bool,
    /// The subject of the client's verified certificate.
    pub subject: Option<Rc<str>>,
}

/// A client's connection.
#[derive(Debug)]
pub enum Stream {
    /// Plain TCP.
    Tcp(TcpStream),
    /// TLS over TCP.
    Tls(Tls),
}

/// A client's connection without a task.
#[derive(Debug)]
pub enum Resting {
    /// Plain TCP.
    Tcp(std::net::TcpStream),
    /// TLS over TCP.
    Tls(std::net::TcpStream, Box<Session>),
}

/// The half that reads from the client.
#[derive(Debug)]
pub enum ClientReader<'s> {
    /// Plain TCP.
    Tcp(tcp::ReadHalf<'s>),
    /// TLS over TCP.
    Tls(tls::ReadHalf<'s>),
}

/// The half that writes to the client.
#[derive(Debug)]
pub enum ClientWriter<'s> {
    /// Plain TCP.
    Tcp(tcp::WriteHalf<'s>),
    /// TLS over TCP.
    Tls(tls::WriteHalf<'s>),
}

impl Stream {
    /// Returns both halves, which can be used concurrently.
    pub fn split(&mut self) -> (ClientReader<'_>, ClientWriter<'_>) {
        match self {
            Self::Tcp(stream) => {
                let (reader, writer) = stream.split();
                (ClientReader::Tcp(reader), ClientWriter::Tcp(writer))
            }
            Self::Tls(stream) => {
                let (reader, writer) = stream.split();
                (ClientReader::Tls(reader), ClientWriter::Tls(writer))
            }
        }
    }

    /// Returns the socket.
    pub fn tcp(&self) -> &TcpStream {
        match self {
            Self::Tcp(stream) => stream,
            Self::Tls(stream) => stream.tcp(),
        }
    }

    /// Returns what an app is told about it.
    pub fn channel(&self) -> Channel {
        match self {
            Self::Tcp(_) => Channel::default(),
            Self::Tls(stream) => Channel { https: true, subject: stream.peer_subject().map(Rc::from) },
        }
    }

    /// Prepares it for parking.
    ///
    /// # Errors
    /// If the runtime doesn't release the socket.
    pub fn rest(self) -> io::Result<Resting> {
        match self {
            Self::Tcp(stream) => stream.into_std().map(Resting::Tcp),
            Self::Tls(stream) => stream.rest().map(|(tcp, session)| Resting::Tls(tcp, session)),
        }
    }

    /// Makes the close of the connection a reset, so that the client can tell a cut from an end.
    pub fn reset_on_close(&self) {
        let _ = SockRef::from(self.tcp()).set_linger(Some(Duration::ZERO));
    }
}

impl Resting {
    /// Returns the socket.
    pub fn tcp(&self) -> &std::net::TcpStream {
        match self {
            Self::Tcp(stream) | Self::Tls(stream, _) => stream,
        }
    }

    /// Closes our sending side.
    ///
    /// # Errors
    /// If the client has already disconnected.
    pub fn close(&mut self) -> io::Result<()> {
        if let Self::Tls(tcp, session) = self {
            session.close(tcp);
        }
        self.tcp().shutdown(Shutdown::Write)
    }

    /// Reads and discards the client's close_notify after ours: closing with unread bytes would reset the connection.
    pub fn discard(&self) {
        if let Self::Tls(tcp, _) = self {
            let (mut tcp, mut bytes) = (tcp, [0; 1024]);
            // Bounded, in case the client keeps sending.
            for _ in 0..64 {
                if !tcp.read(&mut bytes).is_ok_and(|n| n == bytes.len()) {
                    break;
                }
            }
        }
    }

    /// Makes it usable by a task again.
    ///
    /// # Errors
    /// If the runtime doesn't take the socket.
    pub fn go_on(self) -> io::Result<Stream> {
        match self {
            Self::Tcp(stream) => TcpStream::from_std(stream).map(Stream::Tcp),
            Self::Tls(stream, session) => Tls::go_on(stream, session).map(Stream::Tls),
        }
    }
}

impl ClientReader<'_> {
    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Tcp(half) => half.as_ref(),
            Self::Tls(half) => half.tcp(),
        }
    }

    /// Whether unread bytes have arrived, according to the kernel.
    pub fn has_unread(&self) -> bool {
        socket::has_unread(self.tcp())
    }

    /// Whether part of a TLS record has arrived: the beginning of a request.
    pub fn has_partial(&self) -> bool {
        matches!(self, Self::Tls(half) if half.has_partial())
    }
}

impl Source for ClientReader<'_> {
    fn nudge(&self) -> bool {
        match self {
            Self::Tcp(half) => match half.as_ref().try_write(INTERIM) {
                Ok(_) => true,
                Err(error) => error.kind() == io::ErrorKind::WouldBlock,
            },
            Self::Tls(half) => half.try_write(INTERIM),
        }
    }

    fn has_failed(&self) -> bool {
        !matches!(self.tcp().take_error(), Ok(None))
    }

    async fn failed(&self) {
        let _ = self.tcp().ready(Interest::ERROR).await;
    }

    fn unacknowledged(&self) -> u32 {
        socket::unacknowledged(self.tcp())
    }
}

/// The bytes are the whole response, its end included.
impl Sink for ClientWriter<'_> {
    type Head = Vec<u8>;
    const MARKS_END: bool = false;

    fn head(&self) -> Vec<u8> {
        Vec::with_capacity(SIZE)
    }

    fn begin(&mut self, head: Vec<u8>, _: Framing) -> io::Result<Vec<u8>> {
        Ok(head)
    }

    fn ends(&mut self, _: Option<HeaderMap>) {}

    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn unacknowledged(&self) -> u32 {
        match self {
            Self::Tcp(half) => socket::unacknowledged(half.as_ref()),
            Self::Tls(half) => socket::unacknowledged(half.tcp()),
        }
    }
}

impl AsyncRead for ClientReader<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_read(cx, buf),
            Self::Tls(half) => Pin::new(half).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for ClientWriter<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_write(cx, buf),
            Self::Tls(half) => Pin::new(half).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_shutdown(cx),
            Self::Tls(half) => Pin::new(half).poll_shutdown(cx),
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
