//! Heads: what a request or response says, and the bytes that go on in its place. Pure; no sockets.
//!
//! Names keep their case, fields their order, repeated fields stay repeated. Hop-by-hop fields are taken out
//! (RFC 9110 §7.6.1), the framing is checked strictly (RFC 9112 §6.3) and written anew.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::time::Duration;

use crate::config::Forwarded;

/// A head with more fields than this is refused.
const MAX_FIELDS: usize = 256;

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

/// What the pipeline needs to know of a request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Bytes of the head in the buffer that it was read from.
    pub len: usize,
    /// The method, in that buffer.
    pub method: Range<usize>,
    /// The target, in that buffer.
    pub target: Range<usize>,
    /// The body that follows.
    pub framing: Framing,
    /// HTTP/1.1 rather than 1.0.
    pub http11: bool,
    /// The client would send another request over this connection.
    pub keep_alive: bool,
    /// The answer has no body whatever its fields say.
    pub head_only: bool,
    /// Sending it twice does what sending it once does (RFC 9110 §9.2.2).
    pub idempotent: bool,
    /// Upgrade asked for.
    pub upgrade: Upgrade,
    /// A GET that accepts an event stream: its client can reopen it.
    pub reopens: bool,
    /// From the kubelet or a load balancer's health check: neither work nor an arrival.
    pub probe: bool,
}

/// What the pipeline needs to know of a response.
#[derive(Clone, Debug)]
pub struct Response {
    /// Bytes of the head in the buffer that it was read from.
    pub len: usize,
    /// The status code.
    pub status: u16,
    /// The body as the app sends it.
    pub framing: Framing,
    /// The app keeps the connection.
    pub keep_alive: bool,
    /// The app said `Connection: close` in so many words.
    pub says_close: bool,
    /// `Keep-Alive: timeout=`.
    pub keep_alive_timeout: Option<Duration>,
    /// `Content-Type: text/event-stream`, not compressed.
    pub events: bool,
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

pub(super) const fn bad(why: &'static str) -> Reject {
    Reject { status: 400, why }
}

/// Who sent a request, for the forwarded fields.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sender<'a> {
    /// The peer's address as text.
    pub peer: &'a str,
    /// What happens to `X-Forwarded-*`.
    pub forwarded: Forwarded,
    /// It came by TLS.
    pub https: bool,
    /// The subject of its certificate, for `X-Client-Cert-Subject`.
    pub subject: Option<&'a str>,
    /// Such a field from the sender itself is left out.
    pub hide_subject: bool,
    /// The app is asked how long it keeps its connection.
    pub ask_keep_alive: bool,
}

/// Fields that are looked at; all others pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    Accept,
    Connection,
    ContentEncoding,
    ContentLength,
    ContentType,
    Host,
    KeepAlive,
    ProxyConnection,
    Te,
    TransferEncoding,
    Upgrade,
    UserAgent,
    ForwardedFor,
    ForwardedHost,
    ForwardedProto,
    ClientCertSubject,
    Other,
}

impl Field {
    /// By its name.
    pub(super) fn of(name: &str) -> Self {
        let name = name.as_bytes();
        match name.len() {
            2 if is(name, b"te") => Self::Te,
            4 if is(name, b"host") => Self::Host,
            6 if is(name, b"accept") => Self::Accept,
            7 if is(name, b"upgrade") => Self::Upgrade,
            10 if is(name, b"connection") => Self::Connection,
            10 if is(name, b"keep-alive") => Self::KeepAlive,
            10 if is(name, b"user-agent") => Self::UserAgent,
            12 if is(name, b"content-type") => Self::ContentType,
            14 if is(name, b"content-length") => Self::ContentLength,
            15 if is(name, b"x-forwarded-for") => Self::ForwardedFor,
            16 if is(name, b"proxy-connection") => Self::ProxyConnection,
            16 if is(name, b"content-encoding") => Self::ContentEncoding,
            16 if is(name, b"x-forwarded-host") => Self::ForwardedHost,
            17 if is(name, b"transfer-encoding") => Self::TransferEncoding,
            17 if is(name, b"x-forwarded-proto") => Self::ForwardedProto,
            21 if is_dashed(name, b"x-client-cert-subject") => Self::ClientCertSubject,
            _ => Self::Other,
        }
    }

