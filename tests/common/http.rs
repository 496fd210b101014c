//! An HTTP/1.1 client over a blocking socket, that says exactly what came and how it ended.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use super::{LIMIT, wait_for};

/// How a response's body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With its final chunk or its last announced byte.
    Whole,
    /// With the connection's orderly end, as a body of no announced length does.
    UntilClose,
    /// Before its time, by an orderly end of the connection.
    CutByFin,
    /// Before its time, by a reset.
    CutByRst,
}

/// What one read from the socket brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Some bytes.
    Data,
    /// The peer's orderly end.
    Fin,
    /// A reset.
    Rst,
}

/// A response's status line and header lines.
#[derive(Clone, Debug)]
pub struct Head {
    /// The status code.
    pub status: u16,
    /// `HTTP/1.1`.
    pub version: String,
    /// In the order and case in which they came.
    pub headers: Vec<(String, String)>,
}

impl Head {
    /// The first header line of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Whether the list header `name` holds `item`, in any case.
    pub fn has(&self, name: &str, item: &str) -> bool {
        let lines = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        lines.flat_map(|(_, value)| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(item))
    }
}

/// A response.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its head.
    pub head: Head,
    /// What came of its body.
    pub body: Vec<u8>,
    /// The trailer lines after the final chunk.
    pub trailers: Vec<(String, String)>,
    /// How it ended.
    pub end: End,
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A connection. Every wait is bounded by [`LIMIT`] and panics past it.
pub struct Client {
    socket: Socket,
    /// Read, but not yet asked for.
    buffer: Vec<u8>,
}

impl Client {
    /// Connects.
    pub fn connect(addr: SocketAddr) -> Self {
        Self::try_connect(addr).unwrap_or_else(|error| panic!("cannot connect to {addr}: {error}"))
    }

    /// Connects, or says why not.
    pub fn try_connect(addr: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
        socket.connect_timeout(&addr.into(), LIMIT)?;
        Self::over(socket)
    }

    /// Waits until the port is closed: a drain's phase is told just before. One that still gets in goes as an abort.
    pub fn wait_refused(addr: SocketAddr) {
        let refused = |error: &io::Error| error.kind() == ErrorKind::ConnectionRefused;
        wait_for("a refused connection", || Self::try_connect(addr).map(Self::reset).err().filter(refused));
    }

