//! A TLS connection over TCP, as server or as client. Its halves share the session by a cell: both are polled side by
//! side in one task, so there is no lock and nobody is waited for.
//!
//! An end without close_notify is an error, `UnexpectedEof` (RFC 8446 §6.1): whoever reads a body takes it for a cut,
//! whoever waits for a request for a close.

use std::cell::RefCell;
use std::io::{self, BufRead, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::{Connection, InvalidMessage};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, tcp};

use super::subject::subject;

/// Bytes that the session takes at once: what it holds of one direction, encrypted, is hardly more.
const AT_ONCE: usize = 64 * 1024;

/// A TLS connection.
#[derive(Debug)]
pub struct Tls {
    tcp: TcpStream,
    session: RefCell<Box<Session>>,
}

/// What a TLS connection is besides its socket.
#[derive(Debug)]
pub struct Session {
    tls: Connection,
    /// Bytes that were taken from a writer and are not all in the socket yet.
    taken: usize,
}

/// The half that reads.
#[derive(Debug)]
pub struct ReadHalf<'s> {
    tcp: tcp::ReadHalf<'s>,
    session: &'s RefCell<Box<Session>>,
}

/// The half that writes. What it has taken is in the socket.
#[derive(Debug)]
pub struct WriteHalf<'s> {
    tcp: tcp::WriteHalf<'s>,
    session: &'s RefCell<Box<Session>>,
}

impl Tls {
    /// A connection whose handshake is still to come.
    pub fn new(tcp: TcpStream, tls: impl Into<Connection>) -> Self {
        Self { tcp, session: RefCell::new(Box::new(Session { tls: tls.into(), taken: 0 })) }
    }

    /// Both halves, usable side by side.
    pub fn split(&mut self) -> (ReadHalf<'_>, WriteHalf<'_>) {
        let (reader, writer) = self.tcp.split();
        (ReadHalf { tcp: reader, session: &self.session }, WriteHalf { tcp: writer, session: &self.session })
    }

    /// The socket below.
    pub fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// The socket alone, for the last words of a connection whose handshake failed.
    pub fn into_tcp(self) -> TcpStream {
        self.tcp
    }

    /// Ready once the handshake is over and everything of it is in the socket.
    ///
    /// # Errors
    /// What went wrong. The peer was told.
    pub fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (mut reader, mut writer) = self.split();
        let mut session = reader.session.borrow_mut();
        loop {
            ready!(session.poll_flush(cx, &mut writer.tcp))?;
            if !session.tls.is_handshaking() {
                return Poll::Ready(Ok(()));
            }
            if ready!(session.poll_receive(cx, &mut reader.tcp))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    /// What was agreed on to be spoken inside, if anything was.
    pub fn protocol(&self) -> Option<Vec<u8>> {
        self.session.borrow().tls.alpn_protocol().map(<[u8]>::to_vec)
    }

    /// The subject of the peer's certificate, which was verified, as text (RFC 4514); none without a certificate.
    pub fn peer_subject(&self) -> Option<String> {
        let session = self.session.borrow();
        session.tls.peer_certificates()?.first().and_then(|certificate| subject(certificate))
    }

    /// For being parked.
    ///
    /// # Errors
    /// When the runtime doesn't let go of the socket.
    pub fn rest(self) -> io::Result<(std::net::TcpStream, Box<Session>)> {
        Ok((self.tcp.into_std()?, self.session.into_inner()))
    }

    /// For use by a task again.
    ///
    /// # Errors
    /// When the runtime doesn't take the socket.
    pub fn go_on(tcp: std::net::TcpStream, session: Box<Session>) -> io::Result<Self> {
        Ok(Self { tcp: TcpStream::from_std(tcp)?, session: RefCell::new(session) })
    }
}

/// Whether a handshake failed because the client speaks plain HTTP, or at least no TLS.
pub fn is_plain(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)))
}

impl Session {
    /// Takes the last word into the socket, if that takes it at once: nothing more will be sent.
    pub fn close(&mut self, mut tcp: &std::net::TcpStream) {
        self.tls.send_close_notify();
        while self.tls.wants_write() && self.tls.write_tls(&mut tcp).is_ok_and(|n| n > 0) {}
    }

