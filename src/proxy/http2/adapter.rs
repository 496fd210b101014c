//! Presents an HTTP/2 stream to the request pipeline as an HTTP/1.1 client: the request's body is read as HTTP/1.1,
//! and the response's content becomes frames.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use ::h2::server::SendResponse;
use ::h2::{Reason, RecvStream, SendStream};
use bytes::{Buf, Bytes};
use http::HeaderMap;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::head;
use super::typed::TypedHead;
use crate::proxy::http1::body::Body;
use crate::proxy::http1::head::Framing;
use crate::proxy::stream::{Sink, Source};

/// Maximum content per write, in bytes, and so the most that a stream queues before its connection.
pub const MAX_QUEUED: usize = 64 * 1024;

/// A client's stream; one task uses both halves concurrently.
pub struct Adapter {
    upload: RefCell<FrameBody>,
    answer: RefCell<OwnResponse>,
    head_only: bool,
    /// The client has reset the stream or disconnected.
    failed: Cell<bool>,
    /// Bytes of the response taken so far; wraps around.
    taken: Cell<u32>,
}

/// The half that reads the request's body.
pub struct RequestReader<'s>(&'s Adapter);

/// The half that writes the response.
pub struct ResponseWriter<'s>(&'s Adapter);

/// A body received in frames, read as content or, if `chunked`, as HTTP/1.1.
pub struct FrameBody {
    body: RecvStream,
    chunked: bool,
    /// Precedes `piece`: a chunk's size, or the whole last chunk.
    lead: Vec<u8>,
    led: usize,
    piece: Bytes,
    /// Window bytes to release once `piece` has been read.
    owed: usize,
    /// The CRLF that ends a chunk.
    tail: &'static [u8],
    trailers: Option<HeaderMap>,
    ended: bool,
}

/// The response.
struct OwnResponse {
    respond: SendResponse<Bytes>,
    /// Set once the head has been sent.
    stream: Option<SendStream<Bytes>>,
    /// The body ends with what is written next, and perhaps with trailers.
    ends: bool,
    trailers: Option<HeaderMap>,
    whole: bool,
}

impl Adapter {
    /// A stream for a request with this framing.
    pub fn new(framing: Framing, head_only: bool, body: RecvStream, respond: SendResponse<Bytes>) -> Self {
        Self {
            upload: RefCell::new(FrameBody::new(body, framing == Framing::Chunked)),
            answer: RefCell::new(OwnResponse {
                respond,
                stream: None,
                ends: false,
                trailers: None,
                whole: false,
            }),
            head_only,
            failed: Cell::new(false),
            taken: Cell::new(0),
        }
    }

    /// Returns both halves.
    pub fn split(&self) -> (RequestReader<'_>, ResponseWriter<'_>) {
        (RequestReader(self), ResponseWriter(self))
    }

    /// Sends a complete response, if none has begun.
    pub fn respond(&self, send: impl FnOnce(&mut SendResponse<Bytes>, bool)) {
        let mut answer = self.answer.borrow_mut();
        send(&mut answer.respond, self.head_only);
        answer.whole = true;
    }

    /// Whether the response's last byte was handed over.
    pub fn is_whole(&self) -> bool {
        self.answer.borrow().whole
    }

    /// Resets the stream, so that the response has no clean end.
    pub fn reset(&self, reason: Reason) {
        self.answer.borrow_mut().respond.send_reset(reason);
    }

    fn poll_failed(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut answer = self.answer.borrow_mut();
        let failed = match &mut answer.stream {
            None => answer.respond.poll_reset(cx).map(drop),
            Some(stream) => stream.poll_reset(cx).map(drop),
        };
        if failed.is_ready() {
            self.failed.set(true);
        }
        failed
    }
}

