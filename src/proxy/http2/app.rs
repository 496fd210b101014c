//! Presents an app that speaks HTTP/2 to the request pipeline as one that speaks HTTP/1.1: what is written becomes
//! frames, and the response's frames are read as HTTP/1.1 (RFC 9113 §8).

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use ::h2::client::ResponseFuture;
use ::h2::{RecvStream, SendStream};
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HeaderValue};
use http::{Request, Response};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::spawn_local;

use super::adapter::{Upload, poll_content};
use crate::proxy::http1::body::Body;
use crate::proxy::http1::head::{Framing, HeadOut};
use crate::upstream::{Backend, Lease, was_unprocessed};

/// Time limit for the response's last, empty frame to arrive after its last byte.
const LAST_FRAME_TIMEOUT: Duration = Duration::from_secs(1);

/// A stream to the app; one task uses both halves concurrently.
pub struct AppStream {
    lease: RefCell<Lease>,
    framing: Framing,
    head_only: bool,
    sending: RefCell<Option<Sending>>,
    answer: RefCell<Answer>,
    /// The app has not processed the request.
    unprocessed: Cell<bool>,
}

/// Sends the request's body once its head has been sent.
struct Sending {
    stream: SendStream<Bytes>,
    body: Body,
}

enum Answer {
    /// The request's head is not sent yet.
    Unasked,
    /// The response is awaited; the bytes are interim heads not read yet.
    Awaited(ResponseFuture, Vec<u8>),
    /// The response is arriving; its head is the lead.
    Comes(Upload),
}

/// The half that reads the response.
pub struct Reader<'s>(&'s AppStream);

/// The half that writes the request's body.
pub struct Writer<'s>(&'s AppStream);

impl AppStream {
    /// A stream for a request of this framing; `head_only` if its response has no body.
    pub fn new(lease: Lease, framing: Framing, head_only: bool) -> Self {
        Self {
            lease: RefCell::new(lease),
            framing,
            head_only,
            sending: RefCell::new(None),
            answer: RefCell::new(Answer::Unasked),
            unprocessed: Cell::new(false),
        }
    }

    /// Returns both halves and the server they lead to.
    pub fn split(&self) -> (Reader<'_>, Writer<'_>, Arc<Backend>) {
        (Reader(self), Writer(self), self.lease.borrow().backend().clone())
    }

    /// Whether its connection was opened for it.
    pub fn is_first(&self) -> bool {
        self.lease.borrow().is_first()
    }

    /// Whether the stream failed without the app having processed the request.
    pub fn is_unprocessed(&self) -> bool {
        self.unprocessed.get()
    }

    /// Called when the response is complete. Waits for an empty last frame that may still follow: dropping the stream
    /// earlier would look like a reset to the app.
    pub fn finish(self) {
        let Answer::Comes(upload) = self.answer.into_inner() else { return };
        if !upload.is_ended() {
            let (lease, sending) = (self.lease, self.sending);
            spawn_local(async move {
                let _ = tokio::time::timeout(LAST_FRAME_TIMEOUT, upload.end()).await;
                drop((lease, sending));
            });
        }
    }

    /// Sends the request's head.
    ///
    /// # Errors
    /// If the connection takes no more streams.
    pub fn begin(&self, request: &Request<()>) -> io::Result<()> {
        let sent = self.lease.borrow_mut().send(request.clone(), self.framing == Framing::None);
        let (response, stream) = sent.map_err(|error| self.failed(&error))?;
        let body = Body::new(self.framing);
        *self.sending.borrow_mut() = Some(Sending { stream, body });
        *self.answer.borrow_mut() = Answer::Awaited(response, vec![]);
        Ok(())
    }

    fn failed(&self, error: &::h2::Error) -> io::Error {
        self.unprocessed.set(was_unprocessed(error));
        io::ErrorKind::ConnectionReset.into()
    }
}

impl AsyncWrite for Writer<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut *self.0.sending.borrow_mut() {
            Some(Sending { stream, body }) => poll_content(stream, body, cx, buf),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The end of the request was sent with its last byte.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Reader<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut answer = self.0.answer.borrow_mut();
        let read = loop {
            match &mut *answer {
                Answer::Unasked => return Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
                Answer::Comes(upload) => break upload.poll_read(cx, buf),
                Answer::Awaited(response, lead) => {
                    while let Poll::Ready(Some(Ok(interim))) = response.poll_informational(cx) {
                        write_head(&interim, false, lead);
                    }
                    match Pin::new(response).poll(cx) {
                        Poll::Ready(Ok(response)) => {
                            let lead = std::mem::take(lead);
                            *answer = Answer::Comes(answer_of(response, self.0.head_only, lead));
                        }
                        Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                        Poll::Pending if lead.is_empty() => return Poll::Pending,
                        Poll::Pending => {
                            let n = buf.remaining().min(lead.len());
                            buf.put_slice(&lead[..n]);
                            lead.drain(..n);
                            return Poll::Ready(Ok(()));
                        }
                    }
                }
            }
        };
        read.map_err(|error| self.0.failed(&error))
    }
}

/// Returns the response with its head appended to `lead`.
fn answer_of(response: Response<RecvStream>, head_only: bool, mut lead: Vec<u8>) -> Upload {
    let (parts, body) = response.into_parts();
    let bodiless = head_only || matches!(parts.status.as_u16(), 204 | 304);
    let sized = parts.headers.contains_key(CONTENT_LENGTH);
    let chunked = !bodiless && !sized && !body.is_end_stream();
    let empty = !bodiless && !sized && !chunked;
    let mut head = Response::from_parts(parts, ());
    if empty {
        head.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
    write_head(&head, chunked, &mut lead);
    Upload::new(body, chunked, lead)
}

fn write_head(head: &Response<()>, chunked: bool, out: &mut Vec<u8>) {
    let reason = head.status().canonical_reason().unwrap_or_default();
    out.status_line(head.status().as_u16(), reason.as_bytes());
    for (name, value) in head.headers() {
        out.typed(name, value);
    }
    let coding: &[u8] = if chunked { b"Transfer-Encoding: chunked\r\n" } else { b"" };
    out.connection(&[coding, b"\r\n"]);
}
