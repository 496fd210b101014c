//! A TLS connection over TCP, as server or as client. Its halves share the session in a cell: one task polls both, so
//! there is no lock and no waiting.
//!
//! An end without close_notify is an error, `UnexpectedEof` (RFC 8446 §6.1): a reader of a body treats it as a cut, a
//! reader waiting for a request as a close.

use std::cell::RefCell;
use std::io::{self, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, tcp};

pub use super::session::{Session, Side};
use super::session::{encrypted, is_plain};
use super::subject::subject;

/// Maximum write that becomes a single record, in bytes (RFC 8446 §5.1): the peer can read none of it before the
/// socket has all of it.
pub const ONE_RECORD: usize = 16 * 1024;
/// Maximum bytes accepted from a writer at once, which bounds the encrypted bytes that a session holds.
const MAX_WRITE: usize = 64 * 1024;
/// Maximum length of a record, in bytes (RFC 8446 §5.2, RFC 5246 §6.2.3). There is always room for one, whatever the
/// reader asks for.
const MAX_RECORD: usize = 5 + 16 * 1024 + 2048;
/// Scratch space for received, decrypted or encrypted data, in bytes. Fits a handshake message of at most 64 KiB and
/// a record.
const SCRATCH: usize = 128 * 1024;

thread_local! {
    /// Borrowed only within one call.
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

/// The half that writes. What it has accepted is in the socket.
#[derive(Debug)]
pub struct WriteHalf<'s> {
    tcp: tcp::WriteHalf<'s>,
    session: &'s RefCell<Box<Session>>,
}

impl Tls {
    /// A connection before its handshake.
    pub fn new(tcp: TcpStream, side: Side) -> Self {
        Self { tcp, session: RefCell::new(Box::new(Session::new(side))) }
    }

    /// Returns both halves, which can be used concurrently.
    pub fn split(&mut self) -> (ReadHalf<'_>, WriteHalf<'_>) {
        let (reader, writer) = self.tcp.split();
        (ReadHalf { tcp: reader, session: &self.session }, WriteHalf { tcp: writer, session: &self.session })
    }

    /// Returns the socket.
    pub fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Returns the bare socket, to send an error to a client whose handshake failed.
    pub fn into_tcp(self) -> TcpStream {
        self.tcp
    }

    /// Ready once the handshake is complete and all of it is in the socket.
    ///
    /// # Errors
    /// What went wrong; the peer gets an alert.
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

    /// Returns the subject of the peer's verified certificate as text (RFC 4514); `None` without a certificate.
    pub fn peer_subject(&self) -> Option<String> {
        let session = self.session.borrow();
        session.peer_certificate().and_then(|certificate| subject(certificate))
    }

    /// Splits it into socket and session for parking.
    ///
    /// # Errors
    /// If the runtime doesn't release the socket.
    pub fn rest(self) -> io::Result<(std::net::TcpStream, Box<Session>)> {
        Ok((self.tcp.into_std()?, self.session.into_inner()))
    }

    /// Makes it usable by a task again.
    ///
    /// # Errors
    /// If the runtime doesn't take the socket.
    pub fn go_on(tcp: std::net::TcpStream, session: Box<Session>) -> io::Result<Self> {
        Ok(Self { tcp: TcpStream::from_std(tcp)?, session: RefCell::new(session) })
    }
}

/// Whether a handshake failed because the client speaks plain HTTP, or another protocol without TLS.
pub fn speaks_no_tls(error: &io::Error) -> bool {
    error.get_ref().and_then(|inner| inner.downcast_ref()).is_some_and(is_plain)
}

impl Session {
    /// Sends close_notify if the socket accepts it at once: nothing more will be sent.
    pub fn close(&mut self, mut tcp: &std::net::TcpStream) {
        self.send_close_notify();
        let _ = tcp.write_all(self.outgoing());
    }

