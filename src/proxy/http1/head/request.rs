//! A request's head, and the one for the app.

use std::ops::Range;

use super::fields::{Field, Known, ParsedFields, is_named, named_in_connection};
use super::forwarded::{put_forwarded, put_forwarded_for};
use super::message::{Framing, Reject, Sender, Upgrade, bad, unreadable, within};
use super::out::HeadOut;
use super::room::Room;
use crate::config::Forwarded;
use crate::proxy::http1::health_check::{Asked, is_health_check};

/// The parts of a request's head that the pipeline uses.
#[derive(Clone, Debug)]
pub struct Request {
    /// Length of the head in the buffer it was read from, in bytes.
    pub len: usize,
    /// Position of the method in that buffer; by HTTP/2, in the line that HTTP/1.1 would have.
    pub method: Range<usize>,
    /// Position of the target in that buffer.
    pub target: Range<usize>,
    /// The framing of the body that follows.
    pub framing: Framing,
    /// HTTP/1.1 rather than 1.0.
    pub http11: bool,
    /// The client keeps the connection open for another request.
    pub keep_alive: bool,
    /// The response has no body, whatever its fields say.
    pub head_only: bool,
    /// Sending it twice does what sending it once does (RFC 9110 §9.2.2).
    pub idempotent: bool,
    /// The upgrade it asks for.
    pub upgrade: Upgrade,
    /// A GET that accepts an event stream: its client can reopen the stream.
    pub reopens: bool,
    /// A health check of a kubelet, load balancer or monitor: it counts neither as work nor as an arrival.
    pub health_check: bool,
    /// The scheme and host of the client's URLs of the app.
    pub origin: Origin,
}

/// The scheme and host of a client's URLs of the app.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// `https:` rather than `http:`, according to what the app is told.
    pub https: bool,
    /// Position of the `Host` in the app's head, if that is text; empty if the client sent none.
    pub host: Range<usize>,
}

/// Parses a request's head of at most `max` fields from the start of `buf` and appends the one for the app to `out`.
/// `None` if it is incomplete.
///
/// # Errors
/// Why the head is refused.
pub fn request(
    buf: &[u8],
    max: usize,
    sender: Sender<'_>,
    out: &mut impl HeadOut,
) -> Result<Option<Request>, Reject> {
    let mut room = Room::new();
    let Some((head, len)) = room.request(buf, max).map_err(unreadable)? else { return Ok(None) };
    let (method, target) = (head.method.unwrap_or_default(), head.path.unwrap_or_default());
    let http11 = head.version == Some(1);
    if !ends_lines_in_crlf(&buf[..len], head.headers) {
        return Err(bad("a line does not end in CRLF"));
    }
    let mut known = Known::new();
    let parsed_fields = ParsedFields::read(head.headers, &mut known)?;
    let framing = request_framing(&parsed_fields, http11)?;
    let (authority, path) = split_target(method, target)?;
    if http11 && parsed_fields.host.is_none() {
        return Err(bad("an HTTP/1.1 request needs a Host field"));
    }
    let upgrade = match parsed_fields.upgrade {
        // Upgrading to HTTP/2 is obsolete (RFC 9113 §3.1), and `h2c` is hop-by-hop.
        Some(_) if parsed_fields.h2c => Upgrade::None,
        Some(protocol) if http11 && parsed_fields.upgrade_listed => {
            // A WebSocket's opening request has no body (RFC 6455 §4.1); that of another protocol may have one.
            let websocket = protocol.eq_ignore_ascii_case(b"websocket") && framing == Framing::None;
            if websocket { Upgrade::WebSocket } else { Upgrade::Other }
        }
        _ => Upgrade::None,
    };
    let reopens = method == "GET" && parsed_fields.accepts_events;
    let asked = Asked {
        method,
        path,
        agent: parsed_fields.agent,
        hostless: parsed_fields.host.is_none(),
        bodiless: framing == Framing::None,
        lasts: reopens || upgrade != Upgrade::None,
    };
    let health_check = is_health_check(&asked, sender.health_checks);
    let host = write_request(
        out,
        method,
        path,
        authority,
        (buf, head.headers, &known),
        &parsed_fields,
        sender,
        upgrade,
    );
    Ok(Some(Request {
        len,
        method: within(buf, method),
        target: within(buf, target),
        framing,
        http11,
        keep_alive: parsed_fields.persists(http11),
        head_only: method == "HEAD",
        idempotent: is_idempotent(method),
        upgrade,
        reopens,
        health_check,
        origin: Origin { https: parsed_fields.https(sender), host },
    }))
}

/// Whether repeating the request has no further effect (RFC 9110 §9.2.2).
pub(in crate::proxy) fn is_idempotent(method: &str) -> bool {
    matches!(method, "GET" | "HEAD" | "PUT" | "DELETE" | "OPTIONS" | "TRACE")
}

