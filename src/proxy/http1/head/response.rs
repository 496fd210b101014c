//! A response's head, and the one for the client.

use std::time::Duration;

use super::fields::{Field, Known, ParsedFields, is_named, named_in_connection};
use super::message::{Framing, Reject, TOO_MANY_FIELDS, bad, unreadable};
use super::out::HeadOut;
use super::own_urls::Site;
use super::room::Room;

/// The parts of a response's head that the pipeline uses.
#[derive(Clone, Debug)]
pub struct Response {
    /// Length of the head in the buffer it was read from, in bytes.
    pub len: usize,
    /// The status code.
    pub status: u16,
    /// The body's framing as the app sends it.
    pub framing: Framing,
    /// Whether the app keeps the connection open.
    pub keep_alive: bool,
    /// The app sent `Connection: close`.
    pub says_close: bool,
    /// The value of `Keep-Alive: timeout=`.
    pub keep_alive_timeout: Option<Duration>,
    /// `Content-Type: text/event-stream`.
    pub events: bool,
    /// It has a `Content-Encoding`.
    pub compressed: bool,
}

impl Response {
    /// Our own response to a request that the app will never answer.
    pub fn of_ours(status: u16, framing: Framing) -> Self {
        Self::new(status, framing, &ParsedFields::default())
    }

    fn new(status: u16, framing: Framing, parsed_fields: &ParsedFields<'_>) -> Self {
        Self {
            len: 0,
            status,
            framing,
            keep_alive: false,
            says_close: parsed_fields.close,
            keep_alive_timeout: parsed_fields.keep_alive_timeout,
            events: parsed_fields.events,
            compressed: parsed_fields.compressed,
        }
    }
}

/// The client's side of a response.
#[derive(Clone, Copy, Debug)]
pub struct ResponsePlan {
    /// The client speaks HTTP/1.1.
    pub http11: bool,
    /// The response answers HEAD.
    pub head_only: bool,
    /// The client asked for an upgrade.
    pub upgrade: bool,
    /// The client's connection is closed afterwards.
    pub close: bool,
}

/// Parses a response's head of at most `max` fields from the start of `buf`. `None` if it is incomplete. `finish`
/// gets the result and decides the client's side; the head for the client is appended to `out`.
///
/// # Errors
/// Why the head is refused.
pub fn response(
    buf: &[u8],
    max: usize,
    head_only: bool,
    site: Site<'_>,
    out: &mut impl HeadOut,
    finish: impl FnOnce(&Response) -> ResponsePlan,
) -> Result<Option<Response>, Reject> {
    let mut room = Room::new();
    let Some((head, len)) = room.response(buf, max).map_err(unreadable)? else { return Ok(None) };
    let (status, http11) = (head.code.unwrap_or_default(), head.version == Some(1));
    if !(100..=999).contains(&status) {
        return Err(bad("the status is not three digits"));
    }
    let mut known = Known::new();
    let parsed_fields = ParsedFields::read(head.headers, &mut known)?;
    let framing = response_framing(&parsed_fields, status, head_only)?;
    let response = Response {
        len,
        // A Content-Length beside a Transfer-Encoding is an attack or a mistake: the connection is not reused (RFC
        // 9112 §6.3).
        keep_alive: parsed_fields.persists(http11)
            && framing != Framing::UntilClose
            && !(parsed_fields.codings > 0 && parsed_fields.length.is_some()),
        ..Response::new(status, framing, &parsed_fields)
    };
    let answer = finish(&response);
    out.status_line(status, reason(buf, head.reason.unwrap_or_default()));
    let named = named_in_connection(head.headers, &parsed_fields);
    for (at, field) in head.headers.iter().enumerate() {
        let known = known.of(at, field.name);
        if !is_named(&named, field.name, known)
            && !put_changed(out, (known, field.name, field.value), &response, &parsed_fields, answer, site)
        {
            out.line(buf, field.name, field.value);
        }
    }
    put_end(out, &response, answer);
    Ok(Some(response))
}

