//! Whatever bytes arrive as heads and bodies: no panic, no byte too many consumed, and the forwarded message parses to
//! the same. A failure prints the seed that replays it.

use lameduck::config::Forwarded;
use lameduck::proxy::http1::body::Body;
use lameduck::proxy::http1::head::{self, Framing, ResponsePlan, Sender, Site, Upgrade};

const SEEDS: u64 = 20_000;
/// Fields of a head.
const MOST: usize = 2000;

/// xorshift64*: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % most
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Changes, removes, duplicates or inserts a few bytes.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..self.below(4) {
            let at = self.below(bytes.len());
            match self.below(4) {
                0 => bytes[at] = self.pick(b"\0\t\n\r !\",:;=0aZ\x7f\x80\xff"),
                1 => drop(bytes.remove(at)),
                2 => bytes.insert(at, bytes[at]),
                _ => bytes.insert(at, self.pick(b"\0\t\n\r :,;\xc3")),
            }
        }
    }
}

const REQUEST_LINES: [&str; 9] = [
    "GET / HTTP/1.1",
    "POST /a?b=c HTTP/1.1",
    "HEAD /caf\u{e9} HTTP/1.0",
    "OPTIONS * HTTP/1.1",
    "OPTIONS http://h HTTP/1.1",
    "PUT http://h:1/p?q HTTP/1.1",
    "GET http://h?q HTTP/1.0",
    "CONNECT h:1 HTTP/1.1",
    "PRI * HTTP/2.0",
];
const STATUS_LINES: [&str; 8] = [
    "HTTP/1.1 200 OK",
    "HTTP/1.0 200 OK",
    "HTTP/1.1 204 No Content",
    "HTTP/1.1 304",
    "HTTP/1.1 100 Continue",
    "HTTP/1.1 101 Switching",
    "HTTP/1.1 999 \u{e9}",
    "HTTP/1.1 426 Upgrade",
];
const FIELDS: [&str; 36] = [
    "Host: a",
    "host: b:80",
    "Content-Length: 5",
    "Content-Length: 0",
    "content-length: 18446744073709551615",
    "Transfer-Encoding: chunked",
    "transfer-encoding: Chunked ",
    "Transfer-Encoding: gzip, chunked",
    "Connection: close",
    "Connection: keep-alive, x-a",
    "connection: transfer-encoding, content-length, host",
    "Connection: Upgrade",
    "Connection: ,, ,",
    "Upgrade: websocket",
    "Upgrade: h2c",
    "Keep-Alive: timeout=5, max=1",
    "Keep-Alive: timeout=99999999999999",
    "TE: trailers",
    "Trailer: x",
    "X-A: 1",
    "x-a:2",
    "X-Forwarded-For: 1.2.3.4",
    "x-forwarded-for:",
    "X-Forwarded-Proto: https",
    "X-Forwarded-Host: h",
    "X-Forwarded-Port: 1",
    "Forwarded: for=h",
    "Location: http://localhost:3000/a",
    "content-location: //127.0.0.1:3000",
    "Refresh: 1;url='http://localhost:3000",
    "Link: <http://[::1]:3000/>, <http://localhost:3000",
    "User-Agent: kube-probe/1.30",
    "Accept: text/event-stream",
    "Content-Type: text/event-stream",
    "Content-Encoding: gzip",
    "Expect: 100-continue",
];

fn head(random: &mut Random, first_lines: &[&str]) -> Vec<u8> {
    let mut text = String::new();
    if random.below(20) == 0 {
        text += "\r\n";
    }
    text += random.pick(first_lines);
    text += "\r\n";
    if random.below(10) > 0 {
        text += "Host: app.test\r\n";
    }
    for _ in 0..random.below(5) {
        text += random.pick(&FIELDS);
        text += "\r\n";
    }
    text += "\r\n";
    let mut bytes = text.into_bytes();
    if random.below(2) == 0 {
        random.mutate(&mut bytes);
    }
    bytes
}

fn noise(random: &mut Random) -> Vec<u8> {
    (0..random.below(200)).map(|_| random.below(256) as u8).collect()
}