    /// Sends what the socket accepts now; the rest goes with the next write. Returns false if the peer has gone.
    fn flush_some(&mut self, tcp: &TcpStream) -> bool {
        let outgoing = self.outgoing();
        while !outgoing.is_empty() {
            match tcp.try_write(outgoing) {
                Ok(n) if n == outgoing.len() => *outgoing = Vec::new(),
                Ok(n) => drop(outgoing.drain(..n)),
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }
}

/// Ready once nothing is left to send.
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

/// Reads from the socket once and decrypts; keeps what doesn't fit into `buf`. 0 at the end.
fn poll_receive(
    session: &mut Session,
    cx: &mut Context<'_>,
    tcp: &mut tcp::ReadHalf<'_>,
    buf: &mut ReadBuf<'_>,
) -> Poll<io::Result<usize>> {
    ROOM.with_borrow_mut(|room| {
        let pending = session.pending();
        // Reads no more than fits into `buf`, so that little has to be kept, but always enough for a record.
        let max = (pending + MAX_RECORD).max(encrypted(buf.remaining())).min(SCRATCH);
        if pending >= max {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long")));
        }
        let mut received = ReadBuf::new(&mut room[pending..max]);
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
        // Confirms a new key, or says why it failed. Handshake messages are flushed elsewhere.
        if session.taken == 0 && !handshaking || taken.is_err() {
            session.flush_some(tcp.as_ref());
        }
        Poll::Ready(taken.map(|()| n))
    })
}

impl ReadHalf<'_> {
    /// Returns the socket.
    pub fn tcp(&self) -> &TcpStream {
        self.tcp.as_ref()
    }

    /// Whether part of a record or message has arrived.
    pub fn has_partial(&self) -> bool {
        self.session.borrow().pending() > 0
    }

    /// Sends a few bytes if nothing else is queued. Returns false if the peer has gone.
    pub fn try_write(&self, bytes: &[u8]) -> bool {
        let mut session = self.session.borrow_mut();
        if session.taken > 0 || !session.outgoing().is_empty() {
            return true;
        }
        let mut room = vec![0; encrypted(bytes.len())];
        let Ok(n) = session.encrypt(bytes, &mut room) else { return false };
        session.outgoing().extend_from_slice(&room[..n]);
        session.flush_some(self.tcp.as_ref())
    }
}

impl WriteHalf<'_> {
    /// Returns the socket.
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
    /// Accepted bytes stay accepted: after `Pending` the same bytes have to be passed again.
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Self { tcp, session } = self.get_mut();
        let mut session = session.borrow_mut();
        // Leftovers of an earlier write, of a handshake or of a nudge go first, in order.
        ready!(poll_flush(&mut session, cx, tcp))?;
        if session.taken > 0 || buf.is_empty() {
            return Poll::Ready(Ok(std::mem::take(&mut session.taken).min(buf.len())));
        }
        let part = &buf[..buf.len().min(MAX_WRITE)];
        ROOM.with_borrow_mut(|room| {
            let n = session.encrypt(part, room)?;
            let mut left = &room[..n];
            // A new key has to be announced before it is used.
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
        session.send_close_notify();
        ready!(poll_flush(&mut session, cx, tcp))?;
        Pin::new(tcp).poll_shutdown(cx)
    }
}

impl AsyncRead for Tls {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().split().0).poll_read(cx, buf)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::Arc;

    use rustls::client::UnbufferedClientConnection;
    use rustls::pki_types::{PrivateKeyDer, ServerName};
    use rustls::server::UnbufferedServerConnection;
    use rustls::{ServerConfig, SupportedProtocolVersion};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::tls::client::client_config;
    use crate::tls::provider;

    /// Both ends of a connection, after its handshake.
    async fn pair(version: &'static SupportedProtocolVersion) -> (Tls, Tls) {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let chain = vec![made.cert.der().clone()];
        let server = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[version]);
        let server = server.unwrap().with_no_client_auth().with_single_cert(chain.clone(), key).unwrap();
        let client = Arc::new(client_config(chain).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (there, here) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let name = ServerName::try_from("localhost").unwrap();
        let client = Side::Client(UnbufferedClientConnection::new(client, name).unwrap());
        let server = Side::Server(UnbufferedServerConnection::new(Arc::new(server)).unwrap());
        let (mut client, mut server) = (Tls::new(there.unwrap(), client), Tls::new(here.unwrap().0, server));
        let shaken =
            tokio::join!(poll_fn(|cx| client.poll_handshake(cx)), poll_fn(|cx| server.poll_handshake(cx)));
        assert!(shaken.0.is_ok() && shaken.1.is_ok(), "{shaken:?}");
        (client, server)
    }

