//! Heads: what a request or response says, and the bytes that go on in its place. Pure; no sockets.
//!
//! Names keep their case, fields their order, repeated fields stay repeated. Hop-by-hop fields are taken out
//! (RFC 9110 §7.6.1), the framing is checked strictly (RFC 9112 §6.3) and written anew.

mod fields;
mod forwarded;
mod own_urls;
mod request;
mod response;
mod room;

use std::ops::Range;

pub(super) use self::fields::{Field, Said, parse_length};
pub use self::forwarded::Sender;
pub(super) use self::forwarded::{put_forwarded, put_forwarded_for};
pub use self::own_urls::Site;
pub use self::request::{Origin, Request, request};
pub(super) use self::request::{is_idempotent, put_connection};
pub use self::response::{Answer, Response, response};
pub(super) use self::room::Room;

/// How long a message's body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// No body.
    None,
    /// So many bytes.
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

/// Why a head is refused: the status that a client gets, and the reason in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject {
    /// 400, 414, 431, 501 or 505; for a response it becomes 502.
    pub status: u16,
    /// For the answer's body and the log.
    pub why: &'static str,
}

/// RFC 9110 §15.5.15.
pub(super) const URI_TOO_LONG: Reject =
    Reject { status: 414, why: "the request's target is too long (--max-uri)" };

/// RFC 6585 §5.
pub(super) const TOO_MANY_FIELDS: Reject =
    Reject { status: 431, why: "the head has too many fields (--max-fields)" };

pub(super) const fn bad(why: &'static str) -> Reject {
    Reject { status: 400, why }
}

fn unreadable(error: httparse::Error) -> Reject {
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

/// Whether an empty line, a head's end, stands in `buf`, of which `looked` bytes were looked through before. Keeps a
/// head that comes byte by byte from being read anew at each of them.
pub fn ends_within(buf: &[u8], looked: usize) -> bool {
    let fresh = &buf[looked.saturating_sub(3)..];
    memchr::memchr_iter(b'\n', fresh).any(|at| {
        let rest = &fresh[at + 1..];
        rest.starts_with(b"\n") || rest.starts_with(b"\r\n")
    })
}

fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|item| !item.is_empty())
}

fn starts_with(value: &[u8], prefix: &[u8]) -> bool {
    value.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

/// Where `part`, a slice of `buf`, stands in it.
fn within(buf: &[u8], part: &str) -> Range<usize> {
    let start = part.as_ptr() as usize - buf.as_ptr() as usize;
    start..start + part.len()
}

pub(super) fn put(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
}

pub(super) fn put_field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    put(out, &[name.as_bytes(), b": ", value, b"\r\n"]);
}
