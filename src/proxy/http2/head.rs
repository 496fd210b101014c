//! A request's head that came by HTTP/2, and the one for the app; trailers between HTTP/2 and HTTP/1.1 (RFC 9113 §8).
//! Pure; no sockets.

use ::h2::Reason;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;

use crate::metrics::Ended;
use crate::proxy::http1::head::{
    Field, Framing, HeadOut, Origin, ParsedFields, Reject, Request, Sender, TOO_MANY_FIELDS, Upgrade, bad,
    is_idempotent, put_connection, put_field, put_forwarded, put_forwarded_for,
};
use crate::proxy::http1::health_check::{Asked, is_health_check};

/// Appends the request's head for the app to `out`, which is empty; `ended` if no body follows. Refuses what `h2`
/// accepts but HTTP/1.1 readers could interpret differently, and more than `max` fields.
///
/// # Errors
/// The status for the client.
pub fn request(
    parts: &Parts,
    max: usize,
    ended: bool,
    sender: Sender<'_>,
    out: &mut impl HeadOut,
) -> Result<Request, Reject> {
    let method = parts.method.as_str();
    if method == "CONNECT" {
        return Err(Reject { status: 501, why: "CONNECT is for forward proxies" });
    }
    let path = parts.uri.path_and_query().map_or("", |path| path.as_str());
    if !(path.starts_with('/') || (path == "*" && method == "OPTIONS")) {
        return Err(bad("the request's target is not a path"));
    }
    if parts.headers.len() > max {
        return Err(TOO_MANY_FIELDS);
    }
    let parsed_fields = read_fields(&parts.headers)?;
    let framing = match parsed_fields.length {
        Some(0) => Framing::None,
        Some(_) if ended => return Err(bad("Content-Length of a request without a body")),
        Some(length) => Framing::Length(length),
        None if ended => Framing::None,
        None => Framing::Chunked,
    };
    // The authority names the host; a Host field may only replace a missing one (RFC 9113 §8.3.1). Both are missing
    // if the request began as HTTP/1.0.
    let host = parts.uri.authority().map(|authority| authority.as_str().as_bytes()).or(parsed_fields.host);
    if host.is_some_and(|host| host.is_empty() || host.contains(&b'@')) {
        return Err(bad("the request names no host"));
    }
    out.request_line(method, ["", path]);
    let named = out.host("Host", host.unwrap_or(sender.app.as_bytes()));
    write_fields(&parts.headers, &parsed_fields, framing, host, sender, out);
    let target = method.len() + 1..method.len() + 1 + path.len();
    let fields = parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len());
    let reopens = method == "GET" && parsed_fields.accepts_events;
    let asked = Asked {
        method,
        path,
        agent: parsed_fields.agent,
        hostless: false,
        bodiless: framing == Framing::None,
        lasts: reopens,
    };
    Ok(Request {
        len: target.end + host.map_or(0, <[u8]>::len) + fields.sum::<usize>(),
        method: 0..method.len(),
        target,
        framing,
        http11: true,
        keep_alive: true,
        head_only: method == "HEAD",
        idempotent: is_idempotent(method),
        upgrade: Upgrade::None,
        reopens,
        health_check: is_health_check(&asked, sender.health_checks),
        origin: Origin {
            https: parsed_fields.https(sender),
            host: if host.is_some() { named } else { 0..0 },
        },
    })
}

fn read_fields(fields: &HeaderMap) -> Result<ParsedFields<'_>, Reject> {
    let mut parsed_fields = ParsedFields::default();
    for (name, value) in fields {
        let value = value.as_bytes();
        if value.trim_ascii().len() != value.len() {
            return Err(bad("a field's value begins or ends with a space"));
        }
        match Field::of(name.as_str()) {
            // Connection-specific fields, which HTTP/2 does not have (RFC 9113 §8.2.2).
            Field::Connection
            | Field::KeepAlive
            | Field::ProxyConnection
            | Field::TransferEncoding
            | Field::Upgrade => return Err(bad("a field that HTTP/2 does not have")),
            field => parsed_fields.field(field, value)?,
        }
    }
    Ok(parsed_fields)
}

