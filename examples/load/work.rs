//! The requests of each kind of client, repeated.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use crate::connection::{Connection, Head, IDLE_TIMEOUT, Part};
use crate::report::{Loss, Report};

/// A kind of client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Short requests on a kept-alive connection.
    KeepAlive,
    /// Short requests, each on a new connection.
    New,
    /// Responses that take 0.5 to 3 s.
    Slow,
    /// Responses that take 3 to 20 s.
    Long,
    /// Responses that come line by line.
    Stream,
    /// Request bodies that are sent in pieces.
    Upload,
    /// Large responses.
    Download,
    /// A kept-alive connection that is idle for more than 5 s between requests.
    Idle,
    /// Event streams.
    Events,
    /// WebSockets.
    WebSocket,
    /// Responses that take longer than any grace period: they need not succeed, but their end must be visible.
    Endless,
    /// The same with responses that come line by line.
    Trickle,
}

impl Kind {
    pub const ALL: [Self; 12] = [
        Self::KeepAlive,
        Self::New,
        Self::Slow,
        Self::Long,
        Self::Stream,
        Self::Upload,
        Self::Download,
        Self::Idle,
        Self::Events,
        Self::WebSocket,
        Self::Endless,
        Self::Trickle,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::KeepAlive => "keep-alive",
            Self::New => "new",
            Self::Slow => "slow",
            Self::Long => "long",
            Self::Stream => "stream",
            Self::Upload => "upload",
            Self::Download => "download",
            Self::Idle => "idle",
            Self::Events => "events",
            Self::WebSocket => "websocket",
            Self::Endless => "endless",
            Self::Trickle => "trickle",
        }
    }

    /// Pause between requests, in milliseconds.
    fn pause(self) -> Range<u64> {
        match self {
            Self::Idle => 5_200..9_000,
            Self::Events | Self::WebSocket => 10..1_000,
            _ => 50..250,
        }
    }
}

/// Addresses of the servers, and our own.
pub struct Servers {
    pub addrs: Vec<SocketAddr>,
    /// Where the addresses are instead, one a line.
    pub file: Option<PathBuf>,
    pub from: Option<IpAddr>,
}

impl Servers {
    /// The addresses as they are now.
    pub fn addrs(&self) -> Cow<'_, [SocketAddr]> {
        let Some(file) = &self.file else { return Cow::Borrowed(&self.addrs) };
        let text = std::fs::read_to_string(file).expect("the file of addresses");
        Cow::Owned(text.lines().map(|line| line.parse().expect("an address")).collect())
    }
}

/// One client.
pub struct Worker {
    kind: Kind,
    random: u64,
    servers: Arc<Servers>,
    next_addr: usize,
    report: Arc<Report>,
    /// Id of the last event: a reopened stream continues after it.
    last_event: u64,
}