/// Returns the framing; refuses a message whose length two readers could see differently (RFC 9112 §6.3, §11.2).
fn request_framing(parsed_fields: &ParsedFields<'_>, http11: bool) -> Result<Framing, Reject> {
    match (parsed_fields.codings, parsed_fields.length) {
        (0, None | Some(0)) => Ok(Framing::None),
        (0, Some(length)) => Ok(Framing::Length(length)),
        (_, Some(_)) => Err(bad("both Transfer-Encoding and Content-Length")),
        (1, None) if parsed_fields.chunked && http11 => Ok(Framing::Chunked),
        (1, None) if parsed_fields.chunked => Err(bad("Transfer-Encoding in an HTTP/1.0 request")),
        (1, None) => Err(Reject { status: 501, why: "a Transfer-Encoding other than chunked" }),
        _ => Err(bad("more than one Transfer-Encoding field")),
    }
}

/// Splits an absolute-form target into authority and path (RFC 9112 §3.2.2); other forms pass unchanged.
fn split_target<'b>(method: &str, target: &'b str) -> Result<(Option<&'b str>, &'b str), Reject> {
    if method == "CONNECT" {
        return Err(Reject { status: 501, why: "CONNECT is for forward proxies" });
    }
    if target.starts_with('/') || (target == "*" && method == "OPTIONS") {
        return Ok((None, target));
    }
    let rest = match target.split_once("://") {
        Some((scheme, rest))
            if scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https") =>
        {
            rest
        }
        _ => return Err(bad("the request's target is not a path")),
    };
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    match path {
        _ if authority.is_empty() || authority.contains('@') => {
            Err(bad("the request's target names no host"))
        }
        // `OPTIONS *` asks about the whole server (RFC 9112 §3.2.4).
        "" if method == "OPTIONS" => Ok((Some(authority), "*")),
        path => Ok((Some(authority), path)),
    }
}

/// Writes the head for the app and returns the position of the client's `Host` in `out`.
#[expect(clippy::too_many_arguments, reason = "the parts of one head, written in one go")]
fn write_request(
    out: &mut impl HeadOut,
    method: &str,
    path: &str,
    authority: Option<&str>,
    (buf, fields, known): (&[u8], &[httparse::Header<'_>], &Known),
    parsed_fields: &ParsedFields<'_>,
    sender: Sender<'_>,
    upgrade: Upgrade,
) -> Range<usize> {
    // An absolute target may lack a path, or have only a query.
    let slash = if path.starts_with(['/', '*']) { "" } else { "/" };
    out.request_line(method, [slash, path]);
    let replace = sender.forwarded == Forwarded::Replace;
    let named = named_in_connection(fields, parsed_fields);
    let (mut host, mut lists_left) = (0..0, parsed_fields.forwarded_for);
    for (at, field) in fields.iter().enumerate() {
        match known.of(at, field.name) {
            Field::Connection | Field::KeepAlive | Field::ProxyConnection | Field::Te | Field::Upgrade => {}
            Field::Host if authority.is_some() => {}
            Field::Host => host = out.host(field.name, field.value),
            Field::ForwardedFor => {
                lists_left -= 1;
                put_forwarded_for(out, field.name, field.value, lists_left == 0, sender);
            }
            known if replace && known.is_forwarded() => {}
            Field::ClientCertSubject if sender.hide_subject => {}
            known if is_named(&named, field.name, known) => {}
            _ => out.line(buf, field.name, field.value),
        }
    }
    match (authority, parsed_fields.host) {
        (Some(authority), _) => host = out.host("Host", authority.as_bytes()),
        // HTTP/1.0 has no Host, but HTTP/1.1 requires one (RFC 9112 §3.2), and apps build URLs from it.
        (None, None) => drop(out.host("Host", sender.app.as_bytes())),
        (None, Some(_)) => {}
    }
    put_forwarded(out, parsed_fields, authority.map(str::as_bytes).or(parsed_fields.host), sender);
    match parsed_fields.upgrade.filter(|_| upgrade != Upgrade::None) {
        Some(protocol) => out.connection(&[b"Connection: Upgrade\r\nUpgrade: ", protocol, b"\r\n"]),
        None => put_connection(out, parsed_fields, sender),
    }
    out.connection(&[b"\r\n"]);
    host
}

/// Writes the `Connection` field of a request without an upgrade.
pub(in crate::proxy) fn put_connection(
    out: &mut impl HeadOut,
    parsed_fields: &ParsedFields<'_>,
    sender: Sender<'_>,
) {
    match (parsed_fields.trailers, sender.ask_keep_alive) {
        (true, _) => {
            out.connection(&[b"Connection: TE\r\n"]);
            out.field("TE", &[b"trailers"]);
        }
        (false, true) => out.connection(&[b"Connection: keep-alive\r\n"]),
        (false, false) => {}
    }
}

/// Whether all lines end in CRLF. httparse accepts a bare LF, which other readers may not (RFC 9112 §2.2). A line
/// ends where the next field begins, the last one where the head ends.
fn ends_lines_in_crlf(head: &[u8], fields: &[httparse::Header<'_>]) -> bool {
    head.ends_with(b"\r\n\r\n")
        && fields.iter().all(|field| head[..within(head, field.name).start].ends_with(b"\r\n"))
}
