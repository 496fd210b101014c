//! An HTTP/1.1 client over a blocking socket that reports exactly which bytes came and how the connection ended.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use super::{LIMIT, wait_for};

/// How the body of a response ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With the final chunk, or the last byte of its Content-Length.
    Whole,
    /// With a clean end of the connection, for a body without a length.
    UntilClose,
    /// Early, by a clean end of the connection.
    CutByFin,
    /// Early, by a reset.
    CutByRst,
}

/// Result of one read from the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Bytes.
    Data,
    /// A clean end (FIN).
    Fin,
    /// A reset.
    Rst,
}

/// Status line and header lines of a response.
#[derive(Clone, Debug)]
pub struct Head {
    /// The status code.
    pub status: u16,
    /// `HTTP/1.1`.
    pub version: String,
    /// Header lines, in their original order and case.
    pub headers: Vec<(String, String)>,
}

impl Head {
    /// Value of the first header line with this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Whether the list header `name` contains `item`; case does not matter.
    pub fn has(&self, name: &str, item: &str) -> bool {
        let lines = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        lines.flat_map(|(_, value)| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(item))
    }
}

/// A response.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Head.
    pub head: Head,
    /// Body bytes received.
    pub body: Vec<u8>,
    /// Trailer lines after the final chunk.
    pub trailers: Vec<(String, String)>,
    /// How the body ended.
    pub end: End,
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A connection. Every wait panics after [`LIMIT`].
pub struct Client {
    socket: Socket,
    /// Bytes read but not consumed yet.
    buffer: Vec<u8>,
}

impl Client {
    /// Connects.
    pub fn connect(addr: SocketAddr) -> Self {
        Self::try_connect(addr).unwrap_or_else(|error| panic!("cannot connect to {addr}: {error}"))
    }

    /// Connects, or returns the error.
    pub fn try_connect(addr: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
        socket.connect_timeout(&addr.into(), LIMIT)?;
        Self::over(socket)
    }

    /// Waits until the port is closed: the phase of a drain is reported slightly before that. A connection that still
    /// gets in is reset.
    pub fn wait_refused(addr: SocketAddr) {
        let refused = |error: &io::Error| error.kind() == ErrorKind::ConnectionRefused;
        wait_for("a refused connection", || Self::try_connect(addr).map(Self::reset).err().filter(refused));
    }

    /// Connects with a receive buffer so small that unread bytes stay with the sender.
    pub fn connect_narrow(addr: SocketAddr) -> Self {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None).expect("a socket");
        socket.set_recv_buffer_size(4096).expect("a small buffer");
        socket
            .connect_timeout(&addr.into(), LIMIT)
            .unwrap_or_else(|error| panic!("cannot connect to {addr}: {error}"));
        Self::over(socket).expect("a socket")
    }

    /// Connects to a unix socket; none if nothing listens there.
    pub fn unix(path: &Path) -> Option<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket");
        socket.connect(&SockAddr::unix(path).expect("a short path")).ok()?;
        Some(Self::over(socket).expect("a socket"))
    }

    /// Whether the peer resets a new connection without sending a byte, even during the connect.
    pub fn is_reset_by(addr: SocketAddr) -> bool {
        match Self::try_connect(addr) {
            Ok(mut client) => client.read_to_end() == (vec![], Fill::Rst),
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }

    /// Wraps a connected socket, of either side.
    pub fn over(socket: Socket) -> io::Result<Self> {
        socket.set_write_timeout(Some(LIMIT))?;
        Ok(Self { socket, buffer: Vec::new() })
    }

    /// One GET on a new connection.
    pub fn ask(addr: SocketAddr, target: &str) -> Answer {
        let answer = Self::connect(addr).try_ask(target, &[]);
        answer.unwrap_or_else(|| panic!("no answer to GET {target} from {addr}"))
    }

    /// One GET as the only request of a new connection; none if the peer closes without a response.
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

    /// Sends these bytes; an error if the peer no longer accepts them.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Sends the head of a request.
    pub fn request(&mut self, method: &str, target: &str, headers: &[&str]) {
        self.send(request_text(method, target, headers));
    }

    /// Sends a GET on the kept-alive connection.
    pub fn get(&mut self, target: &str) {
        self.request("GET", target, &[]);
    }

    /// Shuts down the sending side.
    pub fn shutdown(&mut self) {
        self.socket.shutdown(Shutdown::Write).expect("half closed");
    }

    /// Resets the connection.
    pub fn reset(self) {
        self.socket.set_linger(Some(Duration::ZERO)).expect("a linger time");
    }

    /// Reads the head of a response, including interim ones.
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
        let status = status.unwrap_or_else(|| panic!("'{status_line}' is not a status line"));
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
                usize::from_str_radix(size, 16).unwrap_or_else(|_| panic!("'{size}' is not a chunk size"));
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

    /// Moves `length` bytes into `body`, or fewer if the connection ends early.
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

    /// Reads exactly this number of bytes.
    pub fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let got = self.up_to(length, &mut bytes);
        assert_eq!(got, Ok(()), "wanted {length} bytes, got {:?}", String::from_utf8_lossy(&bytes));
        bytes
    }

    /// Reads up to and including this text.
    pub fn until(&mut self, text: &str) -> String {
        let got = self.try_until(text.as_bytes());
        let bytes = got.unwrap_or_else(|end| panic!("{end:?} instead of {text:?}, after {:?}", self.seen()));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until this text has come, without consuming it.
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

    /// One read; none if nothing came within this time.
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

    /// Whether neither a byte nor an end came within this time.
    pub fn is_quiet_for(&mut self, time: Duration) -> bool {
        self.buffer.is_empty() && self.fill(time).is_none()
    }

    /// Reads until the connection ends: the remaining bytes, and how it ended.
    pub fn read_to_end(&mut self) -> (Vec<u8>, Fill) {
        let until = Instant::now() + LIMIT;
        loop {
            match self.more() {
                Ok(()) => assert!(Instant::now() < until, "no end within {LIMIT:?}"),
                Err(end) => return (std::mem::take(&mut self.buffer), end),
            }
        }
    }

    /// Reads a sized body in pieces with a pause before each; `read` gets the number of bytes taken from the kernel.
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

    /// Checks that nothing more comes before a clean end.
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