/// The same for a head that came by HTTP/2; `whole` if nothing follows it. The body is content, and ends with its
/// stream.
///
/// # Errors
/// Why the head is refused.
pub fn typed_response(
    head: &http::Response<()>,
    max: usize,
    (head_only, whole): (bool, bool),
    site: Site<'_>,
    out: &mut impl HeadOut,
    finish: impl FnOnce(&Response) -> ResponsePlan,
) -> Result<Response, Reject> {
    if head.headers().len() > max {
        return Err(TOO_MANY_FIELDS);
    }
    let mut parsed_fields = ParsedFields::default();
    for (name, value) in head.headers() {
        parsed_fields.field(Field::of(name.as_str()), value.as_bytes())?;
    }
    let status = head.status().as_u16();
    let framing = response_framing(&parsed_fields, status, head_only)?;
    let empty = whole && framing == Framing::UntilClose;
    let framing = if empty { Framing::None } else { framing };
    let response = Response::new(status, framing, &parsed_fields);
    let answer = finish(&response);
    out.status_line(status, head.status().canonical_reason().unwrap_or_default().as_bytes());
    for (name, value) in head.headers() {
        let field = (Field::of(name.as_str()), name.as_str(), value.as_bytes());
        if !put_changed(out, field, &response, &parsed_fields, answer, site) {
            out.typed(name, value);
        }
    }
    if empty {
        out.field("Content-Length", &[b"0"]);
    }
    put_end(out, &response, answer);
    Ok(response)
}

/// Returns the reason phrase unchanged. httparse returns an empty one if it has bytes above ASCII, which are allowed
/// (RFC 9112 §4).
fn reason<'b>(buf: &'b [u8], read: &'b str) -> &'b [u8] {
    if !read.is_empty() {
        return read.as_bytes();
    }
    let start = buf.iter().position(|byte| !b"\r\n".contains(byte)).unwrap_or_default();
    let line = &buf[start..];
    let end = memchr::memchr2(b'\r', b'\n', line).unwrap_or(line.len());
    line[..end].get(b"HTTP/1.1 200 ".len()..).unwrap_or_default()
}

fn response_framing(
    parsed_fields: &ParsedFields<'_>,
    status: u16,
    head_only: bool,
) -> Result<Framing, Reject> {
    if head_only || status < 200 || status == 204 || status == 304 {
        return Ok(Framing::None);
    }
    match (parsed_fields.codings, parsed_fields.length) {
        (0, None) => Ok(Framing::UntilClose),
        (0, Some(0)) => Ok(Framing::None),
        (0, Some(length)) => Ok(Framing::Length(length)),
        (1, _) if parsed_fields.chunked => Ok(Framing::Chunked),
        _ => Err(bad("a Transfer-Encoding other than chunked")),
    }
}

/// Writes a field that the client gets changed, or not at all. Returns false for one that passes as it is.
fn put_changed(
    out: &mut impl HeadOut,
    (known, name, value): (Field, &str, &[u8]),
    response: &Response,
    parsed_fields: &ParsedFields<'_>,
    answer: ResponsePlan,
    site: Site<'_>,
) -> bool {
    let Response { status, framing, .. } = *response;
    match known {
        Field::Connection | Field::KeepAlive | Field::ProxyConnection => true,
        Field::Upgrade => status != 101 && status != 426,
        Field::ContentLength => parsed_fields.codings > 0 || status < 200 || status == 204,
        // The response to HEAD says what GET would have, framing included.
        Field::TransferEncoding => !(answer.http11 && framing == Framing::None && answer.head_only),
        Field::Location | Field::ContentLocation | Field::Refresh | Field::Link => {
            let mut renamed = Vec::new();
            let changed = site.put(known, value, &mut renamed);
            if changed {
                out.field(name, &[&renamed]);
            }
            changed
        }
        _ => false,
    }
}

/// Writes the fields about framing and connection, and the head's end.
fn put_end(out: &mut impl HeadOut, response: &Response, answer: ResponsePlan) {
    let status = response.status;
    if answer.http11 && matches!(response.framing, Framing::Chunked | Framing::UntilClose) {
        out.connection(&[b"Transfer-Encoding: chunked\r\n"]);
    }
    let connection: &[u8] = match status {
        101 if answer.upgrade => b"Connection: Upgrade\r\n",
        100..=199 => b"",
        426 if answer.close => b"Connection: Upgrade, close\r\n",
        426 if !answer.http11 => b"Connection: Upgrade, keep-alive\r\n",
        426 => b"Connection: Upgrade\r\n",
        _ if answer.close => b"Connection: close\r\n",
        _ if !answer.http11 => b"Connection: keep-alive\r\n",
        _ => b"",
    };
    out.connection(&[connection, b"\r\n"]);
}
