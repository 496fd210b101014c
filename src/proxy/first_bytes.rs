//! Tells HTTP from any other protocol by the first bytes of a connection.

/// The longest method of the IANA registry has 17 letters; nothing is gained by waiting for a longer one.
const MAX_METHOD: usize = 24;
/// The beginning of an HTTP/2 connection (RFC 9113 §3.4).
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Whether a connection's first bytes match the HTTP/2 preface as far as they go.
pub fn begins_http2(bytes: &[u8]) -> bool {
    bytes.iter().zip(PREFACE).all(|(byte, preface)| byte == preface)
}

/// Whether a connection that begins with these bytes is HTTP: a method in capitals, one space, and the beginning of a
/// target (RFC 9112 §3), or HTTP/2's preface. `None` while there are too few bytes to tell.
///
/// Redis' inline commands and the text protocols of mail, FTP and memcached begin with a word as well, but not with a
/// target after it.
pub fn is_http(bytes: &[u8]) -> Option<bool> {
    // A robust server ignores an empty line before a request line (RFC 9112 §2.2).
    let bytes = bytes.strip_prefix(b"\r\n").unwrap_or(bytes);
    if matches!(bytes, b"" | b"\r") {
        return None;
    }
    if bytes.starts_with(&PREFACE[..3]) {
        return if begins_http2(bytes) {
            (bytes.len() >= PREFACE.len()).then_some(true)
        } else {
            Some(false)
        };
    }
    let method = bytes.iter().take_while(|byte| byte.is_ascii_uppercase() || **byte == b'-').count();
    match bytes.get(method) {
        _ if method > MAX_METHOD => Some(false),
        None => None,
        Some(b' ') if method > 0 => is_target(&bytes[..method], &bytes[method + 1..]),
        Some(_) => Some(false),
    }
}

/// Whether a target begins here: a path, a URL, `*`, or after CONNECT an authority (RFC 9112 §3.2).
fn is_target(method: &[u8], rest: &[u8]) -> Option<bool> {
    let begins = |word: &[u8]| {
        let n = rest.len().min(word.len());
        if rest[..n].eq_ignore_ascii_case(&word[..n]) {
            (n == word.len()).then_some(true)
        } else {
            Some(false)
        }
    };
    match rest.first() {
        None => None,
        Some(b'/') => Some(true),
        Some(b'*') => begins(b"* HTTP/"),
        Some(byte) if method == b"CONNECT" => Some(byte.is_ascii_alphanumeric() || *byte == b'['),
        Some(b'h' | b'H') => match begins(b"http://") {
            Some(false) => begins(b"https://"),
            known => known,
        },
        Some(_) => Some(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_is_known_by_its_request_line() {
        for bytes in [
            "GET / HTTP/1.1\r\n",
            "GET /",
            "\r\nGET /",
            "OPTIONS * HTTP/1.1\r\n",
            "GET http://a/ HTTP/1.1",
            "GET HTTPS://a/",
            "CONNECT a:443 HTTP/1.1",
            "M-SEARCH /",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0",
        ] {
            assert_eq!(is_http(bytes.as_bytes()), Some(true), "{bytes}");
        }
    }

    #[test]
    fn anything_else_is_not() {
        for bytes in [
            &b"\x16\x03\x01\x02\x00"[..], // a TLS ClientHello
            b"*1\r\n$4\r\nPING\r\n",      // Redis
            b"PING\r\n",
            b"GET key\r\n",
            b"get key\r\n",
            b"\0\0\0\x08\x04\xd2\x16\x2f", // Postgres' SSLRequest
            b"EHLO example\r\n",
            b"OPTIONS rtsp://a/ RTSP/1.0\r\n",
            b"OPTIONS * RTSP/1.0\r\n",
            b"CONNECT\naccept-version:1.2\n", // STOMP
            b"PRI * HTTP/3.0",
            b" GET /",
            b"\n",
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZ /",
        ] {
            assert_eq!(is_http(bytes), Some(false), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn too_few_bytes_decide_nothing_and_one_at_a_time_ends_as_all_at_once() {
        for bytes in ["GET /a", "\r\nPUT http://a/", "OPTIONS * HTTP/1.1", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
        {
            let decided = (0..=bytes.len()).map(|n| is_http(&bytes.as_bytes()[..n])).find(Option::is_some);
            assert_eq!(decided, Some(Some(true)), "{bytes}");
        }
        assert_eq!(is_http(b"GE"), None);
        assert_eq!(is_http(b"\r"), None);
    }
}
