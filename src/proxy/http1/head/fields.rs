//! The fields that the proxy interprets, and what they say together.

use std::cmp::Ordering;
use std::time::Duration;

use super::message::{Reject, Sender, bad, list, starts_with};
use super::room::USUAL_FIELDS;
use crate::config::Forwarded;

/// Fields that are interpreted; all others pass unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum Field {
    Accept,
    Connection,
    ContentEncoding,
    ContentLength,
    ContentLocation,
    ContentType,
    Host,
    KeepAlive,
    Link,
    Location,
    ProxyConnection,
    Refresh,
    Te,
    TransferEncoding,
    Upgrade,
    UserAgent,
    Forwarded,
    ForwardedFor,
    ForwardedHost,
    ForwardedPort,
    ForwardedProto,
    ClientCertSubject,
    Other,
}

impl Field {
    /// Returns the field of this name.
    pub(in crate::proxy) fn of(name: &str) -> Self {
        let name = name.as_bytes();
        match name.len() {
            2 if is(name, b"te") => Self::Te,
            4 if is(name, b"host") => Self::Host,
            4 if is(name, b"link") => Self::Link,
            6 if is(name, b"accept") => Self::Accept,
            7 if is(name, b"upgrade") => Self::Upgrade,
            7 if is(name, b"refresh") => Self::Refresh,
            8 if is(name, b"location") => Self::Location,
            9 if is(name, b"forwarded") => Self::Forwarded,
            10 if is(name, b"connection") => Self::Connection,
            10 if is(name, b"keep-alive") => Self::KeepAlive,
            10 if is(name, b"user-agent") => Self::UserAgent,
            12 if is(name, b"content-type") => Self::ContentType,
            14 if is(name, b"content-length") => Self::ContentLength,
            15 if is(name, b"x-forwarded-for") => Self::ForwardedFor,
            16 if is(name, b"proxy-connection") => Self::ProxyConnection,
            16 if is(name, b"content-encoding") => Self::ContentEncoding,
            16 if is(name, b"content-location") => Self::ContentLocation,
            16 if is(name, b"x-forwarded-host") => Self::ForwardedHost,
            16 if is(name, b"x-forwarded-port") => Self::ForwardedPort,
            17 if is(name, b"transfer-encoding") => Self::TransferEncoding,
            17 if is(name, b"x-forwarded-proto") => Self::ForwardedProto,
            21 if is_dashed(name, b"x-client-cert-subject") => Self::ClientCertSubject,
            _ => Self::Other,
        }
    }

    /// Fields that `Connection` cannot remove: the message would change its meaning or its framing.
    fn is_end_to_end(self) -> bool {
        matches!(
            self,
            Self::Host
                | Self::ContentLength
                | Self::TransferEncoding
                | Self::ContentType
                | Self::ContentEncoding
        ) || self == Self::ForwardedFor
            || self.is_forwarded()
    }

    /// Fields in which other proxies describe a request's origin, apart from `X-Forwarded-For`, which may be
    /// repeated.
    pub(in crate::proxy) fn is_forwarded(self) -> bool {
        matches!(self, Self::Forwarded | Self::ForwardedHost | Self::ForwardedPort | Self::ForwardedProto)
    }
}

/// Compares a field's name with `lower`, ignoring case. Branch-free, because every field of every message passes
/// here; within a token (RFC 9110 §5.6.2) setting the bit maps only capitals to the letters in `lower`.
fn is<const N: usize>(name: &[u8], lower: &[u8; N]) -> bool {
    let Ok(name) = <&[u8; N]>::try_from(name) else { return false };
    name.iter().zip(lower).fold(0, |differs, (byte, lower)| differs | ((byte | 0x20) ^ lower)) == 0
}

/// The same with `_` equal to `-`, as many apps see their fields (CGI, RFC 3875 §4.1.18).
fn is_dashed<const N: usize>(name: &[u8], lower: &[u8; N]) -> bool {
    name.iter().zip(lower).all(|(byte, lower)| *lower == if *byte == b'_' { b'-' } else { byte | 0x20 })
}

/// Which fields those of a head are, by position, so that an ordinary head's names are compared once.
pub(super) struct Known([Field; USUAL_FIELDS]);

impl Known {
    pub(super) fn new() -> Self {
        Self([Field::Other; USUAL_FIELDS])
    }

    /// Returns which field the one of this name at this position is.
    pub(super) fn of(&self, at: usize, name: &str) -> Field {
        self.0.get(at).copied().unwrap_or_else(|| Field::of(name))
    }
}

