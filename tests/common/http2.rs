//! HTTP/2 clients: one by the `h2` crate for valid traffic, and one over a bare socket for invalid traffic.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{self, SendRequest};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Method, Request, Response};

use super::LIMIT;
use super::process::Lameduck;

/// Frame types (RFC 9113 §6).
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
/// Flags; a SETTINGS or PING frame's ACK is the same bit as END_STREAM.
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
/// Error codes (RFC 9113 §7).
pub const NO_ERROR: u32 = 0;
pub const INTERNAL_ERROR: u32 = 2;
pub const REFUSED_STREAM: u32 = 7;
pub const CANCEL: u32 = 8;
pub const ENHANCE_YOUR_CALM: u32 = 11;

/// Runs the asynchronous part of a test. Its connections run on their own threads, so a test may block.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async { tokio::time::timeout(3 * LIMIT, test).await.expect("in time") })
}

/// A connection that follows the protocol.
pub struct Peer {
    send: SendRequest<Bytes>,
    ended: Receiver<Result<(), h2::Error>>,
}

/// A complete response.
#[derive(Debug)]
pub struct Whole {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
    pub trailers: Option<HeaderMap>,
}

impl Whole {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Peer {
    /// Connects.
    pub async fn connect(addr: SocketAddr) -> Self {
        Self::connect_as(addr, &client::Builder::new()).await
    }

    /// Connects with other settings.
    pub async fn connect_as(addr: SocketAddr, builder: &client::Builder) -> Self {
        let builder = builder.clone();
        let ((sender, sent), (told, ended)) = (channel(), channel());
        let connection = async move {
            let stream = tokio::net::TcpStream::connect(addr).await.expect("connected");
            let (send, connection) = builder.handshake::<_, Bytes>(stream).await.expect("HTTP/2");
            sender.send(send).expect("the test is still running");
            let _ = told.send(connection.await);
        };
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(connection);
        });
        Self { send: sent.recv_timeout(LIMIT).expect("connected"), ended }
    }

    /// Drops the connection and waits until it has ended.
    pub fn wait_end(self) -> Result<(), h2::Error> {
        drop(self.send);
        self.ended.recv_timeout(LIMIT).expect("the connection ends")
    }

    /// Whether the connection has ended.
    pub fn has_ended(&self) -> bool {
        !matches!(self.ended.try_recv(), Err(TryRecvError::Empty))
    }

    /// Sends the head of a request without waiting for the response. `end`: the request has no body.
    pub async fn send(&self, request: Request<()>, end: bool) -> (client::ResponseFuture, SendStream<Bytes>) {
        let mut send = self.send.clone().ready().await.expect("a connection that takes requests");
        send.send_request(request, end).expect("sent")
    }

    /// Sends a request and reads its complete response.
    pub async fn ask(&self, request: Request<()>) -> Result<Whole, h2::Error> {
        whole(self.send(request, true).await.0.await?).await
    }

    /// Sends a GET for this path.
    pub async fn get(&self, path: &str) -> Result<Whole, h2::Error> {
        self.ask(to(Method::GET, path)).await
    }
}

/// A request for this path.
pub fn to(method: Method, path: &str) -> Request<()> {
    let request = Request::builder().method(method).uri(format!("http://app.test{path}"));
    request.body(()).expect("a request")
}

/// Reads a complete response.
pub async fn whole(response: Response<RecvStream>) -> Result<Whole, h2::Error> {
    let (parts, mut stream) = response.into_parts();
    let mut body = vec![];
    while let Some(piece) = stream.data().await {
        let piece = piece?;
        stream.flow_control().release_capacity(piece.len())?;
        body.extend_from_slice(&piece);
    }
    let trailers = stream.trailers().await?;
    Ok(Whole { status: parts.status.as_u16(), headers: parts.headers, body, trailers })
}

/// Sends all bytes as the window allows, and ends the stream.
pub async fn upload(stream: &mut SendStream<Bytes>, mut left: Bytes, end: bool) -> Result<(), h2::Error> {
    while !left.is_empty() {
        stream.reserve_capacity(left.len());
        let room = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
        let room = room.unwrap_or(Ok(0))?.min(left.len());
        stream.send_data(left.split_to(room), end && left.is_empty())?;
    }
    Ok(())
}