    /// Fields that `Connection` cannot take out: the message would change its meaning or its framing.
    fn is_end_to_end(self) -> bool {
        matches!(
            self,
            Self::Host
                | Self::ContentLength
                | Self::TransferEncoding
                | Self::ContentType
                | Self::ContentEncoding
        ) || matches!(self, Self::ForwardedFor | Self::ForwardedHost | Self::ForwardedProto)
    }
}

/// Whether a field's name is this one, which is given in small letters. Without a branch per byte, since every field of
/// every message comes by here; in a token (RFC 9110 §5.6.2) setting the bit turns only capitals into what `lower` has.
fn is<const N: usize>(name: &[u8], lower: &[u8; N]) -> bool {
    let Ok(name) = <&[u8; N]>::try_from(name) else { return false };
    name.iter().zip(lower).fold(0, |differs, (byte, lower)| differs | ((byte | 0x20) ^ lower)) == 0
}

/// The same with `_` taken for `-`, as in many apps' view of their fields (CGI, RFC 3875 §4.1.18).
fn is_dashed<const N: usize>(name: &[u8], lower: &[u8; N]) -> bool {
    name.iter().zip(lower).all(|(byte, lower)| *lower == if *byte == b'_' { b'-' } else { byte | 0x20 })
}

/// What the fields of either kind of message say together.
#[derive(Default)]
pub(super) struct Said<'b> {
    close: bool,
    keep_alive: bool,
    upgrade_listed: bool,
    /// `Connection` names fields beyond the usual ones, so each field has to be looked up in it.
    names_fields: bool,
    pub(super) length: Option<u64>,
    chunked: bool,
    codings: u32,
    pub(super) host: Option<&'b [u8]>,
    upgrade: Option<&'b [u8]>,
    h2c: bool,
    pub(super) trailers: bool,
    pub(super) forwarded_for: usize,
    forwarded_proto: bool,
    forwarded_host: bool,
    pub(super) probe: bool,
    pub(super) accepts_events: bool,
    events: bool,
    compressed: bool,
    keep_alive_timeout: Option<Duration>,
}