/// Number of fields with this name.
fn count(head: &[u8], name: &str) -> usize {
    let head = String::from_utf8_lossy(head).to_lowercase();
    head.matches(&format!("\r\n{name}:")).count()
}

#[test]
fn requests() {
    let mut accepted = 0;
    for seed in 0..SEEDS {
        let random = &mut Random::new(seed);
        let mut bytes = head(random, &REQUEST_LINES);
        bytes.extend(noise(random));
        let forwarded =
            random.pick(&[Forwarded::Append, Forwarded::IfNone, Forwarded::Replace, Forwarded::Keep]);
        let sender = Sender { peer: "192.0.2.1", forwarded, app: "app:80", ..Sender::default() };
        let mut out = Vec::new();
        let Ok(Some(read)) = head::request(&bytes, MOST, sender, &mut out) else { continue };
        accepted += 1;
        let what = || {
            let (from, to) = (String::from_utf8_lossy(&bytes), String::from_utf8_lossy(&out));
            format!("seed {seed}: {from:?} became {to:?}")
        };
        assert!(
            read.len <= bytes.len() && read.method.end <= read.len && read.target.end <= read.len,
            "{}",
            what()
        );

        // The app must read the same message with the same end, and a second lameduck must change nothing.
        let keep = Sender { forwarded: Forwarded::Keep, ..Sender::default() };
        let mut again = Vec::new();
        let reread = head::request(&out, MOST, keep, &mut again);
        let Ok(Some(reread)) = reread else { panic!("{reread:?}, {}", what()) };
        assert_eq!(reread.len, out.len(), "{}", what());
        assert_eq!((reread.framing, reread.upgrade), (read.framing, read.upgrade), "{}", what());
        assert_eq!((reread.head_only, reread.idempotent), (read.head_only, read.idempotent), "{}", what());
        assert_eq!(String::from_utf8_lossy(&again), String::from_utf8_lossy(&out), "{}", what());
        let host = &out[read.origin.host.clone()];
        assert!(host.is_empty() || out.windows(host.len()).any(|part| part == host), "{}", what());
        let framed = match read.framing {
            Framing::Chunked => (1, 0),
            Framing::Length(_) => (0, 1),
            _ => (0, count(&out, "content-length").min(1)),
        };
        assert_eq!((count(&out, "transfer-encoding"), count(&out, "content-length")), framed, "{}", what());
        assert_eq!(count(&out, "host"), 1, "{}", what());
        assert_eq!(count(&out, "upgrade"), usize::from(read.upgrade != Upgrade::None), "{}", what());

        // A head that arrives in two parts is parsed when its end arrives, not before.
        for cut in 0..read.len {
            assert!(head::ends_within(&bytes[..read.len], cut), "cut at {cut}, {}", what());
        }
        let part = head::request(&bytes[..read.len - 1], MOST, sender, &mut Vec::new());
        assert!(matches!(part, Ok(None)), "{part:?}, {}", what());
    }
    assert!(accepted > SEEDS / 10, "only {accepted} of {SEEDS} were accepted");
}

#[test]
fn responses() {
    let mut accepted = 0;
    for seed in 0..SEEDS {
        let random = &mut Random::new(seed);
        let mut bytes = head(random, &STATUS_LINES);
        bytes.extend(noise(random));
        let head_only = random.below(5) == 0;
        let answer = ResponsePlan { http11: true, head_only, upgrade: true, close: random.below(2) == 0 };
        let mut out = Vec::new();
        let app = ["127.0.0.1:3000".parse().unwrap()];
        let site = Site { https: false, host: random.pick(&[&b"a"[..], b""]), app: &app };
        let read = head::response(&bytes, MOST, head_only, site, &mut out, |_| answer);
        let Ok(Some(read)) = read else { continue };
        accepted += 1;
        let what = || {
            let (from, to) = (String::from_utf8_lossy(&bytes), String::from_utf8_lossy(&out));
            format!("seed {seed}: {from:?} became {to:?}")
        };
        assert!(read.len <= bytes.len(), "{}", what());
        let reread = head::response(&out, MOST, head_only, Site::default(), &mut Vec::new(), |_| answer);
        let Ok(Some(reread)) = reread else { panic!("{reread:?}, {}", what()) };
        assert_eq!((reread.len, reread.status), (out.len(), read.status), "{}", what());
        // The client never gets a body that only the end of the connection delimits.
        let framing = if read.framing == Framing::UntilClose { Framing::Chunked } else { read.framing };
        assert_eq!(reread.framing, framing, "{}", what());
        assert_eq!(reread.events, read.events, "{}", what());
        if read.status >= 200 {
            assert_eq!(reread.says_close, answer.close, "{}", what());
        }
        let framed = count(&out, "content-length") + count(&out, "transfer-encoding");
        assert!(framed <= 1 || read.framing == Framing::None, "{}", what());
    }
    assert!(accepted > SEEDS / 10, "only {accepted} of {SEEDS} were accepted");
}

