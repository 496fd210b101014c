//! Parsers for the values of flags. Each returns an error text that says what to write instead.

use std::net::SocketAddr;
use std::time::Duration;

use hyper::header::{HeaderName, HeaderValue};
use tracing::Level;

use super::addresses::parse_listen;

/// An address, or `None` for `off`. (A bare `Option` would tell clap that the flag may be left out.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OptionalListener(pub Option<SocketAddr>);

/// Limit on a duration: far longer than any platform's grace period, and far from overflow when durations are added.
const MAX_TIME: Duration = Duration::from_secs(365 * 24 * 3600);

pub(crate) fn time(text: &str) -> Result<Duration, String> {
    if !text.is_empty() && text != "0" && text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("'{text}' has no unit: write {text}s or {text}ms"));
    }
    let time = if text == "0" { Ok(Duration::ZERO) } else { humantime::parse_duration(text) };
    match time {
        Ok(time) if time <= MAX_TIME => Ok(time),
        Ok(_) => Err(format!("'{text}' is over a year")),
        Err(why) => Err(format!("'{text}' is not a time ({why}): write 5s, 500ms or 1m30s")),
    }
}

/// The name of a lease: characters that a query holds as they are (RFC 3986 §3.4), so that no caller has to encode them.
pub(crate) fn lease_name(text: &str) -> Result<String, String> {
    const MAX: usize = 128;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:/@".contains(&byte);
    let fits = (1..=MAX).contains(&text.len()) && text.bytes().all(plain);
    fits.then(|| text.to_owned()).ok_or_else(|| format!("must have 1 to {MAX} letters, digits or -._~:/@"))
}

pub(crate) fn time_over_zero(text: &str) -> Result<Duration, String> {
    match time(text)? {
        Duration::ZERO => Err("must be over 0".to_owned()),
        time => Ok(time),
    }
}

pub(crate) fn listen_or_off(text: &str) -> Result<OptionalListener, String> {
    if text == "off" {
        return Ok(OptionalListener(None));
    }
    parse_listen(text).map(|addr| OptionalListener(Some(addr))).map_err(|why| format!("{why}, or off"))
}

/// Control over TCP has no password, so only the pod itself may reach it.
pub(crate) fn loopback_or_off(text: &str) -> Result<OptionalListener, String> {
    let switch = listen_or_off(text)?;
    match switch.0 {
        Some(addr) if !addr.ip().to_canonical().is_loopback() => {
            let port = addr.port();
            Err(format!(
                "'{text}' can be reached from outside: control is loopback only, write 127.0.0.1:{port}"
            ))
        }
        _ => Ok(switch),
    }
}

/// A token must be usable as a header value without escaping, and must not be empty: an empty one would admit everyone.
pub(crate) fn token(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("is empty: give it a value or leave it out".to_owned());
    }
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("may hold only visible ASCII without spaces".to_owned());
    }
    Ok(text.to_owned())
}

/// A name that a certificate can be valid for.
pub(crate) fn server_name(text: &str) -> Result<String, String> {
    let name = rustls::pki_types::ServerName::try_from(text);
    name.map(|_| text.to_owned()).map_err(|_| format!("'{text}' is not a host name: write app.example.com"))
}

/// A number of bytes from 8 KiB, the minimum of hyper's buffer, to 16 MiB.
pub(crate) fn head_bytes(text: &str) -> Result<usize, String> {
    const RANGE: std::ops::RangeInclusive<usize> = 8 << 10..=16 << 20;
    match bytes(text)? {
        bytes if RANGE.contains(&bytes) => Ok(bytes),
        _ => Err(format!("'{text}' is not between 8KiB and 16MiB")),
    }
}

/// A number of header fields, 1 to 16384.
pub(crate) fn fields(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(fields @ 1..=16_384) => Ok(fields),
        _ => Err(format!("{text} is not in 1..=16384")),
    }
}

/// A number of bytes over 0, because a target has at least one byte.
pub(crate) fn uri_bytes(text: &str) -> Result<usize, String> {
    bytes(text).and_then(|bytes| if bytes > 0 { Ok(bytes) } else { Err("must be over 0".to_owned()) })
}

pub(crate) fn bytes(text: &str) -> Result<usize, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match text[digits..].trim() {
        "" | "B" => Some(1),
        "KiB" | "k" | "K" => Some(1 << 10),
        "MiB" | "m" | "M" => Some(1 << 20),
        _ => None,
    };
    let bytes = text[..digits].parse::<usize>().ok().zip(unit).and_then(|(n, unit)| n.checked_mul(unit));
    bytes.ok_or_else(|| format!("'{text}' is not a number of bytes: write 64KiB, 1MiB or 65536"))
}

/// A header field, written as `Name: value`.
pub(crate) fn field(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let parsed = text.split_once(':').and_then(|(name, value)| {
        Some((name.trim().parse().ok()?, HeaderValue::from_bytes(value.trim().as_bytes()).ok()?))
    });
    parsed.ok_or_else(|| format!("'{text}' is not a header field: write 'Name: value'"))
}

/// A port, or `None` for the variable `LAMEDUCK_APP_PORT=tcp://HOST:PORT`, which Kubernetes sets in every container if
/// a Service is named `lameduck-app` ("Discovering services, Environment variables"). That one is not meant for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PortOrLink(pub Option<u16>);

pub(crate) fn port_or_link(text: &str) -> Result<PortOrLink, String> {
    if ["tcp://", "udp://", "sctp://"].iter().any(|link| text.starts_with(link)) {
        return Ok(PortOrLink(None));
    }
    let port = text.parse().ok().filter(|port| *port != 0);
    port.map(|port| PortOrLink(Some(port))).ok_or_else(|| format!("'{text}' is not a port: write 1 to 65535"))
}

pub(crate) fn level(text: &str) -> Result<Level, String> {
    match text {
        "error" => Ok(Level::ERROR),
        "warn" => Ok(Level::WARN),
        "info" => Ok(Level::INFO),
        "debug" => Ok(Level::DEBUG),
        "trace" => Ok(Level::TRACE),
        other => Err(format!("'{other}' is none of error, warn, info, debug, trace")),
    }
}
