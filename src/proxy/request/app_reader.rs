//! The half that reads the app's response, as the pipeline needs it of either protocol.

use std::future::{Future, poll_fn};
use std::io;
use std::task::Poll;

use tokio::io::AsyncRead;

use super::exchange::Exchange;
use super::failure::{Failure, Lost};
use crate::proxy::buffer::Buffer;
use crate::proxy::http1::head::{self, HeadOut, Response, Site};
use crate::proxy::http2::app;
use crate::upstream::{self, Backend};

/// Reads the app's response: its heads, then its body as [`Response::framing`] says. What was read and not yet used is
/// in the caller's buffer.
pub trait AppReader: AsyncRead + Unpin {
    /// Waits for the response to begin. Returns false if the connection ended instead.
    ///
    /// # Errors
    /// If the connection is lost.
    fn begins(&mut self, buf: &mut Buffer) -> impl Future<Output = io::Result<bool>>;
    /// Reads the next head, interim or final, and writes the client's version of it to `out`. `first` is true for the
    /// first head of a response, and false after an interim one.
    ///
    /// # Errors
    /// If the connection is lost, or the head is refused.
    fn head(
        &mut self,
        exchange: &Exchange<'_>,
        app: (&Backend, Site<'_>),
        buf: &mut Buffer,
        out: &mut impl HeadOut,
        first: bool,
    ) -> impl Future<Output = Result<Response, Failure>>;
    /// Whether the whole body has been read; false where only the end of the connection would tell.
    fn is_drained(&self) -> bool;
    /// Returns the trailers after a body without a coding of its own.
    fn trailers(&mut self) -> Option<http::HeaderMap>;
}

impl AppReader for upstream::UpstreamReader<'_> {
    async fn begins(&mut self, buf: &mut Buffer) -> io::Result<bool> {
        buf.fill(self).await.map(|n| n > 0)
    }

    async fn head(
        &mut self,
        exchange: &Exchange<'_>,
        (backend, site): (&Backend, Site<'_>),
        buf: &mut Buffer,
        out: &mut impl HeadOut,
        first: bool,
    ) -> Result<Response, Failure> {
        const TOO_LARGE: Failure = Failure::AppBroken("the head of the app's answer is too large");
        let head_only = exchange.request.head_only;
        let limits = &exchange.worker.shared.settings.limits;
        let max = limits.max_head;
        let mut seen = 0;
        loop {
            if !buf.is_empty() && (seen == 0 || head::ends_within(buf.unread(), seen)) {
                out.clear();
                let (bytes, plan) = (buf.unread(), |response: &Response| exchange.plan(response, backend));
                match head::response(bytes, limits.max_fields, head_only, site, out, plan) {
                    Ok(Some(response)) if response.len > max => return Err(TOO_LARGE),
                    Ok(Some(response)) => {
                        buf.consume(response.len);
                        return Ok(response);
                    }
                    Ok(None) => {}
                    Err(reject) => return Err(Failure::AppBroken(reject.why)),
                }
            }
            seen = buf.unread().len();
            if seen >= max {
                return Err(TOO_LARGE);
            }
            match buf.fill(self).await {
                Ok(n) if n > 0 => {}
                ended => return Err(Failure::AppGone(Lost::by(&ended, seen == 0 && first))),
            }
        }
    }

    fn is_drained(&self) -> bool {
        false
    }

    fn trailers(&mut self) -> Option<http::HeaderMap> {
        None
    }
}

impl AppReader for app::ResponseReader<'_> {
    async fn begins(&mut self, _: &mut Buffer) -> io::Result<bool> {
        self.head_arrives().await.map(|()| true)
    }

    async fn head(
        &mut self,
        exchange: &Exchange<'_>,
        (backend, site): (&Backend, Site<'_>),
        buf: &mut Buffer,
        out: &mut impl HeadOut,
        first: bool,
    ) -> Result<Response, Failure> {
        let lost = |error| Failure::AppGone(Lost::by(&Err(error), first));
        self.head_arrives().await.map_err(lost)?;
        let (head, whole) = self.take_head().map_err(lost)?;
        let max = exchange.worker.shared.settings.limits.max_fields;
        let side = (exchange.request.head_only, whole);
        let plan = |response: &Response| exchange.plan(response, backend);
        let response = head::typed_response(&head, max, side, site, out, plan)
            .map_err(|reject| Failure::AppBroken(reject.why))?;
        if response.status >= 200 {
            // Content that is already here goes out in one write with the head. The next read reports an error again.
            let _ = poll_fn(|cx| Poll::Ready(buf.poll_fill(cx, self))).await;
        }
        Ok(response)
    }

    fn is_drained(&self) -> bool {
        app::ResponseReader::is_drained(self)
    }

    fn trailers(&mut self) -> Option<http::HeaderMap> {
        self.take_trailers()
    }
}
