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
use http::header::{CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, TE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Response, Uri, Version};
use memchr::memmem;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::spawn_local;

use super::adapter::{Upload, poll_content};
use crate::proxy::http1::body::Body;
use crate::proxy::http1::head::{Field, Framing, Room, put, put_field};
use crate::upstream::{Backend, Lease, was_unprocessed};

/// The end of a head.
const HEAD_END: &[u8] = b"\r\n\r\n";

/// Time limit for the response's last, empty frame to arrive after its last byte.
const LAST_FRAME_TIMEOUT: Duration = Duration::from_secs(1);

/// A stream to the app; one task uses both halves concurrently.
pub struct AppStream {
    lease: RefCell<Lease>,
    request: Request<()>,
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
    coded: Vec<u8>,
}

enum Answer {
    /// The request's head is not written yet.
    Unasked,
    /// The response is awaited; the bytes are interim heads not read yet.
    Awaited(ResponseFuture, Vec<u8>),
    /// The response is arriving; its head is the lead.
    Comes(Upload),
}

/// The half that reads the response.
pub struct Reader<'s>(&'s AppStream);

/// The half that writes the request. The head must be written in one piece.
pub struct Writer<'s>(&'s AppStream);

impl AppStream {
    /// A stream for a request of this head and framing; `head_only` if its response has no body.
    pub fn new(lease: Lease, request: Request<()>, framing: Framing, head_only: bool) -> Self {
        Self {
            lease: RefCell::new(lease),
            request,
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

    /// Sends the head, which is in `bytes` in HTTP/1.1 form.
    fn begin(&self, bytes: &[u8]) -> io::Result<usize> {
        let head = memmem::find(bytes, HEAD_END).ok_or(io::ErrorKind::InvalidData)? + HEAD_END.len();
        let request = self.request.clone();
        let sent = self.lease.borrow_mut().send(request, self.framing == Framing::None);
        let (response, stream) = sent.map_err(|error| self.failed(&error))?;
        let body = Body::new(self.framing);
        *self.sending.borrow_mut() = Some(Sending { stream, body, coded: vec![] });
        *self.answer.borrow_mut() = Answer::Awaited(response, vec![]);
        Ok(head)
    }

    fn failed(&self, error: &::h2::Error) -> io::Error {
        self.unprocessed.set(was_unprocessed(error));
        io::ErrorKind::ConnectionReset.into()
    }
}

impl AsyncWrite for Writer<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(Sending { stream, body, coded }) = &mut *self.0.sending.borrow_mut() {
            return poll_content(stream, body, coded, cx, buf);
        }
        Poll::Ready(self.0.begin(buf))
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
    let (status, reason) = (head.status(), head.status().canonical_reason().unwrap_or_default());
    put(out, &[b"HTTP/1.1 ", status.as_str().as_bytes(), b" ", reason.as_bytes(), b"\r\n"]);
    for (name, value) in head.headers() {
        put_field(out, name.as_str(), value.as_bytes());
    }
    if chunked {
        out.extend_from_slice(b"Transfer-Encoding: chunked\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// Converts the HTTP/1.1 head at the start of `bytes`; `None` if HTTP/2 can't express it. Drops an upgrade: HTTP/2
/// has none (RFC 9113 §8.6).
pub fn request(bytes: &[u8]) -> Option<Request<()>> {
    // One copy serves all values.
    let all = Bytes::copy_from_slice(&bytes[..memmem::find(bytes, HEAD_END)? + HEAD_END.len()]);
    let mut room = Room::new();
    let (head, _) = room.request(&all, usize::MAX).ok()??;
    let mut out = HeaderMap::with_capacity(head.headers.len());
    let mut host = None;
    for field in head.headers.iter() {
        match Field::of(field.name) {
            Field::Connection
            | Field::KeepAlive
            | Field::ProxyConnection
            | Field::TransferEncoding
            | Field::Upgrade => {}
            Field::Host => host = Some(field.value),
            // Any other value of TE is hop-by-hop (RFC 9113 §8.2.2).
            Field::Te => drop(out.insert(TE, HeaderValue::from_static("trailers"))),
            _ => {
                let value = HeaderValue::from_maybe_shared(all.slice_ref(field.value)).ok()?;
                out.append(HeaderName::from_bytes(field.name.as_bytes()).ok()?, value);
            }
        }
    }
    let mut uri = http::uri::Parts::default();
    uri.path_and_query = Some(PathAndQuery::try_from(head.path?).ok()?);
    uri.scheme = Some(Scheme::HTTP);
    // HTTP/1.0 has no host, but HTTP/2 readers expect one (RFC 9113 §8.3.1).
    let host = host.filter(|host: &&[u8]| !host.is_empty()).unwrap_or(b"localhost");
    uri.authority = Some(Authority::try_from(host).ok()?);
    let mut request = Request::new(());
    *request.method_mut() = Method::from_bytes(head.method?.as_bytes()).ok()?;
    *request.uri_mut() = Uri::from_parts(uri).ok()?;
    *request.headers_mut() = out;
    *request.version_mut() = Version::HTTP_2;
    Some(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_for_http_1_1_becomes_fields() {
        let bytes = b"POST /a?b HTTP/1.1\r\nHost: shop.example:81\r\nX-A: 1\r\nx-a: 2\r\nTransfer-Encoding: chunked\r\n\
                      Connection: TE\r\nTE: trailers\r\n\r\n";
        let request = request(bytes).unwrap();
        assert_eq!(
            (request.method(), request.uri().to_string().as_str()),
            (&Method::POST, "http://shop.example:81/a?b")
        );
        let fields: Vec<_> =
            request.headers().iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        assert_eq!(fields, [("x-a", &b"1"[..]), ("x-a", b"2"), ("te", b"trailers")]);
    }

    #[test]
    fn an_upgrade_is_not_asked_for_and_there_is_always_an_authority() {
        let bytes = b"GET / HTTP/1.1\r\nHost: \r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        let request = request(bytes).unwrap();
        assert_eq!(request.uri(), "http://localhost/");
        assert_eq!(request.headers().len(), 0);
        assert!(super::request(b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n").is_none());
    }
}