impl<'b> Said<'b> {
    fn read(fields: &[httparse::Header<'b>]) -> Result<Self, Reject> {
        let mut said = Self::default();
        for field in fields {
            said.field(Field::of(field.name), field.value)?;
        }
        Ok(said)
    }

    /// Takes in one field.
    pub(super) fn field(&mut self, field: Field, value: &'b [u8]) -> Result<(), Reject> {
        match field {
            Field::Connection => self.connection(value),
            Field::ContentLength => {
                let length = parse_length(value).ok_or(bad("Content-Length is not one number"))?;
                if self.length.replace(length).is_some() {
                    return Err(bad("more than one Content-Length field"));
                }
            }
            Field::TransferEncoding => {
                self.codings += 1;
                self.chunked = value.eq_ignore_ascii_case(b"chunked");
            }
            Field::Host if self.host.replace(value).is_some() => return Err(bad("more than one Host field")),
            Field::Upgrade => {
                self.h2c |= list(value).any(|protocol| starts_with(protocol, b"h2c"));
                self.upgrade = Some(value);
            }
            Field::Te => self.trailers |= list(value).any(|item| item.eq_ignore_ascii_case(b"trailers")),
            Field::UserAgent => self.probe = is_probe(value),
            Field::Accept => {
                self.accepts_events |= list(value).any(|range| starts_with(range, b"text/event-stream"));
            }
            Field::ContentType => self.events = starts_with(value, b"text/event-stream"),
            Field::ContentEncoding => self.compressed = !value.eq_ignore_ascii_case(b"identity"),
            Field::KeepAlive => self.keep_alive_timeout = parse_keep_alive(value),
            Field::ForwardedFor => self.forwarded_for += 1,
            Field::ForwardedProto => self.forwarded_proto = true,
            Field::ForwardedHost => self.forwarded_host = true,
            Field::Host | Field::ProxyConnection | Field::ClientCertSubject | Field::Other => {}
        }
        Ok(())
    }

    fn connection(&mut self, value: &[u8]) {
        for option in list(value) {
            match option {
                close if close.eq_ignore_ascii_case(b"close") => self.close = true,
                keep if keep.eq_ignore_ascii_case(b"keep-alive") => self.keep_alive = true,
                upgrade if upgrade.eq_ignore_ascii_case(b"upgrade") => self.upgrade_listed = true,
                _ => self.names_fields = true,
            }
        }
    }

    /// Persistence by RFC 9112 §9.3.
    fn persists(&self, http11: bool) -> bool {
        !self.close && (http11 || self.keep_alive)
    }
}

/// Reads a request's head from the start of `buf` and appends to `out` the one for the app.
/// `None`: it isn't complete yet.
pub fn request(buf: &[u8], sender: Sender<'_>, out: &mut Vec<u8>) -> Result<Option<Request>, Reject> {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut head = httparse::Request::new(&mut []);
    let len = match head.parse_with_uninit_headers(buf, &mut fields) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    };
    let (method, target) = (head.method.unwrap_or_default(), head.path.unwrap_or_default());
    let http11 = head.version == Some(1);
    if !ends_lines_in_crlf(&buf[..len], head.headers) {
        return Err(bad("a line does not end in CRLF"));
    }
    let said = Said::read(head.headers)?;
    let framing = request_framing(&said, http11)?;
    let (authority, path) = split_target(method, target)?;
    if http11 && said.host.is_none() {
        return Err(bad("an HTTP/1.1 request needs a Host field"));
    }
    let upgrade = match said.upgrade {
        // HTTP/2 by upgrade is obsolete (RFC 9113 §3.1), and hop by hop besides.
        Some(_) if said.h2c => Upgrade::None,
        Some(protocol) if http11 && said.upgrade_listed && framing == Framing::None => {
            if protocol.eq_ignore_ascii_case(b"websocket") { Upgrade::WebSocket } else { Upgrade::Other }
        }
        _ => Upgrade::None,
    };
    write_request(out, method, path, authority, head.headers, &said, sender, upgrade);
    Ok(Some(Request {
        len,
        method: within(buf, method),
        target: within(buf, target),
        framing,
        http11,
        keep_alive: said.persists(http11),
        head_only: method == "HEAD",
        idempotent: is_idempotent(method),
        upgrade,
        reopens: method == "GET" && said.accepts_events,
        probe: said.probe,
    }))
}

/// Sending it twice does what sending it once does (RFC 9110 §9.2.2).
pub(super) fn is_idempotent(method: &str) -> bool {
    matches!(method, "GET" | "HEAD" | "PUT" | "DELETE" | "OPTIONS" | "TRACE")
}

/// A message whose length two readers could see differently is refused (RFC 9112 §6.3, §11.2).
fn request_framing(said: &Said<'_>, http11: bool) -> Result<Framing, Reject> {
    match (said.codings, said.length) {
        (0, None | Some(0)) => Ok(Framing::None),
        (0, Some(length)) => Ok(Framing::Length(length)),
        (_, Some(_)) => Err(bad("both Transfer-Encoding and Content-Length")),
        (1, None) if said.chunked && http11 => Ok(Framing::Chunked),
        (1, None) if said.chunked => Err(bad("Transfer-Encoding in an HTTP/1.0 request")),
        (1, None) => Err(Reject { status: 501, why: "a Transfer-Encoding other than chunked" }),
        _ => Err(bad("more than one Transfer-Encoding field")),
    }
}

