//! Types and helpers shared by request and response heads.

use std::ops::Range;

use crate::config::{Forwarded, HealthCheck};

/// Who sent a request, for the forwarded fields, and the settings for its head.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sender<'a> {
    /// The peer's address as text.
    pub peer: &'a str,
    /// How to treat `X-Forwarded-*`.
    pub forwarded: Forwarded,
    /// It came over TLS.
    pub https: bool,
    /// The subject of its client certificate, for `X-Client-Cert-Subject`.
    pub subject: Option<&'a str>,
    /// Whether `X-Client-Cert-Subject` from the sender itself is removed.
    pub hide_subject: bool,
    /// Health checks named by the user, besides the known ones.
    pub health_checks: &'a [HealthCheck],
    /// Whether to ask the app how long it keeps idle connections.
    pub ask_keep_alive: bool,
    /// The app's own address, as the `Host` of a request without one.
    pub app: &'a str,
}

/// How the length of a message's body is determined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// No body.
    None,
    /// A number of bytes.
    Length(u64),
    /// Chunked, with trailers.
    Chunked,
    /// Until the connection closes; responses only.
    UntilClose,
}

/// What a request asks its connection to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upgrade {
    /// Nothing else.
    None,
    /// A WebSocket.
    WebSocket,
    /// Any other protocol.
    Other,
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject {
    /// 400, 414, 431, 501 or 505; a response's is turned into 502.
    pub status: u16,
    /// The reason, for the response's body and the log.
    pub why: &'static str,
}

/// RFC 9110 §15.5.15.
pub(in crate::proxy) const URI_TOO_LONG: Reject =
    Reject { status: 414, why: "the request's target is too long (--max-uri)" };

/// RFC 6585 §5.
pub(in crate::proxy) const TOO_MANY_FIELDS: Reject =
    Reject { status: 431, why: "the head has too many fields (--max-fields)" };

pub(in crate::proxy) const fn bad(why: &'static str) -> Reject {
    Reject { status: 400, why }
}

pub(super) fn unreadable(error: httparse::Error) -> Reject {
    match error {
        httparse::Error::TooManyHeaders => TOO_MANY_FIELDS,
        httparse::Error::Version => Reject { status: 505, why: "not HTTP/1.0 or HTTP/1.1" },
        httparse::Error::HeaderName => bad("a field's name has a character that is not allowed"),
        httparse::Error::HeaderValue => bad("a field's value has a character that is not allowed"),
        httparse::Error::NewLine => bad("a line does not end in CRLF"),
        httparse::Error::Status => bad("the status line can't be read"),
        httparse::Error::Token => bad("the request line can't be read"),
    }
}

/// Whether an empty line, which ends a head, is in `buf`; its first `looked` bytes were searched before. Keeps a head
/// that arrives byte by byte from being searched from the start each time.
pub fn ends_within(buf: &[u8], looked: usize) -> bool {
    let fresh = &buf[looked.saturating_sub(3)..];
    memchr::memchr_iter(b'\n', fresh).any(|at| {
        let rest = &fresh[at + 1..];
        rest.starts_with(b"\n") || rest.starts_with(b"\r\n")
    })
}

pub(super) fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|item| !item.is_empty())
}

pub(super) fn starts_with(value: &[u8], prefix: &[u8]) -> bool {
    value.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

/// Returns the position of `part`, a slice of `buf`, in `buf`.
pub(super) fn within(buf: &[u8], part: &str) -> Range<usize> {
    let start = part.as_ptr() as usize - buf.as_ptr() as usize;
    start..start + part.len()
}

pub(super) fn put(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
}

pub(in crate::proxy) fn put_field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    put(out, &[name.as_bytes(), b": ", value, b"\r\n"]);
}