fn write_fields(
    fields: &HeaderMap,
    parsed_fields: &ParsedFields<'_>,
    framing: Framing,
    host: Option<&[u8]>,
    sender: Sender<'_>,
    out: &mut impl HeadOut,
) {
    let mut lists_left = parsed_fields.forwarded_for;
    let replace = sender.forwarded == crate::config::Forwarded::Replace;
    for (name, value) in fields {
        match Field::of(name.as_str()) {
            Field::Host | Field::Te => {}
            Field::ForwardedFor => {
                lists_left -= 1;
                put_forwarded_for(out, name.as_str(), value.as_bytes(), lists_left == 0, sender);
            }
            known if replace && known.is_forwarded() => {}
            Field::ClientCertSubject if sender.hide_subject => {}
            _ if *name == header::COOKIE => {}
            _ => out.typed(name, value),
        }
    }
    // HTTP/1.1 allows only one Cookie field (RFC 9113 §8.2.3).
    let crumbs: Vec<_> = fields.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if !crumbs.is_empty() {
        out.field("Cookie", &[&crumbs.join(&b"; "[..])]);
    }
    put_forwarded(out, parsed_fields, host, sender);
    if framing == Framing::Chunked {
        out.connection(&[b"Transfer-Encoding: chunked\r\n"]);
    }
    put_connection(out, parsed_fields, sender);
    out.connection(&[b"\r\n"]);
}

/// Parses the trailer section of a chunked body; `None` if it is empty.
pub fn trailers(section: &[u8]) -> Option<HeaderMap> {
    if section.is_empty() {
        return None;
    }
    let section = &[section, b"\r\n"].concat();
    let mut fields = vec![httparse::EMPTY_HEADER; memchr::memchr_iter(b'\n', section).count()];
    let Ok(httparse::Status::Complete((_, fields))) = httparse::parse_headers(section, &mut fields) else {
        return None;
    };
    let mut trailers = HeaderMap::with_capacity(fields.len());
    for field in fields {
        if is_framing(Field::of(field.name)) {
            continue;
        }
        let (name, value) =
            (HeaderName::from_bytes(field.name.as_bytes()), HeaderValue::from_bytes(field.value));
        trailers.append(name.ok()?, value.ok()?);
    }
    Some(trailers)
}