impl Worker {
    /// The `n`th client.
    pub fn new(kind: Kind, n: usize, servers: Arc<Servers>, report: Arc<Report>) -> Self {
        let random = (n as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self { kind, random, servers, next_addr: n, report, last_event: 0 }
    }

    /// Makes requests until it is `over`.
    pub async fn run(mut self, over: impl Fn() -> bool) {
        let mut kept = None;
        sleep(Duration::from_millis(self.number(0..1_000))).await;
        while !over() {
            kept = self.request(kept, &over).await;
            let pause = Duration::from_millis(self.number(self.kind.pause()));
            let Some(connection) = &mut kept else {
                sleep(pause).await;
                continue;
            };
            match connection.rest(pause).await {
                Ok(true) => {}
                Ok(false) => kept = None,
                Err(_) => {
                    self.report.idle_reset();
                    kept = None;
                }
            }
        }
    }

    /// Makes one request, on the idle connection or a new one; returns the connection if it can be reused.
    async fn request(&mut self, kept: Option<Connection>, over: &impl Fn() -> bool) -> Option<Connection> {
        let began = Instant::now();
        let kind = self.kind.name();
        let mut connection = match kept {
            Some(connection) => connection,
            None => {
                let addrs = self.servers.addrs();
                let addr = addrs[self.next_addr % addrs.len()];
                self.next_addr += 1;
                match Connection::open(addr, self.servers.from).await {
                    Ok(connection) => {
                        self.report.connected();
                        connection
                    }
                    Err(loss) => {
                        self.report.lose(kind, &loss, began.elapsed(), &format!("connect to {addr}"));
                        return None;
                    }
                }
            }
        };
        connection.used += 1;
        match self.exchange(&mut connection, over).await {
            Ok(close) => {
                self.report.complete(kind, began.elapsed());
                (!close).then_some(connection)
            }
            Err(loss) => {
                let what = format!("request {} on {}", connection.used, connection.name);
                self.report.lose(kind, &loss, began.elapsed(), &what);
                None
            }
        }
    }

    /// Sends the request and reads its response; returns whether the connection ends with it.
    async fn exchange(&mut self, on: &mut Connection, over: &impl Fn() -> bool) -> Result<bool, Loss> {
        match self.kind {
            Kind::KeepAlive | Kind::Idle => self.text(on, "/", "hello").await,
            Kind::New => self.text(on, "/", "hello").await.map(|_| true),
            Kind::Slow => self.slow(on, 500..3_000).await,
            Kind::Long => self.slow(on, 3_000..20_000).await,
            Kind::Stream => {
                let (n, ms) = (self.number(5..25), self.number(50..400));
                self.stream(on, n, ms).await
            }
            Kind::Upload => self.upload(on).await,
            Kind::Download => {
                let bytes = self.number(100_000..3_000_000);
                let head = self.get(on, &format!("/download?bytes={bytes}")).await?;
                let body = on.body(&head).await?;
                self.check(&head, body.len() as u64 == bytes, &body[..body.len().min(80)])
            }
            Kind::Events => self.events(on, over).await,
            Kind::WebSocket => self.websocket(on, over).await,
            Kind::Endless => self.slow(on, 600_000..600_001).await,
            Kind::Trickle => self.stream(on, 2_000, 300).await,
        }
    }

    /// `n` lines, one every `ms` milliseconds.
    async fn stream(&mut self, on: &mut Connection, n: u64, ms: u64) -> Result<bool, Loss> {
        let last = format!("line {n} of {n}\n");
        let head = self.get(on, &format!("/stream?n={n}&ms={ms}")).await?;
        let body = on.body(&head).await?;
        self.check(&head, body.ends_with(last.as_bytes()), &body)
    }

    async fn text(&mut self, on: &mut Connection, target: &str, expected: &str) -> Result<bool, Loss> {
        let head = self.get(on, target).await?;
        let body = on.body(&head).await?;
        self.check(&head, body.starts_with(expected.as_bytes()), &body)
    }

    /// A response that may take longer than the silence that other requests allow.
    async fn slow(&mut self, on: &mut Connection, ms: Range<u64>) -> Result<bool, Loss> {
        let ms = self.number(ms);
        let target = format!("/slow?ms={ms}");
        on.send(request("GET", &target, "").as_bytes()).await?;
        let wait = Duration::from_millis(ms) + IDLE_TIMEOUT;
        let head = timeout(wait, self.patient_head(on)).await.map_err(|_| Loss::TimedOut)??;
        let body = on.body(&head).await?;
        self.check(&head, body.starts_with(b"done"), &body)
    }

    /// Reads a head that may take longer than [`IDLE_TIMEOUT`].
    async fn patient_head(&self, on: &mut Connection) -> Result<Head, Loss> {
        loop {
            match on.head().await {
                Err(Loss::TimedOut) => {}
                other => return other,
            }
        }
    }

    /// Sends up to 3 s of a body in pieces.
    async fn upload(&mut self, on: &mut Connection) -> Result<bool, Loss> {
        let piece = vec![b'u'; 32 * 1024];
        let (pieces, ms) = (self.number(2..20), self.number(1..150));
        let length = piece.len() as u64 * pieces;
        on.send(request("POST", "/upload", &format!("Content-Length: {length}\r\n")).as_bytes()).await?;
        for _ in 0..pieces {
            on.send(&piece).await?;
            sleep(Duration::from_millis(ms)).await;
        }
        let head = on.head().await?;
        let body = on.body(&head).await?;
        let expected = format!("\"bytes\":{length},");
        self.check(&head, String::from_utf8_lossy(&body).contains(&expected), &body)
    }

    /// Reads events for a while. The server may end the stream after any complete event; then it is reopened there.
    async fn events(&mut self, on: &mut Connection, over: &impl Fn() -> bool) -> Result<bool, Loss> {
        let last = self.last_event;
        let headers = format!("Accept: text/event-stream\r\nLast-Event-ID: {last}\r\n");
        on.send(request("GET", "/events?ms=500", &headers).as_bytes()).await?;
        let head = on.head().await?;
        self.check(&head, true, b"")?;
        let until = Instant::now() + Duration::from_millis(self.number(20_000..60_000));
        let mut text = String::new();
        while Instant::now() < until && !over() {
            let part = on.part(&head).await?;
            if let Part::Data(data) = &part {
                text.push_str(&String::from_utf8_lossy(data));
            }
            while let Some(end) = text.find("\n\n") {
                let event: String = text.drain(..end + 2).collect();
                let expected = format!("id: {0}\ndata: event number {0}\n\n", self.last_event + 1);
                if event != expected {
                    return Err(Loss::Wrong(format!("{event:?} instead of {expected:?}")));
                }
                self.last_event += 1;
            }
            if matches!(part, Part::End) {
                self.report.announced("events");
                return if text.is_empty() {
                    Ok(true)
                } else {
                    Err(Loss::Wrong(format!("half an event: {text:?}")))
                };
            }
        }
        Ok(true)
    }

    /// Sends messages for a while. The server may send Close 1001; then the client reconnects.
    async fn websocket(&mut self, on: &mut Connection, over: &impl Fn() -> bool) -> Result<bool, Loss> {
        let headers = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        on.send(format!("GET /chat?name=load HTTP/1.1\r\nHost: load.test\r\n{headers}\r\n").as_bytes())
            .await?;
        let head = on.head().await?;
        if head.status != 101 {
            return self.check(&head, false, b"");
        }
        let until = Instant::now() + Duration::from_millis(self.number(20_000..60_000));
        while Instant::now() < until && !over() {
            let mine = format!("{} on {}", self.number(0..u64::MAX), on.name);
            on.send(&frame(1, mine.as_bytes())).await?;
            // Messages of all clients arrive, including our own.
            loop {
                let (opcode, payload) = self.frame(on).await?;
                if opcode == 8 {
                    return self.closed_by_server(on, &payload).await;
                }
                if String::from_utf8_lossy(&payload).contains(&mine) {
                    break;
                }
            }
            sleep(Duration::from_millis(self.number(100..300))).await;
        }
        on.send(&frame(8, &1000u16.to_be_bytes())).await?;
        while self.frame(on).await?.0 != 8 {}
        Ok(true)
    }

    async fn closed_by_server(&self, on: &mut Connection, payload: &[u8]) -> Result<bool, Loss> {
        on.send(&frame(8, payload)).await?;
        self.report.announced("websocket");
        match payload.get(..2) {
            Some([3, 0xE9]) => Ok(true), // 1001, going away
            code => Err(Loss::Wrong(format!("closed with {code:?}"))),
        }
    }

    /// Reads a frame of a server, which is not masked.
    async fn frame(&self, on: &mut Connection) -> Result<(u8, Vec<u8>), Loss> {
        let head = on.take(2).await?;
        let length = match head[1] {
            126 => on.take(2).await?.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)),
            127 => on.take(8).await?.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)),
            short => usize::from(short),
        };
        Ok((head[0] & 15, on.take(length).await?))
    }

    async fn get(&self, on: &mut Connection, target: &str) -> Result<Head, Loss> {
        on.send(request("GET", target, "").as_bytes()).await?;
        on.head().await
    }

    fn check(&self, head: &Head, as_expected: bool, body: &[u8]) -> Result<bool, Loss> {
        if head.status >= 500 {
            let body = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
            return Err(Loss::Status(head.status, body));
        }
        if head.status != 200 || !as_expected {
            return Err(Loss::Wrong(format!("{} {:?}", head.status, String::from_utf8_lossy(body))));
        }
        if head.close {
            self.report.told_to_close();
        }
        Ok(head.close)
    }

    /// A random number in this range (xorshift).
    fn number(&mut self, range: Range<u64>) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        range.start + self.random % (range.end - range.start)
    }
}

fn request(method: &str, target: &str, headers: &str) -> String {
    format!("{method} {target} HTTP/1.1\r\nHost: load.test\r\n{headers}\r\n")
}

/// A client's frame, masked with zeros; payload of up to 125 bytes.
fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    [&[0x80 | opcode, 0x80 | payload.len() as u8, 0, 0, 0, 0], payload].concat()
}