/// Splits an absolute-form target into authority and path (RFC 9112 §3.2.2); other forms pass as they are.
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
        _ => return Err(bad("the request's target is no path")),
    };
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    match path {
        _ if authority.is_empty() || authority.contains('@') => {
            Err(bad("the request's target names no host"))
        }
        // A whole server is asked for its options by `*` (RFC 9112 §3.2.4).
        "" if method == "OPTIONS" => Ok((Some(authority), "*")),
        path => Ok((Some(authority), path)),
    }
}

#[expect(clippy::too_many_arguments, reason = "the parts of one head, written in one go")]
fn write_request(
    out: &mut Vec<u8>,
    method: &str,
    path: &str,
    authority: Option<&str>,
    fields: &[httparse::Header<'_>],
    said: &Said<'_>,
    sender: Sender<'_>,
    upgrade: Upgrade,
) {
    // An absolute target may have no path, or begin with its query.
    let slash: &[u8] = if path.starts_with(['/', '*']) { b"" } else { b"/" };
    put(out, &[method.as_bytes(), b" ", slash, path.as_bytes(), b" HTTP/1.1\r\n"]);
    let replace = sender.forwarded == Forwarded::Replace;
    let mut lists_left = said.forwarded_for;
    for field in fields {
        match Field::of(field.name) {
            Field::Connection | Field::KeepAlive | Field::ProxyConnection | Field::Te | Field::Upgrade => {}
            Field::Host if authority.is_some() => {}
            Field::ForwardedFor => {
                lists_left -= 1;
                put_forwarded_for(out, field.name, field.value, lists_left == 0, sender);
            }
            Field::ForwardedProto | Field::ForwardedHost if replace => {}
            Field::ClientCertSubject if sender.hide_subject => {}
            known if said.names_fields && named_in_connection(fields, field.name, known) => {}
            _ => put_field(out, field.name, field.value),
        }
    }
    match (authority, said.host) {
        (Some(authority), _) => put_field(out, "Host", authority.as_bytes()),
        // HTTP/1.0 knows no Host, but HTTP/1.1 asks for one, empty if there is none (RFC 9112 §3.2).
        (None, None) => put_field(out, "Host", b""),
        (None, Some(_)) => {}
    }
    put_forwarded(out, said, authority.map(str::as_bytes).or(said.host), sender);
    match said.upgrade.filter(|_| upgrade != Upgrade::None) {
        Some(protocol) => put(out, &[b"Connection: Upgrade\r\nUpgrade: ", protocol, b"\r\n"]),
        None => put_connection(out, said, sender),
    }
    out.extend_from_slice(b"\r\n");
}

/// What the app's connection is told where it isn't asked for an upgrade.
pub(super) fn put_connection(out: &mut Vec<u8>, said: &Said<'_>, sender: Sender<'_>) {
    match (said.trailers, sender.ask_keep_alive) {
        (true, _) => put(out, &[b"Connection: TE\r\nTE: trailers\r\n"]),
        (false, true) => put(out, &[b"Connection: keep-alive\r\n"]),
        (false, false) => {}
    }
}

/// A list of those that a request came from; the `last` of several fields is the one that goes on.
pub(super) fn put_forwarded_for(out: &mut Vec<u8>, name: &str, value: &[u8], last: bool, sender: Sender<'_>) {
    match sender.forwarded {
        Forwarded::Replace => {}
        Forwarded::Append if last && value.is_empty() => put_field(out, name, sender.peer.as_bytes()),
        Forwarded::Append if last => {
            put(out, &[name.as_bytes(), b": ", value, b", ", sender.peer.as_bytes(), b"\r\n"]);
        }
        _ => put_field(out, name, value),
    }
}

/// The forwarded fields that are not there yet, or not to be believed, and the client's certificate.
pub(super) fn put_forwarded(out: &mut Vec<u8>, said: &Said<'_>, host: Option<&[u8]>, sender: Sender<'_>) {
    if let Some(subject) = sender.subject {
        put_field(out, "X-Client-Cert-Subject", subject.as_bytes());
    }
    if sender.forwarded == Forwarded::Keep {
        return;
    }
    let replace = sender.forwarded == Forwarded::Replace;
    if replace || said.forwarded_for == 0 {
        put_field(out, "X-Forwarded-For", sender.peer.as_bytes());
    }
    if replace || !said.forwarded_proto {
        put_field(out, "X-Forwarded-Proto", if sender.https { b"https" } else { b"http" });
    }
    if let Some(host) = host.filter(|_| replace || !said.forwarded_host) {
        put_field(out, "X-Forwarded-Host", host);
    }
}

/// What the client's side of a response is to be.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// The client speaks HTTP/1.1.
    pub http11: bool,
    /// The answer to HEAD.
    pub head_only: bool,
    /// The client asked for an upgrade.
    pub upgrade: bool,
    /// The client's connection is closed afterwards.
    pub close: bool,
}

