//! Presents an HTTP/2 stream to the request pipeline as an HTTP/1.1 client: the request's body is read as HTTP/1.1,
//! and the response's bytes become frames.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use ::h2::server::SendResponse;
use ::h2::{Reason, RecvStream, SendStream};
use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::head;
use crate::proxy::http1::body::Body;
use crate::proxy::http1::head::Framing;
use crate::proxy::stream::{Sink, Source};

/// Maximum content per write, in bytes, and so the most that a stream queues before its connection.
pub const MAX_QUEUED: usize = 64 * 1024;

/// A client's stream; one task uses both halves concurrently.
pub struct Adapter {
    upload: RefCell<Upload>,
    answer: RefCell<Answer>,
    head_only: bool,
    /// The client has reset the stream or disconnected.
    failed: Cell<bool>,
    /// Bytes of the response taken so far; wraps around.
    taken: Cell<u32>,
}

/// The half that reads the request's body.
pub struct Reader<'s>(&'s Adapter);

/// The half that writes the response.
pub struct Writer<'s>(&'s Adapter);

/// A body received in frames, read as HTTP/1.1.
pub struct Upload {
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
    ended: bool,
}

/// The response.
struct Answer {
    respond: SendResponse<Bytes>,
    /// Set once the head has been sent.
    stream: Option<SendStream<Bytes>>,
    /// The rest of the body.
    body: Body,
    /// The chunked coding since the last content; at the end it holds the trailers.
    coded: Vec<u8>,
    whole: bool,
}

impl Adapter {
    /// A stream for a request with this framing.
    pub fn new(framing: Framing, head_only: bool, body: RecvStream, respond: SendResponse<Bytes>) -> Self {
        Self {
            upload: RefCell::new(Upload::new(body, framing == Framing::Chunked, vec![])),
            answer: RefCell::new(Answer {
                respond,
                stream: None,
                body: Body::new(Framing::None),
                coded: vec![],
                whole: false,
            }),
            head_only,
            failed: Cell::new(false),
            taken: Cell::new(0),
        }
    }

    /// Returns both halves.
    pub fn split(&self) -> (Reader<'_>, Writer<'_>) {
        (Reader(self), Writer(self))
    }

    /// Whether the response has no body, whatever its fields say.
    pub fn head_only(&self) -> bool {
        self.head_only
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

impl Source for Reader<'_> {
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

impl Sink for Writer<'_> {
    /// Returns the number of bytes taken so far: it stops changing when the client gives the stream no more window.
    fn unacknowledged(&self) -> u32 {
        self.0.taken.get()
    }
}

impl AsyncRead for Reader<'_> {
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

impl Upload {
    /// A stream's body; `lead` is read before it.
    pub fn new(body: RecvStream, chunked: bool, lead: Vec<u8>) -> Self {
        let ended = body.is_end_stream();
        Self { body, chunked, lead, led: 0, piece: Bytes::new(), owed: 0, tail: b"", ended }
    }

    /// Whether nothing more will arrive.
    pub fn is_ended(&self) -> bool {
        self.ended || self.body.is_end_stream()
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
                let trailers = ready!(self.body.poll_trailers(cx))?;
                if self.chunked {
                    head::last_chunk(trailers.as_ref(), &mut self.lead);
                }
                self.ended = true;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Writer<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut answer = self.0.answer.borrow_mut();
        let wrote = match answer.stream {
            None => Poll::Ready(answer.begin(buf, self.0.head_only)),
            Some(_) => answer.poll_content(cx, buf),
        };
        if let Poll::Ready(Ok(n)) = &wrote {
            self.0.taken.set(self.0.taken.get().wrapping_add(*n as u32));
        }
        wrote
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The end of the response was sent with its last byte.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Answer {
    /// Sends a final or interim head, which is complete at the start of `bytes`.
    fn begin(&mut self, bytes: &[u8], head_only: bool) -> io::Result<usize> {
        let head = head::response(bytes, head_only).ok_or(io::ErrorKind::InvalidData)?;
        if head.response.status().is_informational() {
            self.respond.send_informational(head.response).map_err(gone)?;
            return Ok(head.len);
        }
        self.whole = head.framing == Framing::None;
        self.body = Body::new(head.framing);
        self.stream = Some(self.respond.send_response(head.response, self.whole).map_err(gone)?);
        Ok(head.len)
    }

    /// Sends as much of the body as the client's windows allow.
    fn poll_content(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Some(stream) = self.stream.as_mut().filter(|_| !self.whole) else {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        };
        let sent = poll_content(stream, &mut self.body, &mut self.coded, cx, bytes);
        self.whole = self.body.is_done();
        sent
    }
}

/// Sends as much of a body as the peer's windows allow, and its end.
pub fn poll_content(
    stream: &mut SendStream<Bytes>,
    body: &mut Body,
    coded: &mut Vec<u8>,
    cx: &mut Context<'_>,
    bytes: &[u8],
) -> Poll<io::Result<usize>> {
    while stream.capacity() == 0 {
        stream.reserve_capacity(bytes.len().min(MAX_QUEUED));
        match ready!(stream.poll_capacity(cx)) {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Poll::Ready(Err(gone(error))),
            None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }
    let bytes = &bytes[..bytes.len().min(stream.capacity())];
    let (n, content) = take_content(body, coded, bytes)?;
    let whole = body.is_done();
    let trailers = if whole { head::trailers(coded) } else { None };
    if whole || !content.is_empty() {
        stream.send_data(content, whole && trailers.is_none()).map_err(gone)?;
    }
    if let Some(trailers) = trailers {
        stream.send_trailers(trailers).map_err(gone)?;
    }
    Poll::Ready(Ok(n))
}

/// Returns how many of `bytes` belong to the body, and the content in them.
fn take_content(body: &mut Body, coded: &mut Vec<u8>, bytes: &[u8]) -> io::Result<(usize, Bytes)> {
    if let Body::Length(_) = body {
        let n = body.take(bytes, |_| ()).map_err(|_| io::ErrorKind::InvalidData)?;
        return Ok((n, Bytes::copy_from_slice(&bytes[..n])));
    }
    let (mut content, mut end) = (Vec::with_capacity(bytes.len()), None);
    let n = body.take(bytes, |piece| {
        content.extend_from_slice(piece);
        end = Some(piece.as_ptr() as usize + piece.len() - bytes.as_ptr() as usize);
    });
    let n = n.map_err(|_| io::ErrorKind::InvalidData)?;
    if end.is_some() {
        coded.clear();
    }
    coded.extend_from_slice(&bytes[end.unwrap_or(0)..n]);
    Ok((n, content.into()))
}

fn gone(_: ::h2::Error) -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}
