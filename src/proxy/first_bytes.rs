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

/// Whether a server that speaks before its client speaks HTTP: HTTP/2 begins with a SETTINGS frame of stream 0 (RFC 9113
/// §3.4, §6.5), which gRPC servers send at once, and HTTP/1 says 408 to a client that was silent for too long.
pub fn is_http_server(bytes: &[u8]) -> bool {
    const SETTINGS: u8 = 4;
    let settings = matches!(bytes, [_, _, _, SETTINGS, _, 0, 0, 0, 0, ..]);
    settings || bytes.starts_with(b"HTTP/")
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
    fn a_server_that_speaks_first_may_speak_http() {
        assert!(is_http_server(b"\0\0\x06\x04\0\0\0\0\0\0\x05\0\0\x40\0"));
        assert!(is_http_server(b"HTTP/1.1 408 Request Timeout\r\n"));
        for greeting in [&b"\x4a\0\0\0\x0a8.4.0\0"[..], b"220 mail ESMTP\r\n", b"SSH-2.0-OpenSSH\r\n", b""] {
            assert!(!is_http_server(greeting), "{}", greeting.escape_ascii());
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
