//! An app that speaks HTTP/2, for the request pipeline: the request's body is written as HTTP/1.1 and becomes frames,
//! and the response is read as heads, content and trailers (RFC 9113 §8).

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use ::h2::SendStream;
use ::h2::client::ResponseFuture;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::spawn_local;

use super::adapter::{FrameBody, poll_content};
use crate::proxy::http1::body::Body;
use crate::proxy::http1::head::Framing;
use crate::upstream::{Backend, Lease, was_unprocessed};

/// Time limit for the response's last, empty frame to arrive after its last byte.
const LAST_FRAME_TIMEOUT: Duration = Duration::from_secs(1);

/// A stream to the app; one task uses both halves concurrently.
pub struct AppStream {
    lease: RefCell<Lease>,
    framing: Framing,
    sending: RefCell<Option<Sending>>,
    answer: RefCell<AppResponse>,
    /// The response's head that has arrived, until it is taken.
    head: RefCell<Option<Response<()>>>,
    /// The app has not processed the request.
    unprocessed: Cell<bool>,
}

/// Sends the request's body once its head has been sent.
struct Sending {
    stream: SendStream<Bytes>,
    body: Body,
}

enum AppResponse {
    /// The request's head is not sent yet.
    Unasked,
    /// The response is awaited.
    Awaited(ResponseFuture),
    /// The response's content and trailers are arriving.
    Comes(FrameBody),
}

/// The half that reads the response.
pub struct ResponseReader<'s>(&'s AppStream);

/// The half that writes the request's body.
pub struct RequestWriter<'s>(&'s AppStream);

impl AppStream {
    /// A stream for a request of this framing.
    pub fn new(lease: Lease, framing: Framing) -> Self {
        Self {
            lease: RefCell::new(lease),
            framing,
            sending: RefCell::new(None),
            answer: RefCell::new(AppResponse::Unasked),
            head: RefCell::new(None),
            unprocessed: Cell::new(false),
        }
    }

    /// Returns both halves and the server they lead to.
    pub fn split(&self) -> (ResponseReader<'_>, RequestWriter<'_>, Arc<Backend>) {
        (ResponseReader(self), RequestWriter(self), self.lease.borrow().backend().clone())
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
        let AppResponse::Comes(upload) = self.answer.into_inner() else { return };
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
        *self.answer.borrow_mut() = AppResponse::Awaited(response);
        Ok(())
    }

    fn failed(&self, error: &::h2::Error) -> io::Error {
        self.unprocessed.set(was_unprocessed(error));
        io::ErrorKind::ConnectionReset.into()
    }
}

impl AsyncWrite for RequestWriter<'_> {
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

impl ResponseReader<'_> {
    /// Waits for the next head, interim or final.
    ///
    /// # Errors
    /// If the stream or its connection is lost.
    pub async fn head_arrives(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll_head(cx)).await
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (mut answer, mut head) = (self.0.answer.borrow_mut(), self.0.head.borrow_mut());
        let AppResponse::Awaited(response) = &mut *answer else { return Poll::Ready(Ok(())) };
        if head.is_some() {
            return Poll::Ready(Ok(()));
        }
        if let Poll::Ready(Some(Ok(interim))) = response.poll_informational(cx) {
            *head = Some(interim);
            return Poll::Ready(Ok(()));
        }
        let (parts, body) =
            ready!(Pin::new(response).poll(cx)).map_err(|error| self.0.failed(&error))?.into_parts();
        *head = Some(Response::from_parts(parts, ()));
        *answer = AppResponse::Comes(FrameBody::new(body, false));
        Poll::Ready(Ok(()))
    }

    /// Returns the head that has arrived, and whether it is the whole response.
    ///
    /// # Errors
    /// If there is none.
    pub fn take_head(&mut self) -> io::Result<(Response<()>, bool)> {
        let head = self.0.head.take().ok_or(io::ErrorKind::NotConnected)?;
        Ok((head, self.is_drained()))
    }

    /// Whether the whole content has been read.
    pub fn is_drained(&self) -> bool {
        matches!(&*self.0.answer.borrow(), AppResponse::Comes(content) if content.is_drained())
    }

    /// Returns the trailers, once the content has been read to its end.
    pub fn take_trailers(&mut self) -> Option<HeaderMap> {
        match &mut *self.0.answer.borrow_mut() {
            AppResponse::Comes(content) => content.take_trailers(),
            AppResponse::Unasked | AppResponse::Awaited(_) => None,
        }
    }
}

/// Reads the response's content.
impl AsyncRead for ResponseReader<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut *self.0.answer.borrow_mut() {
            AppResponse::Comes(content) => content.poll_read(cx, buf).map_err(|error| self.0.failed(&error)),
            AppResponse::Unasked | AppResponse::Awaited(_) => {
                Poll::Ready(Err(io::ErrorKind::NotConnected.into()))
            }
        }
    }
}
