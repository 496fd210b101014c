//! An app that speaks HTTP/2: heads that were written for one that speaks HTTP/1.1, as fields (RFC 9113 §8.3).

use std::mem::MaybeUninit;

use bytes::Bytes;
use http::header::{HOST, HeaderMap, HeaderName, HeaderValue, TE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Uri, Version};

use crate::proxy::headers::Field;

/// Fields of a head at most.
const MAX_FIELDS: usize = 256;

/// The request whose head, as it was written for the app, is `bytes`; none if HTTP/2 can't say it. An upgrade is not
/// asked for: HTTP/2 has none (RFC 9113 §8.6).
pub fn request(bytes: &[u8]) -> Option<Request<()>> {
    // One copy for all values.
    let all = Bytes::copy_from_slice(bytes);
    let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut head = httparse::Request::new(&mut []);
    if !head.parse_with_uninit_headers(&all, &mut fields).ok()?.is_complete() {
        return None;
    }
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
            // Whatever else it says is hop by hop (RFC 9113 §8.2.2).
            Field::Te => drop(out.insert(TE, HeaderValue::from_static("trailers"))),
            _ => {
                let value = HeaderValue::from_maybe_shared(all.slice_ref(field.value)).ok()?;
                out.append(HeaderName::from_bytes(field.name.as_bytes()).ok()?, value);
            }
        }
    }
    let mut uri = http::uri::Parts::default();
    uri.path_and_query = Some(PathAndQuery::try_from(head.path?).ok()?);
    let mut version = Version::HTTP_2;
    match host.map(Authority::try_from) {
        Some(Ok(authority)) => (uri.scheme, uri.authority) = (Some(Scheme::HTTP), Some(authority)),
        // Without an authority the app gets what there is (RFC 9113 §8.3.1).
        _ => {
            out.extend(host.and_then(|host| HeaderValue::from_bytes(host).ok()).map(|host| (HOST, host)));
            version = Version::HTTP_11;
        }
    }
    let mut request = Request::new(());
    *request.method_mut() = Method::from_bytes(head.method?.as_bytes()).ok()?;
    *request.uri_mut() = Uri::from_parts(uri).ok()?;
    *request.headers_mut() = out;
    *request.version_mut() = version;
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
    fn an_upgrade_is_not_asked_for_and_an_empty_host_makes_no_authority() {
        let request =
            request(b"GET / HTTP/1.1\r\nHost: \r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
                .unwrap();
        assert_eq!(request.uri(), "/");
        assert_eq!(request.headers().len(), 1);
    }
}
