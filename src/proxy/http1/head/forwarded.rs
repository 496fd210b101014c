//! The forwarded fields: what the app is told about a request's sender.

use super::fields::ParsedFields;
use super::message::Sender;
use super::out::HeadOut;
use crate::config::Forwarded;

/// Writes `X-Forwarded-For`, which lists the request's senders; the peer's address is added to the `last` of several
/// such fields.
pub(in crate::proxy) fn put_forwarded_for(
    out: &mut impl HeadOut,
    name: &str,
    value: &[u8],
    last: bool,
    sender: Sender<'_>,
) {
    match sender.forwarded {
        Forwarded::Replace => {}
        Forwarded::Append if last && value.is_empty() => out.field(name, &[sender.peer.as_bytes()]),
        Forwarded::Append if last => {
            out.field(name, &[value, b", ", sender.peer.as_bytes()]);
        }
        _ => out.field(name, &[value]),
    }
}

/// Writes the forwarded fields that are missing or not trusted, and the client certificate's subject.
pub(in crate::proxy) fn put_forwarded(
    out: &mut impl HeadOut,
    parsed_fields: &ParsedFields<'_>,
    host: Option<&[u8]>,
    sender: Sender<'_>,
) {
    if let Some(subject) = sender.subject {
        out.field("X-Client-Cert-Subject", &[subject.as_bytes()]);
    }
    // The first proxy's scheme, host and port belong together: our port beside another proxy's scheme would be wrong.
    let placed = parsed_fields.forwarded_proto.is_some()
        || parsed_fields.forwarded_host
        || parsed_fields.forwarded_port;
    match sender.forwarded {
        Forwarded::Keep => return,
        Forwarded::IfNone if placed || parsed_fields.forwarded_for > 0 || parsed_fields.forwarded => return,
        _ => {}
    }
    let replace = sender.forwarded == Forwarded::Replace;
    if replace || parsed_fields.forwarded_for == 0 {
        out.field("X-Forwarded-For", &[sender.peer.as_bytes()]);
    }
    if replace || parsed_fields.forwarded_proto.is_none() {
        out.field("X-Forwarded-Proto", &[if sender.https { b"https" } else { b"http" }]);
    }
    let Some(host) = host else { return };
    if replace || !parsed_fields.forwarded_host {
        out.field("X-Forwarded-Host", &[host]);
    }
    if replace || !placed {
        out.field("X-Forwarded-Port", &[port_of(host, sender.https)]);
    }
}

/// Returns the port in the client's `Host`, which is the one in its URLs: ours may be mapped to another.
fn port_of(host: &[u8], https: bool) -> &[u8] {
    let digits = host.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    match host.split_at(host.len() - digits) {
        (name, port @ [_, ..]) if name.ends_with(b":") => port,
        _ if https => b"443",
        _ => b"80",
    }
}