/// A received frame.
#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub id: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// Error code of an RST_STREAM or GOAWAY.
    pub fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().expect("four bytes"))
    }

    /// Last stream of a GOAWAY.
    pub fn last_stream(&self) -> u32 {
        u32::from_be_bytes(self.payload[..4].try_into().expect("four bytes"))
    }
}

/// A connection that follows only the framing rules.
pub struct Raw {
    socket: TcpStream,
}

impl Raw {
    /// Connects, and sends the preface and SETTINGS.
    pub fn connect(addr: SocketAddr) -> Self {
        let mut raw = Self::bare(addr);
        raw.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        raw.frame(SETTINGS, 0, 0, b"");
        raw
    }

    /// Connects without sending anything.
    pub fn bare(addr: SocketAddr) -> Self {
        let socket = TcpStream::connect(addr).expect("connected");
        socket.set_write_timeout(Some(LIMIT)).expect("a timeout");
        socket.set_nodelay(true).expect("no delay");
        Self { socket }
    }

    /// Sends these bytes; false once the peer no longer accepts any.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.socket.write_all(bytes).is_ok()
    }

    /// Sends a frame; false once the peer no longer accepts any.
    pub fn frame(&mut self, kind: u8, flags: u8, id: u32, payload: &[u8]) -> bool {
        self.send(&frame(kind, flags, id, payload))
    }

    /// Reads the next frame; none at the end of the connection.
    pub fn next(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        self.read(&mut head)?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        self.read(&mut payload)?;
        let id = u32::from_be_bytes(head[5..].try_into().expect("four bytes"));
        Some(Frame { kind: head[3], flags: head[4], id, payload })
    }

    /// Reads the next frame of this type; none if the connection ends first.
    pub fn wait(&mut self, kind: u8) -> Option<Frame> {
        std::iter::from_fn(|| self.next()).find(|frame| frame.kind == kind)
    }

    /// Whether the connection ends within this time; frames until then are skipped.
    pub fn ends_within(&mut self, time: Duration) -> bool {
        let (end, mut bytes) = (Instant::now() + time, [0; 65536]);
        loop {
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.socket.set_read_timeout(Some(left)).expect("a timeout");
            match self.socket.read(&mut bytes) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
            }
            if Instant::now() >= end {
                return false;
            }
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> Option<()> {
        self.socket.set_read_timeout(Some(LIMIT)).expect("a timeout");
        match self.socket.read_exact(bytes) {
            Ok(()) => Some(()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("nothing came for {LIMIT:?}")
            }
            Err(_) => None,
        }
    }
}

/// Bytes of a frame.
pub fn frame(kind: u8, flags: u8, id: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(id.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Header block of a request: `:method GET` and `:scheme http` from the static table, the rest as literals without
/// indexing (RFC 7541 §6.2.2).
pub fn block(path: &str, fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = vec![0x82, 0x86];
    let all = [(":path", path), (":authority", "app.test")];
    for (name, value) in all.iter().chain(fields) {
        block.push(0);
        for text in [name, value] {
            length(text.len(), &mut block);
            block.extend(text.as_bytes());
        }
    }
    block
}

/// An integer with a seven-bit prefix (RFC 7541 §5.1).
fn length(mut length: usize, block: &mut Vec<u8>) {
    if length < 127 {
        return block.push(length as u8);
    }
    block.push(127);
    length -= 127;
    while length >= 128 {
        block.push((length % 128) as u8 | 0x80);
        length /= 128;
    }
    block.push(length as u8);
}

/// An event stream, which a drain ends cleanly on an event boundary.
pub async fn ends_on_a_boundary(proxy: &mut Lameduck, path: &str) {
    let peer = Peer::connect(proxy.listen).await;
    let mut request = to(Method::GET, path);
    request.headers_mut().insert("accept", http::HeaderValue::from_static("text/event-stream"));
    let answer = peer.send(request, true).await.0.await.expect("a head");
    proxy.terminate();
    let events = whole(answer).await.expect("a clean end");
    assert!(events.text().ends_with("\n\n"), "{}", events.text());
}