#[test]
fn noise_is_never_a_head() {
    for seed in 0..SEEDS {
        let bytes = noise(&mut Random::new(seed));
        let sender = Sender::default();
        let request = head::request(&bytes, MOST, sender, &mut Vec::new());
        assert!(!matches!(request, Ok(Some(_))), "seed {seed}");
    }
}

/// A chunked body, complete or damaged.
fn chunks(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..random.below(4) {
        let piece = noise(random);
        if piece.is_empty() {
            continue;
        }
        let extension = random.pick(&["", "", ";a", " ;a=\"b\"", "\t", ";\u{e9}"]);
        bytes.extend(format!("{:x}{extension}\r\n", piece.len()).bytes());
        bytes.extend(piece);
        bytes.extend(b"\r\n");
    }
    bytes.extend(random.pick(&["0\r\n\r\n", "000\r\nA: b\r\n\r\n", "0;x\r\nA:\r\nB: c\r\n\r\n"]).bytes());
    if random.below(2) == 0 {
        random.mutate(&mut bytes);
    }
    bytes.extend(noise(random));
    bytes
}

/// Parses `bytes` in parts: how many were consumed, the content, and whether the body ended; none if it is invalid.
fn take(framing: Framing, parts: &[&[u8]]) -> Option<(usize, Vec<u8>, bool)> {
    let (mut body, mut taken, mut content) = (Body::new(framing), 0, Vec::new());
    for part in parts {
        let n = body.take(part, |piece| content.extend_from_slice(piece)).ok()?;
        assert!(n <= part.len());
        taken += n;
        if body.is_done() {
            assert_eq!(
                body.take(b"0\r\n\r\n", |piece| assert!(piece.is_empty(), "content after the end")),
                Ok(0)
            );
            return Some((taken, content, true));
        }
        assert_eq!(n, part.len(), "an unfinished body consumes everything");
    }
    Some((taken, content, false))
}

#[test]
fn bodies_are_the_same_however_they_are_cut() {
    let mut whole = 0;
    for seed in 0..SEEDS {
        let random = &mut Random::new(seed);
        let bytes = if random.below(10) == 0 { noise(random) } else { chunks(random) };
        let length = random.below(300) as u64;
        for framing in [Framing::Chunked, Framing::Length(length), Framing::UntilClose, Framing::None] {
            let (one, two) = (random.below(bytes.len() + 1), random.below(bytes.len() + 1));
            let (a, b) = (one.min(two), one.max(two));
            let at_once = take(framing, &[&bytes]);
            let in_parts = take(framing, &[&bytes[..a], &bytes[a..b], &bytes[b..]]);
            assert_eq!(at_once, in_parts, "seed {seed}, {framing:?}, cut at {a} and {b}");
            if let (Framing::Chunked, Some((taken, content, true))) = (framing, &at_once) {
                whole += 1;
                // The consumed bytes alone are a complete body with the same content.
                assert_eq!(take(framing, &[&bytes[..*taken]]), at_once, "seed {seed}");
                assert!(content.len() + 5 <= *taken, "seed {seed}");
            }
        }
    }
    assert!(whole > SEEDS / 10, "only {whole} of {SEEDS} ended");
}