impl Source for RequestReader<'_> {
    /// Notices a client that no longer wants its response, which it says with a reset.
    fn nudge(&self) -> bool {
        true
    }

    fn has_failed(&self) -> bool {
        self.0.failed.get()
    }

    async fn failed(&self) {
        poll_fn(|cx| self.0.poll_failed(cx)).await;
    }

    /// Acknowledgements belong to the connection, not to this stream.
    fn unacknowledged(&self) -> u32 {
        0
    }
}

impl Sink for ResponseWriter<'_> {
    type Head = TypedHead;
    const MARKS_END: bool = true;

    fn head(&self) -> TypedHead {
        TypedHead::default()
    }

    fn begin(&mut self, head: TypedHead, framing: Framing) -> io::Result<Vec<u8>> {
        let mut answer = self.0.answer.borrow_mut();
        let head = head.into_response().ok_or(io::ErrorKind::InvalidData)?;
        if head.status().is_informational() {
            answer.respond.send_informational(head).map_err(gone)?;
        } else {
            answer.whole = self.0.head_only || framing == Framing::None;
            let whole = answer.whole;
            answer.stream = Some(answer.respond.send_response(head, whole).map_err(gone)?);
        }
        Ok(Vec::new())
    }

    fn ends(&mut self, trailers: Option<HeaderMap>) {
        let mut answer = self.0.answer.borrow_mut();
        (answer.ends, answer.trailers) = (true, trailers);
    }

    fn end(&mut self) -> io::Result<()> {
        let mut answer = self.0.answer.borrow_mut();
        if answer.whole { Ok(()) } else { answer.send(Bytes::new(), true) }
    }

    /// Returns the number of bytes taken so far: it stops changing when the client gives the stream no more window.
    fn unacknowledged(&self) -> u32 {
        self.0.taken.get()
    }
}

impl AsyncRead for RequestReader<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut upload = self.0.upload.borrow_mut();
        let before = buf.filled().len();
        let read = upload.poll_read(cx, buf).map_err(gone);
        if let Poll::Ready(Err(_)) = read {
            self.0.failed.set(true);
        }
        if !upload.ended || read.is_pending() || buf.filled().len() > before {
            return read;
        }
        // The request is complete; only the client's disconnect is left to notice.
        self.0.poll_failed(cx).map(|()| Err(io::ErrorKind::ConnectionReset.into()))
    }
}

impl FrameBody {
    /// A stream's body.
    pub fn new(body: RecvStream, chunked: bool) -> Self {
        let ended = body.is_end_stream();
        Self {
            body,
            chunked,
            lead: vec![],
            led: 0,
            piece: Bytes::new(),
            owed: 0,
            tail: b"",
            trailers: None,
            ended,
        }
    }

    /// Whether nothing more will arrive.
    pub fn is_ended(&self) -> bool {
        self.ended || self.body.is_end_stream()
    }

    /// Returns the trailers once nothing more will arrive.
    pub fn take_trailers(&mut self) -> Option<HeaderMap> {
        self.trailers.take()
    }

    /// Whether everything has been read.
    pub fn is_drained(&self) -> bool {
        self.is_ended() && self.piece.is_empty()
    }

    /// Waits for the end, before which only trailers can come.
    pub async fn end(mut self) {
        while !self.is_ended() && poll_fn(|cx| self.poll_more(cx)).await.is_ok() {}
    }

    /// Reads the available bytes; none after the end.
    pub fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<Result<(), ::h2::Error>> {
        let before = buf.filled().len();
        loop {
            self.read(buf);
            if buf.remaining() == 0 || self.ended {
                return Poll::Ready(Ok(()));
            }
            match self.poll_more(cx) {
                Poll::Ready(more) => more?,
                Poll::Pending if buf.filled().len() > before => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
            }
            if self.ended {
                self.read(buf);
            }
        }
    }

