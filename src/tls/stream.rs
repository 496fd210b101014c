//! A TLS connection over TCP, as server or as client. Its halves share the session by a cell: both are polled side by
//! side in one task, so there is no lock and nobody is waited for.
//!
//! An end without close_notify is an error, `UnexpectedEof` (RFC 8446 §6.1): whoever reads a body takes it for a cut,
//! whoever waits for a request for a close.

use std::cell::RefCell;
use std::io::{self, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, tcp};

pub use super::session::{Session, Side};
use super::session::{encrypted, is_plain};
use super::subject::subject;

/// Bytes that are taken from a writer at once: what a session holds of them, encrypted, is hardly more.
const AT_ONCE: usize = 64 * 1024;
/// The longest record (RFC 8446 §5.2, RFC 5246 §6.2.3). Room for it is there whatever a reader asks for.
const RECORD: usize = 5 + 16 * 1024 + 2048;
/// Room for what is received, decrypted or encrypted. A message of the handshake, of 64 KiB at most, fits and a record.
const SCRATCH: usize = 128 * 1024;

thread_local! {
    /// Nobody keeps it beyond one call.
    static ROOM: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH]);
}

/// A TLS connection.
#[derive(Debug)]
pub struct Tls {
    tcp: TcpStream,
    session: RefCell<Box<Session>>,
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
    pub fn new(tcp: TcpStream, side: Side) -> Self {
        Self { tcp, session: RefCell::new(Box::new(Session::new(side))) }
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
        session.begin()?;
        loop {
            ready!(poll_flush(&mut session, cx, &mut writer.tcp))?;
            if !session.is_handshaking() {
                return Poll::Ready(Ok(()));
            }
            if ready!(poll_receive(&mut session, cx, &mut reader.tcp, &mut ReadBuf::new(&mut [])))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    /// What was agreed on to be spoken inside, if anything was.
    pub fn protocol(&self) -> Option<Vec<u8>> {
        self.session.borrow().protocol().map(<[u8]>::to_vec)
    }

    /// The subject of the peer's certificate, which was verified, as text (RFC 4514); none without a certificate.
    pub fn peer_subject(&self) -> Option<String> {
        let session = self.session.borrow();
        session.peer_certificate().and_then(|certificate| subject(certificate))
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
pub fn speaks_no_tls(error: &io::Error) -> bool {
    error.get_ref().and_then(|inner| inner.downcast_ref()).is_some_and(is_plain)
}

impl Session {
    /// Takes the last word into the socket, if that takes it at once: nothing more will be sent.
    pub fn close(&mut self, mut tcp: &std::net::TcpStream) {
        self.say_farewell();
        let _ = tcp.write_all(self.outgoing());
    }

    /// Sends what the socket takes now; the rest goes with what is written next.
    fn flush_some(&mut self, tcp: &TcpStream) {
        let outgoing = self.outgoing();
        while !outgoing.is_empty() {
            let Ok(n) = tcp.try_write(outgoing) else { return };
            outgoing.drain(..n);
        }
    }
}

/// Ready once nothing is left to be sent.
fn poll_flush(
    session: &mut Session,
    cx: &mut Context<'_>,
    tcp: &mut tcp::WriteHalf<'_>,
) -> Poll<io::Result<()>> {
    let outgoing = session.outgoing();
    while !outgoing.is_empty() {
        match ready!(Pin::new(&mut *tcp).poll_write(cx, outgoing))? {
            0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            n if n == outgoing.len() => *outgoing = Vec::new(),
            n => drop(outgoing.drain(..n)),
        }
    }
    Poll::Ready(Ok(()))
}

/// Reads from the socket once and decrypts what has come; what `buf` has no room for is kept. 0 at the socket's end.
fn poll_receive(
    session: &mut Session,
    cx: &mut Context<'_>,
    tcp: &mut tcp::ReadHalf<'_>,
    buf: &mut ReadBuf<'_>,
) -> Poll<io::Result<usize>> {
    ROOM.with_borrow_mut(|room| {
        let pending = session.pending();
        // No more than `buf` takes, so that little has to be kept; but always what a record may need.
        let most = (pending + 1).max(encrypted(buf.remaining())).max(RECORD).min(SCRATCH);
        if pending >= most {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long")));
        }
        let mut received = ReadBuf::new(&mut room[pending..most]);
        ready!(Pin::new(&mut *tcp).poll_read(cx, &mut received))?;
        let n = received.filled().len();
        if n == 0 {
            return Poll::Ready(Ok(0));
        }
        let handshaking = session.is_handshaking();
        let taken = session.receive(&mut room[..pending + n], |plain| {
            let n = plain.len().min(buf.remaining());
            buf.put_slice(&plain[..n]);
            n
        });
        // A new key's confirmation, or why it failed. What belongs to a handshake is waited for.
        if session.taken == 0 && !handshaking || taken.is_err() {
            session.flush_some(tcp.as_ref());
        }
        Poll::Ready(taken.map(|()| n))
    })
}

impl ReadHalf<'_> {
    /// The socket below.
    pub fn tcp(&self) -> &TcpStream {
        self.tcp.as_ref()
    }

    /// Sends a few bytes if nothing else is on its way.
    pub fn try_write(&self, bytes: &[u8]) {
        let mut session = self.session.borrow_mut();
        if session.taken > 0 || !session.outgoing().is_empty() {
            return;
        }
        let mut room = vec![0; encrypted(bytes.len())];
        if let Ok(n) = session.encrypt(bytes, &mut room) {
            session.outgoing().extend_from_slice(&room[..n]);
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
        let before = buf.filled().len();
        loop {
            let n = session.plain().len().min(buf.remaining());
            buf.put_slice(&session.plain()[..n]);
            session.consume(n);
            if buf.filled().len() > before || buf.remaining() == 0 || session.is_over()? {
                return Poll::Ready(Ok(()));
            }
            if ready!(poll_receive(&mut session, cx, tcp, buf))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }
}

impl AsyncWrite for WriteHalf<'_> {
    /// Bytes that were taken stay taken: after `Pending` the same ones have to be given again.
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Self { tcp, session } = self.get_mut();
        let mut session = session.borrow_mut();
        // What is left of this, of a handshake or of a nudge goes first, in order.
        ready!(poll_flush(&mut session, cx, tcp))?;
        if session.taken > 0 || buf.is_empty() {
            return Poll::Ready(Ok(std::mem::take(&mut session.taken).min(buf.len())));
        }
        let part = &buf[..buf.len().min(AT_ONCE)];
        ROOM.with_borrow_mut(|room| {
            let n = session.encrypt(part, room)?;
            let mut left = &room[..n];
            // A new key comes before what it is for.
            let mut in_order = session.outgoing().is_empty();
            while in_order && !left.is_empty() {
                match Pin::new(&mut *tcp).poll_write(cx, left) {
                    Poll::Ready(written) => left = &left[written?..],
                    Poll::Pending => in_order = false,
                }
            }
            session.taken = part.len();
            session.outgoing().extend_from_slice(left);
            io::Result::Ok(())
        })?;
        ready!(poll_flush(&mut session, cx, tcp))?;
        Poll::Ready(Ok(std::mem::take(&mut session.taken)))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { tcp, session } = self.get_mut();
        let mut session = session.borrow_mut();
        session.say_farewell();
        ready!(poll_flush(&mut session, cx, tcp))?;
        Pin::new(tcp).poll_shutdown(cx)
    }
}

impl AsyncRead for Tls {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().split().0).poll_read(cx, buf)
    }
}