/// Reads a response's head from the start of `buf`. `None`: it isn't complete yet.
/// `finish` is told what it says and returns what the client's side is to be; the head for the client goes to `out`.
pub fn response(
    buf: &[u8],
    head_only: bool,
    out: &mut Vec<u8>,
    finish: impl FnOnce(&Response) -> Answer,
) -> Result<Option<Response>, Reject> {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut head = httparse::Response::new(&mut []);
    let parsed =
        httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut head, buf, &mut fields);
    let len = match parsed {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    };
    let (status, http11) = (head.code.unwrap_or_default(), head.version == Some(1));
    if !(100..=999).contains(&status) {
        return Err(bad("the status is not three digits"));
    }
    let said = Said::read(head.headers)?;
    let framing = response_framing(&said, status, head_only)?;
    let response = Response {
        len,
        status,
        framing,
        // A length beside a coding is an attack or a mistake: the connection is not used again (RFC 9112 §6.3).
        keep_alive: said.persists(http11)
            && framing != Framing::UntilClose
            && !(said.codings > 0 && said.length.is_some()),
        says_close: said.close,
        keep_alive_timeout: said.keep_alive_timeout,
        events: said.events && !said.compressed,
    };
    let answer = finish(&response);
    write_response(out, status, head.reason.unwrap_or_default(), head.headers, &said, framing, answer);
    Ok(Some(response))
}

fn response_framing(said: &Said<'_>, status: u16, head_only: bool) -> Result<Framing, Reject> {
    if head_only || status < 200 || status == 204 || status == 304 {
        return Ok(Framing::None);
    }
    match (said.codings, said.length) {
        (0, None) => Ok(Framing::UntilClose),
        (0, Some(0)) => Ok(Framing::None),
        (0, Some(length)) => Ok(Framing::Length(length)),
        (1, _) if said.chunked => Ok(Framing::Chunked),
        _ => Err(bad("a Transfer-Encoding other than chunked")),
    }
}