/// What a message's fields say together.
#[derive(Default)]
pub(in crate::proxy) struct ParsedFields<'b> {
    pub(super) close: bool,
    pub(super) keep_alive: bool,
    pub(super) upgrade_listed: bool,
    /// `Connection` names fields other than the usual ones, so each field has to be looked up in it.
    pub(super) names_fields: bool,
    pub(in crate::proxy) length: Option<u64>,
    pub(super) chunked: bool,
    pub(super) codings: u32,
    pub(in crate::proxy) host: Option<&'b [u8]>,
    pub(super) upgrade: Option<&'b [u8]>,
    pub(super) h2c: bool,
    pub(in crate::proxy) trailers: bool,
    pub(in crate::proxy) forwarded_for: usize,
    pub(super) forwarded_proto: Option<&'b [u8]>,
    pub(super) forwarded_host: bool,
    pub(super) forwarded_port: bool,
    /// `Forwarded` (RFC 7239) is present.
    pub(super) forwarded: bool,
    pub(in crate::proxy) agent: Option<&'b [u8]>,
    pub(in crate::proxy) accepts_events: bool,
    pub(super) events: bool,
    pub(super) compressed: bool,
    pub(super) keep_alive_timeout: Option<Duration>,
}

impl<'b> ParsedFields<'b> {
    pub(super) fn read(fields: &[httparse::Header<'b>], known: &mut Known) -> Result<Self, Reject> {
        let mut parsed_fields = Self::default();
        for (at, field) in fields.iter().enumerate() {
            let of = Field::of(field.name);
            if let Some(known) = known.0.get_mut(at) {
                *known = of;
            }
            parsed_fields.field(of, field.value)?;
        }
        Ok(parsed_fields)
    }

    /// Interprets one field.
    ///
    /// # Errors
    /// If the field makes the message ambiguous or malformed.
    pub(in crate::proxy) fn field(&mut self, field: Field, value: &'b [u8]) -> Result<(), Reject> {
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
            Field::UserAgent => self.agent = Some(value),
            Field::Accept => {
                self.accepts_events |= list(value).any(|range| starts_with(range, b"text/event-stream"));
            }
            Field::ContentType => self.events = starts_with(value, b"text/event-stream"),
            Field::ContentEncoding => self.compressed |= list(value).any(is_coding),
            Field::KeepAlive => self.keep_alive_timeout = parse_keep_alive(value),
            Field::ForwardedFor => self.forwarded_for += 1,
            Field::ForwardedProto => self.forwarded_proto = Some(value),
            Field::ForwardedHost => self.forwarded_host = true,
            Field::ForwardedPort => self.forwarded_port = true,
            Field::Forwarded => self.forwarded = true,
            Field::Host | Field::ProxyConnection | Field::ClientCertSubject => {}
            Field::ContentLocation | Field::Link | Field::Location | Field::Refresh | Field::Other => {}
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

    /// Whether the client's URLs begin with `https:`, according to what the app is told.
    pub(in crate::proxy) fn https(&self, sender: Sender<'_>) -> bool {
        let told = self.forwarded_proto.filter(|_| sender.forwarded != Forwarded::Replace);
        match told.and_then(|schemes| list(schemes).next()) {
            Some(scheme) if scheme.eq_ignore_ascii_case(b"https") => true,
            Some(scheme) if scheme.eq_ignore_ascii_case(b"http") => false,
            _ => sender.https,
        }
    }

    /// Whether the connection persists (RFC 9112 §9.3).
    pub(super) fn persists(&self, http11: bool) -> bool {
        !self.close && (http11 || self.keep_alive)
    }
}

/// Returns the names in `Connection` besides its usual options, sorted, so that looking up many fields among many
/// names stays cheap. Empty, without an allocation, for an ordinary head.
#[inline]
pub(super) fn named_in_connection<'b>(
    fields: &[httparse::Header<'b>],
    parsed_fields: &ParsedFields<'_>,
) -> Vec<&'b [u8]> {
    if parsed_fields.names_fields { sorted_names(fields) } else { Vec::new() }
}

#[cold]
fn sorted_names<'b>(fields: &[httparse::Header<'b>]) -> Vec<&'b [u8]> {
    let connection = fields.iter().filter(|field| Field::of(field.name) == Field::Connection);
    let mut named: Vec<_> = connection.flat_map(|field| list(field.value)).collect();
    named.sort_unstable_by(|a, b| in_any_case(a, b));
    named
}

/// Whether `Connection` names this field (RFC 9110 §7.6.1).
pub(super) fn is_named(named: &[&[u8]], name: &str, known: Field) -> bool {
    !named.is_empty()
        && !known.is_end_to_end()
        && named.binary_search_by(|option| in_any_case(option, name.as_bytes())).is_ok()
}

fn in_any_case(a: &[u8], b: &[u8]) -> Ordering {
    a.iter().map(u8::to_ascii_lowercase).cmp(b.iter().map(u8::to_ascii_lowercase))
}

/// Parses digits only, so that no two readers differ; `None` for anything else, including lists and signs.
fn parse_length(value: &[u8]) -> Option<u64> {
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

/// Whether a `Content-Encoding` names a coding. Some servers send a name for "no coding" (RFC 9110 §8.4.1 reserves
/// only `identity`).
fn is_coding(name: &[u8]) -> bool {
    !name.eq_ignore_ascii_case(b"identity") && !name.eq_ignore_ascii_case(b"none")
}