/// Writes the end of a chunked body, with these trailers.
pub fn last_chunk(trailers: Option<&HeaderMap>, out: &mut Vec<u8>) {
    out.extend_from_slice(b"0\r\n");
    for (name, value) in trailers.into_iter().flatten() {
        if !is_framing(Field::of(name.as_str())) {
            put_field(out, name.as_str(), value.as_bytes());
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// Fields that may not be trailers: a reader that merges them would use them for framing or routing (RFC 9110
/// §6.5.1).
fn is_framing(field: Field) -> bool {
    matches!(
        field,
        Field::Connection
            | Field::ContentLength
            | Field::Host
            | Field::KeepAlive
            | Field::ProxyConnection
            | Field::Te
            | Field::TransferEncoding
            | Field::Upgrade
    )
}

/// Returns the error code for a response that was cut off (RFC 9113 §7).
pub fn reason(ended: Ended) -> Reason {
    match ended {
        Ended::Cut | Ended::TimedOut | Ended::Unanswered | Ended::EventsEnded => Reason::CANCEL,
        Ended::Unsent | Ended::Refused => Reason::REFUSED_STREAM,
        _ => Reason::INTERNAL_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Forwarded;

    fn converted(request: http::request::Builder, ended: bool) -> Result<(Request, String), Reject> {
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let sender =
            Sender { peer: "10.0.0.1", forwarded: Forwarded::Append, app: "app:80", ..Sender::default() };
        let mut out = vec![];
        let request = super::request(&parts, 9, ended, sender, &mut out)?;
        assert_eq!(&out[request.method.clone()], parts.method.as_str().as_bytes());
        Ok((request, String::from_utf8(out).unwrap()))
    }

    #[test]
    fn a_request_becomes_one_of_http_1_1() {
        let asked = http::Request::get("http://shop.example:81/a?b=c")
            .header("cookie", "a=1")
            .header("accept", "text/event-stream")
            .header("cookie", "b=2")
            .header("host", "other.example")
            .header("te", "trailers")
            .header("x-forwarded-for", "192.0.2.1");
        let (request, head) = converted(asked, true).unwrap();
        assert_eq!(
            head,
            "GET /a?b=c HTTP/1.1\r\nHost: shop.example:81\r\naccept: text/event-stream\r\n\
             x-forwarded-for: 192.0.2.1, 10.0.0.1\r\nCookie: a=1; b=2\r\nX-Forwarded-Proto: http\r\n\
             X-Forwarded-Host: shop.example:81\r\nX-Forwarded-Port: 81\r\nConnection: TE\r\nTE: trailers\r\n\r\n"
        );
        assert!(request.reopens && request.idempotent && request.framing == Framing::None);
        assert_eq!(&head[request.target], "/a?b=c");
        assert_eq!(&head[request.origin.host], "shop.example:81");
    }

    #[test]
    fn a_request_that_names_no_host_gets_the_apps_own_and_no_other_word_of_it() {
        let (request, head) = converted(http::Request::get("/only/a/path"), true).unwrap();
        assert_eq!(
            head,
            "GET /only/a/path HTTP/1.1\r\nHost: app:80\r\nX-Forwarded-For: 10.0.0.1\r\n\
             X-Forwarded-Proto: http\r\n\r\n"
        );
        assert!(request.origin.host.is_empty());
        let (request, head) = converted(http::Request::get("/").header("host", "a"), true).unwrap();
        assert_eq!(&head[request.origin.host], "a");
    }

    #[test]
    fn more_fields_than_may_be_are_refused() {
        let many = |n| (0..n).fold(http::Request::get("http://a/"), |get, _| get.header("a", "b"));
        assert!(converted(many(9), true).is_ok());
        assert_eq!(converted(many(10), true).unwrap_err().status, 431);
    }

    #[test]
    fn a_body_of_unknown_length_is_chunked() {
        let post = || http::Request::post("http://a/");
        let (request, head) = converted(post(), false).unwrap();
        assert_eq!(request.framing, Framing::Chunked);
        assert!(head.contains("\r\nTransfer-Encoding: chunked\r\n"), "{head}");
        let (request, head) = converted(post().header("content-length", "5"), false).unwrap();
        assert_eq!(request.framing, Framing::Length(5));
        assert!(!head.contains("Transfer-Encoding"), "{head}");
    }

    #[test]
    fn what_two_readers_could_see_differently_is_refused() {
        let get = || http::Request::get("http://a/");
        for (asked, status) in [
            (http::Request::get("/").header("host", ""), 400),
            (http::Request::get("http://user@a/"), 400),
            (get().header("transfer-encoding", "chunked"), 400),
            (get().header("connection", "close"), 400),
            (get().header("content-length", "1").header("content-length", "1"), 400),
            (get().header("content-length", "+1"), 400),
            (get().header("content-length", "1"), 400),
            (get().header("x", "a "), 400),
            (get().header("host", "a").header("host", "b"), 400),
            (http::Request::connect("a:443"), 501),
        ] {
            assert_eq!(converted(asked, true).map_err(|reject| reject.status).err(), Some(status));
        }
    }

    #[test]
    fn trailers_lose_what_would_be_used_for_framing() {
        assert_eq!(trailers(b""), None);
        let found = trailers(b"Grpc-Status: 0\r\nContent-Length: 7\r\n").unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found["grpc-status"], "0");
        let mut out = vec![];
        last_chunk(Some(&found), &mut out);
        assert_eq!(out, b"0\r\ngrpc-status: 0\r\n\r\n");
    }
}