fn write_response(
    out: &mut Vec<u8>,
    status: u16,
    reason: &str,
    fields: &[httparse::Header<'_>],
    said: &Said<'_>,
    framing: Framing,
    answer: Answer,
) {
    let digits = [b'0' + (status / 100) as u8, b'0' + (status / 10 % 10) as u8, b'0' + (status % 10) as u8];
    put(out, &[b"HTTP/1.1 ", &digits, b" ", reason.as_bytes(), b"\r\n"]);
    for field in fields {
        match Field::of(field.name) {
            Field::Connection | Field::KeepAlive | Field::ProxyConnection => {}
            Field::Upgrade if status != 101 && status != 426 => {}
            Field::ContentLength if said.codings > 0 || status < 200 || status == 204 => {}
            // The answer to HEAD tells what GET would have, framing included.
            Field::TransferEncoding if !(answer.http11 && framing == Framing::None && answer.head_only) => {}
            known if said.names_fields && named_in_connection(fields, field.name, known) => {}
            _ => put_field(out, field.name, field.value),
        }
    }
    if answer.http11 && matches!(framing, Framing::Chunked | Framing::UntilClose) {
        out.extend_from_slice(b"Transfer-Encoding: chunked\r\n");
    }
    let connection: &[u8] = match status {
        101 if answer.upgrade => b"Connection: Upgrade\r\n",
        100..=199 => b"",
        426 => b"Connection: Upgrade\r\n",
        _ if answer.close => b"Connection: close\r\n",
        _ if !answer.http11 => b"Connection: keep-alive\r\n",
        _ => b"",
    };
    put(out, &[connection, b"\r\n"]);
}

/// A bare LF, which the tokeniser lets pass, is no line end to everybody (RFC 9112 §2.2). A line ends where the next
/// field begins, the last one where the head does.
fn ends_lines_in_crlf(head: &[u8], fields: &[httparse::Header<'_>]) -> bool {
    head.ends_with(b"\r\n\r\n")
        && fields.iter().all(|field| head[..within(head, field.name).start].ends_with(b"\r\n"))
}

pub(super) fn unreadable(error: httparse::Error) -> Reject {
    match error {
        httparse::Error::TooManyHeaders => Reject { status: 431, why: "too many fields in the head" },
        httparse::Error::Version => Reject { status: 505, why: "not HTTP/1.0 or HTTP/1.1" },
        httparse::Error::HeaderName => bad("a field's name has a character that is not allowed"),
        httparse::Error::HeaderValue => bad("a field's value has a character that is not allowed"),
        httparse::Error::NewLine => bad("a line does not end in CRLF"),
        httparse::Error::Status => bad("the status line can't be read"),
        httparse::Error::Token => bad("the request line can't be read"),
    }
}

/// Whether a `Connection` field names this one (RFC 9110 §7.6.1).
fn named_in_connection(fields: &[httparse::Header<'_>], name: &str, known: Field) -> bool {
    !known.is_end_to_end()
        && fields
            .iter()
            .filter(|field| Field::of(field.name) == Field::Connection)
            .flat_map(|field| list(field.value))
            .any(|option| option.eq_ignore_ascii_case(name.as_bytes()))
}

/// Digits only, so that no two readers differ; `None` for anything else, lists and signs included.
pub(super) fn parse_length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(value.iter().fold(0, |length, digit| length * 10 + u64::from(digit - b'0')))
}

fn parse_keep_alive(value: &[u8]) -> Option<Duration> {
    let seconds = list(value).find_map(|item| {
        let (name, seconds) = item.split_at_checked(8)?;
        name.eq_ignore_ascii_case(b"timeout=").then_some(seconds)
    })?;
    std::str::from_utf8(seconds).ok()?.parse::<u32>().ok().map(|s| Duration::from_secs(s.into()))
}

/// Health checks by their user agent: kubelet, AWS, Google Cloud, Envoy, Azure's front door, HAProxy-like ones.
fn is_probe(agent: &[u8]) -> bool {
    const PROBES: [&[u8]; 5] =
        [b"kube-probe/", b"ELB-HealthChecker/", b"GoogleHC/", b"Envoy/HC", b"Edge Health Probe"];
    PROBES.iter().any(|probe| agent.starts_with(probe))
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

/// Whether an empty line, a head's end, stands in `buf`, of which `looked` bytes were looked through before. Keeps a
/// head that comes byte by byte from being read anew at each of them.
pub fn ends_within(buf: &[u8], looked: usize) -> bool {
    let fresh = &buf[looked.saturating_sub(3)..];
    memchr::memchr_iter(b'\n', fresh).any(|at| {
        let rest = &fresh[at + 1..];
        rest.starts_with(b"\n") || rest.starts_with(b"\r\n")
    })
}