    /// Ready once nothing is left to be sent.
    fn poll_flush(&mut self, cx: &mut Context<'_>, tcp: &mut tcp::WriteHalf<'_>) -> Poll<io::Result<()>> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut Polled { cx, half: tcp }) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Sends what the socket takes now; the rest goes with what is written next.
    fn flush_some(&mut self, tcp: &TcpStream) {
        while self.tls.wants_write() && self.tls.write_tls(&mut Now(tcp)).is_ok_and(|n| n > 0) {}
    }

    /// Reads from the socket once and makes of it what can be made; 0 at its end.
    fn poll_receive(&mut self, cx: &mut Context<'_>, tcp: &mut tcp::ReadHalf<'_>) -> Poll<io::Result<usize>> {
        let n = match self.tls.read_tls(&mut Polled { cx, half: &mut *tcp }) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
            read => read?,
        };
        let done = self.tls.process_new_packets();
        // A new key's confirmation, or why it failed.
        if self.taken == 0 && !self.tls.is_handshaking() || done.is_err() && !done.as_ref().is_err_and(plain)
        {
            self.flush_some(tcp.as_ref());
        }
        Poll::Ready(done.map(|_| n).map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why)))
    }
}

fn plain(error: &rustls::Error) -> bool {
    matches!(error, rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType))
}

impl ReadHalf<'_> {
    /// The socket below.
    pub fn tcp(&self) -> &TcpStream {
        self.tcp.as_ref()
    }

    /// Sends a few bytes if nothing else is on its way.
    pub fn try_write(&self, bytes: &[u8]) {
        let mut session = self.session.borrow_mut();
        if session.taken == 0 && !session.tls.wants_write() && session.tls.writer().write_all(bytes).is_ok() {
            session.flush_some(self.tcp.as_ref());
        }
    }
}

impl WriteHalf<'_> {
    /// The socket below.
    pub fn tcp(&self) -> &TcpStream {
        self.tcp.as_ref()
    }
}

impl AsyncRead for ReadHalf<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { tcp, session } = self.get_mut();
        let mut session = session.borrow_mut();
        loop {
            match session.tls.reader().fill_buf() {
                Ok(bytes) => {
                    let n = bytes.len().min(buf.remaining());
                    buf.put_slice(&bytes[..n]);
                    session.tls.reader().consume(n);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            ready!(session.poll_receive(cx, tcp))?;
        }
    }
}

impl AsyncWrite for WriteHalf<'_> {
    /// Bytes that were taken stay taken: after `Pending` the same ones have to be given again.
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Self { tcp, session } = self.get_mut();
        let mut session = session.borrow_mut();
        if session.taken == 0 {
            // What is left of a handshake or a nudge goes first, in order.
            ready!(session.poll_flush(cx, tcp))?;
            session.taken = session.tls.writer().write(&buf[..buf.len().min(AT_ONCE)])?;
        }
        ready!(session.poll_flush(cx, tcp))?;
        Poll::Ready(Ok(std::mem::take(&mut session.taken).min(buf.len())))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { tcp, session } = self.get_mut();
        let mut session = session.borrow_mut();
        session.tls.send_close_notify();
        ready!(session.poll_flush(cx, tcp))?;
        Pin::new(tcp).poll_shutdown(cx)
    }
}

impl AsyncRead for Tls {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().split().0).poll_read(cx, buf)
    }
}

/// A half of the socket as rustls asks for it: what isn't ready now would block, and wakes the task.
struct Polled<'p, 'cx, H> {
    cx: &'p mut Context<'cx>,
    half: &'p mut H,
}

impl Read for Polled<'_, '_, tcp::ReadHalf<'_>> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut buf = ReadBuf::new(bytes);
        match Pin::new(&mut *self.half).poll_read(self.cx, &mut buf) {
            Poll::Ready(read) => read.map(|()| buf.filled().len()),
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl Write for Polled<'_, '_, tcp::WriteHalf<'_>> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        or_would_block(Pin::new(&mut *self.half).poll_write(self.cx, bytes))
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        or_would_block(Pin::new(&mut *self.half).poll_write_vectored(self.cx, parts))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn or_would_block(written: Poll<io::Result<usize>>) -> io::Result<usize> {
    match written {
        Poll::Ready(written) => written,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// The socket without a task to wake.
struct Now<'s>(&'s TcpStream);

impl Write for Now<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
