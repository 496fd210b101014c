//! Rewrites URLs in a response that name the app by its own loopback address and port, where clients can't reach it.
//! They get the scheme and the `Host` of the request, like nginx's `proxy_redirect default`.

use std::net::{IpAddr, SocketAddr};

use super::fields::Field;
use super::message::starts_with;

/// Where a request's client reaches the app, and where the app really listens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Site<'a> {
    /// The client's URLs begin with `https:`.
    pub https: bool,
    /// The request's `Host`; empty if it has none.
    pub host: &'a [u8],
    /// The app's loopback addresses; empty if it isn't on loopback.
    pub app: &'a [SocketAddr],
}

impl Site<'_> {
    /// Appends the value of a field that holds URLs, with the app's own URLs rewritten. Returns false, and appends
    /// nothing, if there are none.
    pub(in crate::proxy) fn put(&self, field: Field, value: &[u8], out: &mut Vec<u8>) -> bool {
        let mut done = 0;
        let mut next = first_url(field, value);
        while let Some(start) = next {
            if let Some((scheme, length)) = self.names_app(&value[start..]) {
                out.extend_from_slice(&value[done..start]);
                done = start + length;
                self.put_origin(scheme, &value[done..], out);
            }
            next = match field {
                Field::Link => memchr::memchr(b'<', &value[start..]).map(|at| start + at + 1),
                _ => None,
            };
        }
        if done > 0 {
            out.extend_from_slice(&value[done..]);
        }
        done > 0
    }

    /// Writes the part before `rest`, which begins with the path if there is one.
    fn put_origin(&self, scheme: &[u8], rest: &[u8], out: &mut Vec<u8>) {
        if self.host.is_empty() {
            // A path alone is enough (RFC 9110 §10.2.2), unless it reads as a host (RFC 3986 §4.2).
            return match rest {
                [b'/', b'/', ..] => out.extend_from_slice(b"/."),
                [b'/', ..] => {}
                _ => out.push(b'/'),
            };
        }
        if scheme != b"//" {
            out.extend_from_slice(if self.https { b"https:" } else { b"http:" });
        }
        out.extend_from_slice(b"//");
        out.extend_from_slice(self.host);
    }

    /// If this URL names the app, returns its scheme with the slashes, and its length up to the end of the authority.
    fn names_app(&self, url: &[u8]) -> Option<(&'static [u8], usize)> {
        const SCHEMES: [(&[u8], u16); 3] = [(b"http://", 80), (b"https://", 443), (b"//", 80)];
        let begins = |scheme: &[u8]| starts_with(url, scheme);
        let (scheme, port) = SCHEMES.into_iter().find(|(scheme, _)| begins(scheme))?;
        let rest = &url[scheme.len()..];
        let end = rest.iter().position(|byte| b"/?#>\"' ".contains(byte)).unwrap_or(rest.len());
        let authority = std::str::from_utf8(&rest[..end]).ok()?;
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, digits)) if !digits.ends_with(']') => (host, digits.parse().ok()?),
            _ => (authority, port),
        };
        let known = self.app.iter().any(|addr| addr.port() == port) && is_here(host);
        known.then_some((scheme, scheme.len() + end))
    }
}

/// Whether a URL's host is this machine's loopback or unspecified address, which an app may take for its own name.
fn is_here(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let here = |ip: IpAddr| ip.is_loopback() || ip.is_unspecified();
    host.eq_ignore_ascii_case("localhost") || bare.parse().is_ok_and(here)
}

