//! A head in HTTP/2 form while it is written, whatever the message came as. Pure; no sockets.

use std::ops::Range;

use bytes::BytesMut;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Response, StatusCode, Uri, Version};

use crate::proxy::http1::head::{Field, HeadOut};

/// A request's or a response's head for HTTP/2.
#[derive(Default)]
pub struct TypedHead {
    method: Option<Method>,
    path: Option<PathAndQuery>,
    authority: Option<Authority>,
    status: StatusCode,
    fields: HeaderMap,
    /// The memory of all values.
    values: BytesMut,
    /// HTTP/2 can't express it.
    broken: bool,
}

impl TypedHead {
    /// Returns the request; `None` if HTTP/2 can't express it.
    pub fn into_request(self) -> Option<Request<()>> {
        let mut uri = http::uri::Parts::default();
        uri.path_and_query = Some(self.path?);
        uri.scheme = Some(Scheme::HTTP);
        // HTTP/1.0 has no host, but HTTP/2 readers expect one (RFC 9113 §8.3.1).
        uri.authority = Some(self.authority.unwrap_or(Authority::from_static("localhost")));
        let mut request = Request::new(());
        *request.method_mut() = self.method?;
        *request.uri_mut() = Uri::from_parts(uri).ok()?;
        *request.headers_mut() = self.fields;
        *request.version_mut() = Version::HTTP_2;
        Some(request).filter(|_| !self.broken)
    }

    /// Returns the response; `None` if HTTP/2 can't express it.
    pub fn into_response(self) -> Option<Response<()>> {
        let mut response = Response::new(());
        *response.status_mut() = self.status;
        *response.headers_mut() = self.fields;
        Some(response).filter(|_| !self.broken)
    }
}

impl HeadOut for TypedHead {
    fn clear(&mut self) {
        *self = Self::default();
    }

    fn request_line(&mut self, method: &str, target: [&str; 2]) {
        self.method = Method::from_bytes(method.as_bytes()).ok();
        self.path = match target {
            ["", path] => PathAndQuery::try_from(path).ok(),
            parts => PathAndQuery::try_from(parts.concat()).ok(),
        };
    }

    fn status_line(&mut self, status: u16, _: &[u8]) {
        match StatusCode::from_u16(status) {
            Ok(status) => self.status = status,
            Err(_) => self.broken = true,
        }
    }

    fn host(&mut self, _: &str, value: &[u8]) -> Range<usize> {
        if !value.is_empty() {
            self.authority = Authority::try_from(value).ok();
            self.broken |= self.authority.is_none();
        }
        0..value.len()
    }

    /// Drops an upgrade: HTTP/2 has none (RFC 9113 §8.6).
    fn field(&mut self, name: &str, value: &[&[u8]]) {
        if matches!(Field::of(name), Field::TransferEncoding | Field::Upgrade) {
            return;
        }
        value.iter().for_each(|part| self.values.extend_from_slice(part));
        let value = HeaderValue::from_maybe_shared(self.values.split().freeze());
        match (HeaderName::from_bytes(name.as_bytes()), value) {
            (Ok(name), Ok(value)) => drop(self.fields.append(name, value)),
            _ => self.broken = true,
        }
    }

    fn typed(&mut self, name: &HeaderName, value: &HeaderValue) {
        self.fields.append(name, value.clone());
    }

    fn connection(&mut self, _: &[&[u8]]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Forwarded;
    use crate::proxy::http1::head::{ResponsePlan, Sender, Site, request, response};

    fn converted(bytes: &[u8]) -> Option<Request<()>> {
        let sender = Sender { forwarded: Forwarded::Keep, ..Sender::default() };
        let mut head = TypedHead::default();
        request(bytes, 9, sender, &mut head).unwrap().unwrap();
        head.into_request()
    }

    #[test]
    fn a_head_of_http_1_1_becomes_fields() {
        let request = converted(
            b"POST /a?b HTTP/1.1\r\nHost: shop.example:81\r\nX-A: 1\r\nx-a: 2\r\nTransfer-Encoding: chunked\r\n\
              Connection: TE\r\nTE: trailers\r\n\r\n",
        );
        let request = request.unwrap();
        assert_eq!(
            (request.method(), request.uri().to_string().as_str()),
            (&Method::POST, "http://shop.example:81/a?b")
        );
        let fields: Vec<_> =
            request.headers().iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        assert_eq!(fields, [("x-a", &b"1"[..]), ("x-a", b"2"), ("te", b"trailers")]);
    }

    #[test]
    fn an_answer_loses_what_belongs_to_a_connection() {
        let bytes = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\nConnection: close, X-Hop\r\n\
                      Keep-Alive: timeout=5\r\nProxy-Connection: close\r\nX-Hop: 1\r\nUpgrade: h2c\r\nX-A: 2\r\n\r\n";
        let side = ResponsePlan { http11: true, head_only: false, upgrade: false, close: true };
        let site = Site { https: false, host: b"", app: &[] };
        for side in [side, ResponsePlan { head_only: true, ..side }] {
            let mut head = TypedHead::default();
            response(bytes, 9, side.head_only, site, &mut head, |_| side).unwrap().unwrap();
            let response = head.into_response().unwrap();
            let fields: Vec<_> =
                response.headers().iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
            assert_eq!(
                (response.status(), &fields[..]),
                (StatusCode::OK, &[("x-a", &b"1"[..]), ("x-a", b"2")][..])
            );
        }
    }

    #[test]
    fn an_upgrade_is_not_asked_for_and_there_is_always_an_authority() {
        let asked = b"GET / HTTP/1.1\r\nHost: \r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        let request = converted(asked).unwrap();
        assert_eq!(request.uri(), "http://localhost/");
        assert_eq!(request.headers().len(), 0);
        assert!(converted(b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n").is_none());
    }
}