    const VERSIONS: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS12, &rustls::version::TLS13];

    fn holds_nothing(tls: &Tls) -> bool {
        let mut session = tls.session.borrow_mut();
        session.plain().is_empty() && session.pending() == 0 && session.outgoing().capacity() == 0
    }

    #[tokio::test]
    async fn what_was_taken_is_in_the_socket_and_the_rest_is_bounded() {
        for version in VERSIONS {
            let (mut client, mut server) = pair(version).await;
            let body: Vec<u8> = (0..20_000_000u32).map(|n| (n % 251) as u8).collect();
            let mut left = &body[..];
            {
                let (_, mut writer) = server.split();
                // Fills the socket: nothing reads from it.
                while let Ok(n) = tokio::time::timeout(
                    std::time::Duration::from_millis(200),
                    writer.write(&left[..left.len().min(1 << 20)]),
                )
                .await
                {
                    left = &left[n.unwrap()..];
                }
                assert!(writer.session.borrow_mut().outgoing().len() <= encrypted(MAX_WRITE));
            }
            let mut got = Vec::new();
            let (mut reader, _) = client.split();
            let (_, mut writer) = server.split();
            let sending = async {
                writer.write_all(left).await.unwrap();
                writer.shutdown().await.unwrap();
            };
            tokio::join!(sending, async { reader.read_to_end(&mut got).await.unwrap() });
            assert!(got == body, "{version:?}: {} of {}", got.len(), body.len());
            assert!(holds_nothing(&client) && holds_nothing(&server));
        }
    }

    #[tokio::test]
    async fn any_sizes_of_reads_and_writes_give_the_same_bytes() {
        for version in VERSIONS {
            let (mut client, mut server) = pair(version).await;
            let body: Vec<u8> = (0..300_000u32).map(|n| (n % 249) as u8).collect();
            for (max, room) in
                [(1_000, 7), (40_000, 1), (16_384, 16_384), (70_000, 100_000), (300_000, 1_000)]
            {
                let (mut reader, _) = client.split();
                let (_, mut writer) = server.split();
                let sending = async {
                    for part in body.chunks(max) {
                        writer.write_all(part).await.unwrap();
                    }
                };
                let reading = async {
                    let mut got = Vec::new();
                    let mut bytes = vec![0; room];
                    while got.len() < body.len() {
                        let n = reader.read(&mut bytes).await.unwrap();
                        got.extend_from_slice(&bytes[..n]);
                    }
                    got
                };
                let both = async { tokio::join!(sending, reading) };
                let both = tokio::time::timeout(std::time::Duration::from_secs(20), both).await;
                let ((), got) = both.expect("no byte is lost");
                assert!(got == body, "writes of {max}, reads of {room}");
            }
            assert!(holds_nothing(&client) && holds_nothing(&server));
        }
    }

    #[tokio::test]
    async fn only_a_close_notify_is_an_end() {
        for version in VERSIONS {
            let (mut client, mut server) = pair(version).await;
            client.split().1.write_all(b"whole").await.unwrap();
            client.split().1.shutdown().await.unwrap();
            let mut got = Vec::new();
            server.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"whole");
            // The other direction is still open.
            server.split().1.write_all(b"too").await.unwrap();
            let mut three = [0; 3];
            client.read_exact(&mut three).await.unwrap();
            assert_eq!(&three, b"too");
            drop(server);
            assert_eq!(client.read(&mut three).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[tokio::test]
    async fn a_record_that_was_tampered_with_is_an_error_for_good() {
        let (mut client, mut server) = pair(&rustls::version::TLS13).await;
        server.tcp.try_write(&[&[0x17, 3, 3, 0, 30][..], &[7; 30]].concat()).unwrap();
        for _ in 0..2 {
            let error = client.read(&mut [0; 9]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
        // The peer gets an alert.
        let error = server.read(&mut [0; 9]).await.unwrap_err();
        assert!(error.to_string().contains("BadRecordMac"), "{error}");
    }

    #[tokio::test]
    async fn what_rests_goes_on() {
        for version in VERSIONS {
            let (mut client, server) = pair(version).await;
            let (tcp, session) = server.rest().unwrap();
            client.split().1.write_all(b"hi").await.unwrap();
            let mut server = Tls::go_on(tcp, session).unwrap();
            let mut two = [0; 2];
            server.read_exact(&mut two).await.unwrap();
            assert_eq!(&two, b"hi");
            server.split().0.try_write(b"ho");
            client.read_exact(&mut two).await.unwrap();
            assert_eq!(&two, b"ho");
        }
    }
}