/// Returns the position of a field's first URL.
fn first_url(field: Field, value: &[u8]) -> Option<usize> {
    match field {
        // Each target is in angle brackets (RFC 8288 §3).
        Field::Link => memchr::memchr(b'<', value).map(|at| at + 1),
        // HTML standard, "Shared declarative refresh steps": `5; url=…`; `url=` and quotes are optional.
        Field::Refresh => {
            let after = |at: usize, bytes: &[u8]| {
                let skipped = value[at..].iter().take_while(|byte| bytes.contains(byte)).count();
                at + skipped
            };
            let start = after(memchr::memchr2(b';', b',', value)?, b";, \t");
            let named = starts_with(&value[start..], b"url");
            let start = if named { after(start + 3, b"= \t") } else { start };
            Some(after(start, b"\"'"))
        }
        _ => Some(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(field: Field, value: &str, https: bool, host: &str) -> String {
        let app = ["127.0.0.1:3000".parse().unwrap(), "[::1]:3000".parse().unwrap()];
        let (site, mut out) = (Site { https, host: host.as_bytes(), app: &app }, vec![]);
        let changed = site.put(field, value.as_bytes(), &mut out);
        assert_eq!(changed, !out.is_empty());
        if changed { String::from_utf8(out).unwrap() } else { value.to_owned() }
    }

    #[test]
    fn a_url_that_names_the_app_gets_the_clients_scheme_and_host() {
        for (own, clients) in [
            ("http://localhost:3000/a?b#c", "https://shop.example/a?b#c"),
            ("HTTP://LocalHost:3000", "https://shop.example"),
            ("https://localhost:3000/", "https://shop.example/"),
            ("http://127.0.0.1:3000?q", "https://shop.example?q"),
            ("http://[::1]:3000/", "https://shop.example/"),
            ("http://0.0.0.0:3000/", "https://shop.example/"),
            ("//localhost:3000/a", "//shop.example/a"),
        ] {
            assert_eq!(put(Field::Location, own, true, "shop.example"), clients);
            assert_eq!(put(Field::ContentLocation, own, true, "shop.example"), clients);
        }
        assert_eq!(put(Field::Location, "https://localhost:3000/", false, "a:81"), "http://a:81/");
    }

    #[test]
    fn any_other_url_stays_as_it_is() {
        for url in [
            "/a",
            "",
            "a?to=http://localhost:3000/",
            "/login?next=http://localhost:3000/",
            "http://localhost/",
            "http://localhost:3001/",
            "http://localhost:03000x/",
            "http://localhost.example:3000/",
            "http://shop.example:3000/",
            "http://192.0.2.1:3000/",
            "http://user@localhost:3000/",
            "http://localhost:3000@shop.example/",
            "ftp://localhost:3000/",
            "http://",
        ] {
            assert_eq!(put(Field::Location, url, false, "a"), url);
        }
    }

    #[test]
    fn without_a_host_it_becomes_a_path() {
        for (own, path) in [
            ("http://localhost:3000/a", "/a"),
            ("http://localhost:3000", "/"),
            ("//localhost:3000?q", "/?q"),
            ("http://localhost:3000//shop.example/", "/.//shop.example/"),
        ] {
            assert_eq!(put(Field::Location, own, false, ""), path);
        }
    }

    #[test]
    fn a_default_port_is_one_too() {
        let app = ["127.0.0.1:80".parse().unwrap()];
        let (site, mut out) = (Site { https: false, host: b"a", app: &app }, vec![]);
        assert!(site.put(Field::Location, b"http://localhost/x", &mut out));
        assert_eq!(out, b"http://a/x");
        assert!(!site.put(Field::Location, b"https://localhost/x", &mut out));
    }

    #[test]
    fn refresh_and_link_hold_urls_among_other_things() {
        for (own, clients) in [
            ("5; url=http://localhost:3000/x", "5; url=http://a/x"),
            ("0;URL='http://localhost:3000/x'", "0;URL='http://a/x'"),
            ("0, http://localhost:3000/x", "0, http://a/x"),
            ("5", "5"),
            ("5; url=/x", "5; url=/x"),
        ] {
            assert_eq!(put(Field::Refresh, own, false, "a"), clients);
        }
        for (own, clients) in [
            (
                "<http://localhost:3000/2>; rel=\"next\", <http://other/>; rel=x, <//localhost:3000>",
                "<http://a/2>; rel=\"next\", <http://other/>; rel=x, <//a>",
            ),
            ("</style.css>; rel=preload", "</style.css>; rel=preload"),
            ("http://localhost:3000/", "http://localhost:3000/"),
        ] {
            assert_eq!(put(Field::Link, own, false, "a"), clients);
        }
    }
}