    /// Copies the available bytes to `buf`.
    fn read(&mut self, buf: &mut ReadBuf<'_>) {
        let n = buf.remaining().min(self.lead.len() - self.led);
        buf.put_slice(&self.lead[self.led..self.led + n]);
        self.led += n;
        let n = buf.remaining().min(self.piece.len());
        buf.put_slice(&self.piece[..n]);
        self.piece.advance(n);
        if self.piece.is_empty() && self.owed > 0 {
            // Fails only for a stream that has already ended.
            let _ = self.body.flow_control().release_capacity(std::mem::take(&mut self.owed));
        }
        let n = if self.piece.is_empty() { buf.remaining().min(self.tail.len()) } else { 0 };
        buf.put_slice(&self.tail[..n]);
        self.tail = &self.tail[n..];
    }

    /// Takes the next piece of the body, once the previous one has been read.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ::h2::Error>> {
        self.lead.clear();
        self.led = 0;
        match ready!(self.body.poll_data(cx)) {
            Some(piece) => {
                self.piece = piece?;
                self.owed = self.piece.len();
                if self.chunked && !self.piece.is_empty() {
                    self.lead.extend_from_slice(format!("{:x}\r\n", self.piece.len()).as_bytes());
                    self.tail = b"\r\n";
                }
            }
            None => {
                self.trailers = ready!(self.body.poll_trailers(cx))?;
                if self.chunked {
                    head::last_chunk(self.trailers.as_ref(), &mut self.lead);
                }
                self.ended = true;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ResponseWriter<'_> {
    /// Sends content.
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut answer = self.0.answer.borrow_mut();
        let Some(stream) = answer.stream.as_mut() else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        let n = ready!(poll_room(stream, cx, buf.len()))?;
        let last = answer.ends && n == buf.len();
        answer.send(Bytes::copy_from_slice(&buf[..n]), last)?;
        self.0.taken.set(self.0.taken.get().wrapping_add(n as u32));
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The end of the response was sent with its last byte.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl OwnResponse {
    fn send(&mut self, content: Bytes, last: bool) -> io::Result<()> {
        let stream = self.stream.as_mut().filter(|_| !self.whole).ok_or(io::ErrorKind::WriteZero)?;
        self.whole = last;
        send(stream, content, last, self.trailers.take_if(|_| last))
    }
}

/// Sends content for which there is room, and if it is the `last`, the end.
fn send(
    stream: &mut SendStream<Bytes>,
    content: Bytes,
    last: bool,
    trailers: Option<HeaderMap>,
) -> io::Result<()> {
    if last || !content.is_empty() {
        stream.send_data(content, last && trailers.is_none()).map_err(gone)?;
    }
    trailers.map_or(Ok(()), |trailers| stream.send_trailers(trailers).map_err(gone))
}

/// Waits until the peer's windows allow content, and returns how much of `wanted` bytes.
fn poll_room(stream: &mut SendStream<Bytes>, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
    while stream.capacity() == 0 {
        stream.reserve_capacity(wanted.min(MAX_QUEUED));
        match ready!(stream.poll_capacity(cx)) {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Poll::Ready(Err(gone(error))),
            None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }
    Poll::Ready(Ok(wanted.min(stream.capacity())))
}

/// Sends as much of a body as the peer's windows allow, without its coding, and its end.
pub fn poll_content(
    stream: &mut SendStream<Bytes>,
    body: &mut Body,
    cx: &mut Context<'_>,
    bytes: &[u8],
) -> Poll<io::Result<usize>> {
    let room = ready!(poll_room(stream, cx, bytes.len()))?;
    let mut content = Vec::with_capacity(room);
    let taken = body.take(&bytes[..room], |piece| content.extend_from_slice(piece));
    let n = taken.map_err(|_| io::ErrorKind::InvalidData)?;
    let last = body.is_done();
    let trailers = if last { head::trailers(body.trailers()) } else { None };
    send(stream, content.into(), last, trailers)?;
    Poll::Ready(Ok(n))
}

fn gone(_: ::h2::Error) -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}