    /// Connects with a receive buffer so small that what isn't read stays with the sender.
    pub fn connect_narrow(addr: SocketAddr) -> Self {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None).expect("a socket");
        socket.set_recv_buffer_size(4096).expect("a small buffer");
        socket
            .connect_timeout(&addr.into(), LIMIT)
            .unwrap_or_else(|error| panic!("cannot connect to {addr}: {error}"));
        Self::over(socket).expect("a socket")
    }

    /// Connects to a unix socket; none if nobody listens there.
    pub fn unix(path: &Path) -> Option<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket");
        socket.connect(&SockAddr::unix(path).expect("a short path")).ok()?;
        Some(Self::over(socket).expect("a socket"))
    }

    /// Whether the peer resets a connection without a byte, be it so soon that connecting fails.
    pub fn is_reset_by(addr: SocketAddr) -> bool {
        match Self::try_connect(addr) {
            Ok(mut client) => client.read_to_end() == (vec![], Fill::Rst),
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }

    /// Over a socket that is connected already, whichever end of it.
    pub fn over(socket: Socket) -> io::Result<Self> {
        socket.set_write_timeout(Some(LIMIT))?;
        Ok(Self { socket, buffer: Vec::new() })
    }

    /// One GET on a connection of its own.
    pub fn ask(addr: SocketAddr, target: &str) -> Answer {
        let answer = Self::connect(addr).try_ask(target, &[]);
        answer.unwrap_or_else(|| panic!("no answer to GET {target} from {addr}"))
    }

    /// One GET as the connection's only request; none if the peer goes away instead of answering.
    pub fn try_ask(mut self, target: &str, headers: &[&str]) -> Option<Answer> {
        let request = request_text("GET", target, &[headers, &["Connection: close"]].concat());
        self.socket.write_all(request.as_bytes()).ok()?;
        let head = self.try_head().ok()?;
        let answer = self.body("GET", head);
        matches!(answer.end, End::Whole | End::UntilClose).then_some(answer)
    }

    /// Sends these bytes.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.socket.write_all(bytes.as_ref()).expect("sent");
    }

    /// Sends these bytes, if the peer still takes them.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Sends a request's head.
    pub fn request(&mut self, method: &str, target: &str, headers: &[&str]) {
        self.send(request_text(method, target, headers));
    }

    /// Sends a GET; the connection is kept.
    pub fn get(&mut self, target: &str) {
        self.request("GET", target, &[]);
    }

    /// No more bytes will be sent.
    pub fn shutdown(&mut self) {
        self.socket.shutdown(Shutdown::Write).expect("half closed");
    }

    /// Ends the connection by a reset.
    pub fn reset(self) {
        self.socket.set_linger(Some(Duration::ZERO)).expect("a linger time");
    }

    /// Reads a response's head, interim ones too.
    pub fn head(&mut self) -> Head {
        self.try_head().unwrap_or_else(|end| panic!("{end:?} instead of a head, after {:?}", self.seen()))
    }

    fn try_head(&mut self) -> Result<Head, Fill> {
        let text = self.try_until(b"\r\n\r\n")?;
        let text = String::from_utf8(text).expect("a head in ASCII");
        let (status_line, lines) = text.split_once("\r\n").expect("a status line");
        let mut words = status_line.split(' ');
        let version = words.next().expect("a version").to_owned();
        let status = words.next().and_then(|code| code.parse().ok());
        let status = status.unwrap_or_else(|| panic!("'{status_line}' is no status line"));
        Ok(Head { status, version, headers: header_lines(lines) })
    }

    /// Reads the whole response to a GET or POST.
    pub fn answer(&mut self) -> Answer {
        let head = self.head();
        self.body("GET", head)
    }

    /// Reads the rest of a response whose head has been read.
    pub fn body(&mut self, method: &str, head: Head) -> Answer {
        let mut answer = Answer { head, body: Vec::new(), trailers: Vec::new(), end: End::Whole };
        let cut = if method == "HEAD" || matches!(answer.head.status, 100..=199 | 204 | 304) {
            Ok(())
        } else if answer.head.has("transfer-encoding", "chunked") {
            self.chunks(&mut answer)
        } else if let Some(length) = answer.head.header("content-length") {
            let length = length.parse().expect("a length");
            self.up_to(length, &mut answer.body)
        } else {
            self.up_to(usize::MAX, &mut answer.body)
        };
        answer.end = match cut {
            Ok(()) => End::Whole,
            Err(Fill::Rst) => End::CutByRst,
            Err(_) if answer.head.has("transfer-encoding", "chunked") => End::CutByFin,
            Err(_) if answer.head.header("content-length").is_some() => End::CutByFin,
            Err(_) => End::UntilClose,
        };
        answer
    }

    fn chunks(&mut self, answer: &mut Answer) -> Result<(), Fill> {
        loop {
            let size = String::from_utf8(self.try_until(b"\r\n")?).expect("a chunk's size");
            let size = size.split(';').next().map(str::trim).unwrap_or_default();
            let size =
                usize::from_str_radix(size, 16).unwrap_or_else(|_| panic!("'{size}' is no chunk's size"));
            if size == 0 {
                break;
            }
            self.up_to(size, &mut answer.body)?;
            assert_eq!(self.try_until(b"\r\n")?, b"\r\n", "after a chunk");
        }
        loop {
            let line = self.try_until(b"\r\n")?;
            if line == b"\r\n" {
                return Ok(());
            }
            answer.trailers.extend(header_lines(&String::from_utf8_lossy(&line)));
        }
    }

    /// Moves `length` bytes into `body`; what came before an early end is moved too.
    fn up_to(&mut self, length: usize, body: &mut Vec<u8>) -> Result<(), Fill> {
        let goal = body.len().saturating_add(length);
        loop {
            let part = self.buffer.len().min(goal - body.len());
            body.extend_from_slice(&self.buffer[..part]);
            self.buffer.drain(..part);
            if body.len() == goal {
                return Ok(());
            }
            self.more()?;
        }
    }

    /// Reads exactly so many bytes.
    pub fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let got = self.up_to(length, &mut bytes);
        assert_eq!(got, Ok(()), "wanted {length} bytes, got {:?}", String::from_utf8_lossy(&bytes));
        bytes
    }

    /// Reads up to and with this text.
    pub fn until(&mut self, text: &str) -> String {
        let got = self.try_until(text.as_bytes());
        let bytes = got.unwrap_or_else(|end| panic!("{end:?} instead of {text:?}, after {:?}", self.seen()));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until this text has come, and leaves it to be read.
    pub fn wait_seen(&mut self, text: &str) {
        while !self.seen().contains(text) {
            self.more().unwrap_or_else(|end| panic!("{end:?} instead of {text:?}, after {:?}", self.seen()));
        }
    }

    fn try_until(&mut self, text: &[u8]) -> Result<Vec<u8>, Fill> {
        loop {
            if let Some(at) = self.buffer.windows(text.len()).position(|window| window == text) {
                return Ok(self.buffer.drain(..at + text.len()).collect());
            }
            self.more()?;
        }
    }

    fn more(&mut self) -> Result<(), Fill> {
        match self.fill(LIMIT) {
            Some(Fill::Data) => Ok(()),
            Some(end) => Err(end),
            None => panic!("nothing came for {LIMIT:?}, after {:?}", self.seen()),
        }
    }

    /// One read; none if nothing came in this time.
    pub fn fill(&mut self, time: Duration) -> Option<Fill> {
        self.socket.set_read_timeout(Some(time)).expect("a timeout");
        let mut bytes = [0; 64 * 1024];
        match self.socket.read(&mut bytes) {
            Ok(0) => Some(Fill::Fin),
            Ok(length) => {
                self.buffer.extend(&bytes[..length]);
                Some(Fill::Data)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Some(Fill::Rst),
            Err(error) => panic!("read: {error}"),
        }
    }

    /// Whether no byte and no end came in this time.
    pub fn is_quiet_for(&mut self, time: Duration) -> bool {
        self.buffer.is_empty() && self.fill(time).is_none()
    }

    /// Reads to the connection's end: what still came, and which end it was.
    pub fn read_to_end(&mut self) -> (Vec<u8>, Fill) {
        let until = Instant::now() + LIMIT;
        loop {
            match self.more() {
                Ok(()) => assert!(Instant::now() < until, "no end within {LIMIT:?}"),
                Err(end) => return (std::mem::take(&mut self.buffer), end),
            }
        }
    }

    /// Reads a sized body piece by piece with a pause before each; `read` is how much the kernel holds no longer.
    pub fn body_slowly(&mut self, head: Head, piece: usize, pause: Duration, read: &AtomicUsize) -> Answer {
        let length: usize = head.header("content-length").expect("a sized body").parse().expect("a length");
        let mut answer = Answer { head, body: Vec::new(), trailers: Vec::new(), end: End::Whole };
        while answer.body.len() < length {
            std::thread::sleep(pause);
            let until = length.min(answer.body.len() + piece);
            self.up_to(until - answer.body.len(), &mut answer.body).expect("no cut");
            read.store(answer.body.len() + self.buffer.len(), Ordering::Release);
        }
        answer
    }

    /// Checks that nothing more comes, and that the end is an orderly one.
    pub fn expect_fin(&mut self) {
        let (rest, end) = self.read_to_end();
        assert_eq!((String::from_utf8_lossy(&rest).as_ref(), end), ("", Fill::Fin));
    }

    fn seen(&self) -> String {
        String::from_utf8_lossy(&self.buffer).into_owned()
    }
}

fn request_text(method: &str, target: &str, headers: &[&str]) -> String {
    let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    format!("{method} {target} HTTP/1.1\r\nHost: app.test\r\n{lines}\r\n")
}

fn header_lines(text: &str) -> Vec<(String, String)> {
    let lines = text.split("\r\n").filter_map(|line| line.split_once(':'));
    lines.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}
