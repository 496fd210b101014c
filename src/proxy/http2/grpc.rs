//! gRPC over HTTP/2: which requests are calls, and how the proxy ends a call itself. Pure; no sockets.
//!
//! Sources: grpc/grpc, doc/PROTOCOL-HTTP2.md, doc/statuscodes.md and doc/http-grpc-status-mapping.md.

use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The call statuses that a proxy sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// No better mapping exists.
    Unknown = 2,
    /// A limit was exceeded.
    ResourceExhausted = 8,
    /// Not available here.
    Unimplemented = 12,
    /// A protocol violation.
    Internal = 13,
    /// Temporarily unavailable; the client may retry.
    Unavailable = 14,
}

/// Whether a request with this content type is a call: `application/grpc`, alone or with a suffix like `+proto`.
/// gRPC-Web (`application/grpc-web`) is another protocol, which also runs over HTTP/1.1.
pub fn is_call(content_type: &[u8]) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    content_type.get(..GRPC.len()).is_some_and(|start| start.eq_ignore_ascii_case(GRPC))
        && matches!(content_type.get(GRPC.len()), None | Some(b'+' | b';' | b' ' | b'\t'))
}

/// [`is_call`], from a request's fields.
pub fn is_call_by(fields: &HeaderMap) -> bool {
    fields.get(CONTENT_TYPE).is_some_and(|value| is_call(value.as_bytes()))
}

/// Maps an HTTP status to a call's status (doc/http-grpc-status-mapping.md; 431 and 501, which it lacks, are the
/// proxy's own refusals).
pub fn code_of(http: u16) -> Code {
    match http {
        400 => Code::Internal,
        404 | 501 => Code::Unimplemented,
        431 => Code::ResourceExhausted,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    }
}

/// Returns a complete response of our own: HTTP 200 with the status fields in the head (Trailers-Only).
pub fn trailers_only(code: Code, why: &str) -> Response<()> {
    let mut answer = Response::new(());
    *answer.status_mut() = StatusCode::OK;
    *answer.headers_mut() = trailers(code, why);
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    answer
}

/// Returns the trailers that end a call.
pub fn trailers(code: Code, why: &str) -> HeaderMap {
    let mut fields = HeaderMap::with_capacity(3);
    fields.insert(GRPC_STATUS, HeaderValue::from(code as u16));
    if let Ok(why) = HeaderValue::try_from(percent_encode(why)) {
        fields.insert(GRPC_MESSAGE, why);
    }
    fields
}

/// Encodes `grpc-message`: visible ASCII and spaces, except `%`, stay unchanged (doc/PROTOCOL-HTTP2.md,
/// Percent-Encoded).
fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => out.push(byte as char),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_told_by_its_content_type_and_grpc_web_is_none() {
        for call in ["application/grpc", "application/grpc+proto", "Application/gRPC; charset=utf-8"] {
            assert!(is_call(call.as_bytes()), "{call}");
        }
        for other in ["application/grpc-web", "application/grpc-web+proto", "application/json", ""] {
            assert!(!is_call(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn an_answer_of_our_own_is_trailers_only_with_a_percent_encoded_message() {
        let answer = trailers_only(code_of(503), "50 % für dich\n");
        let field = |name: &str| answer.headers()[name].to_str().unwrap();
        assert_eq!((answer.status(), field("content-type")), (StatusCode::OK, "application/grpc"));
        assert_eq!((field("grpc-status"), field("grpc-message")), ("14", "50 %25 f%C3%BCr dich%0A"));
    }

    #[test]
    fn http_statuses_map_as_the_specification_says() {
        let codes = [400, 404, 408, 429, 502, 503, 504].map(|status| code_of(status) as u16);
        assert_eq!(codes, [13, 12, 2, 14, 14, 14, 14]);
    }
}
