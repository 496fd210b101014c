//! The app behind every proxy: one thread in its own process that responds at once, over TCP and a unix socket.
//!
//! Its heads look like Node's. It reads a whole upload before it responds, so that no response is early.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;

use crate::server::{Result, Scratch, Server, free_address};

/// Body of the small response, 13 bytes.
pub const HELLO: &str = "Hello, world!";
/// Requests for this path never get a response.
pub const HELD: &str = "/held";
/// Requests for this path become a WebSocket that stays silent.
pub const WEBSOCKET: &str = "/websocket";
/// Size of the large responses and of the upload, in bytes.
pub const LARGE: usize = 1 << 20;

/// `Sec-WebSocket-Accept` is for the key in RFC 6455 §1.3, which every client here sends.
const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                        Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// The app as a child process.
pub struct App {
    /// TCP address.
    pub tcp: SocketAddr,
    /// Path of the unix socket.
    pub unix: PathBuf,
    _server: Server,
}

impl App {
    /// Starts this program again, as the app.
    pub fn start(scratch: &Scratch) -> Result<Self> {
        Self::start_at(scratch, free_address()?)
    }

    /// The same at this TCP address.
    pub fn start_at(scratch: &Scratch, tcp: SocketAddr) -> Result<Self> {
        let dir = scratch.dir(&format!("app-{}", tcp.ip()))?;
        let unix = dir.join("app.sock");
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("app").arg(tcp.to_string()).arg(&unix);
        let mut server = Server::start(command, &dir)?;
        server.wait_for_answer(tcp, "/").map_err(|error| format!("the app: {error}"))?;
        Ok(Self { tcp, unix, _server: server })
    }
}

/// Serves for the lifetime of the process.
pub fn serve(tcp: &str, unix: &Path) -> Result<()> {
    let (tcp, unix) = (listen(tcp.parse()?)?, UnixListener::bind(unix)?);
    tcp.set_nonblocking(true)?;
    unix.set_nonblocking(true)?;
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    // The epoll key of a socket is its file descriptor.
    epoll::add(&set, &tcp, EventData::new_u64(tcp.as_raw_fd() as u64), EventFlags::IN)?;
    epoll::add(&set, &unix, EventData::new_u64(unix.as_raw_fd() as u64), EventFlags::IN)?;
    let mut app = Serving { set, open: HashMap::new(), answers: Answers::new(), room: vec![0; 64 * 1024] };
    let mut events = [const { MaybeUninit::uninit() }; 256];
    loop {
        let (happened, _) = epoll::wait(&app.set, &mut events, None)?;
        for event in happened {
            let key = event.data.u64();
            if key == tcp.as_raw_fd() as u64 {
                while let Ok((stream, _)) = tcp.accept() {
                    stream.set_nodelay(true)?;
                    app.welcome(stream.into())?;
                }
            } else if key == unix.as_raw_fd() as u64 {
                while let Ok((stream, _)) = unix.accept() {
                    app.welcome(stream.into())?;
                }
            } else if app.step(key).is_err() {
                app.open.remove(&key);
            }
        }
    }
}

/// Listens with an accept queue that 10,000 simultaneous connections don't overrun for long.
fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(addr), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(8192)?;
    Ok(socket.into())
}

struct Answers {
    small: &'static [u8],
    medium: &'static [u8],
    large: &'static [u8],
}

impl Answers {
    fn new() -> Self {
        Self {
            small: answer(HELLO.as_bytes()),
            medium: answer(&vec![b'x'; 64 * 1024]),
            large: answer(&vec![b'x'; LARGE]),
        }
    }

    /// Response to a request; none if it never gets one.
    fn to(&self, head: &[u8]) -> Option<&'static [u8]> {
        let path = head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
        match path {
            b"/64k" => Some(self.medium),
            b"/1m" => Some(self.large),
            path if path == HELD.as_bytes() => None,
            path if path == WEBSOCKET.as_bytes() => Some(SWITCHED.as_bytes()),
            _ => Some(self.small),
        }
    }
}

fn answer(body: &[u8]) -> &'static [u8] {
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\
         Date: Sat, 01 Jan 2000 00:00:00 GMT\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\n\r\n",
        body.len()
    );
    Box::leak([head.as_bytes(), body].concat().into_boxed_slice())
}

struct Connection {
    socket: OwnedFd,
    /// Bytes of the request head received so far.
    head: Vec<u8>,
    /// Bytes of the upload that are still to come.
    owed: usize,
    /// Bytes of the response that the kernel has not accepted yet.
    unsent: &'static [u8],
    /// Whether it waits for the socket to be writable.
    waits: bool,
}

struct Serving {
    set: OwnedFd,
    open: HashMap<u64, Connection>,
    answers: Answers,
    room: Vec<u8>,
}

impl Serving {
    fn welcome(&mut self, socket: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let key = socket.as_raw_fd() as u64;
        epoll::add(&self.set, &socket, EventData::new_u64(key), EventFlags::IN)?;
        self.open.insert(key, Connection { socket, head: Vec::new(), owed: 0, unsent: &[], waits: false });
        Ok(())
    }

    /// Continues with a connection that is readable or writable. An error closes it.
    fn step(&mut self, key: u64) -> io::Result<()> {
        let Some(connection) = self.open.get_mut(&key) else { return Ok(()) };
        if !connection.unsent.is_empty() {
            connection.send(&self.set, key)?;
            return Ok(());
        }
        let n = match rustix::io::read(&connection.socket, &mut self.room[..]) {
            Err(Errno::AGAIN) => return Ok(()),
            Ok(0) | Err(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => n,
        };
        let mut bytes = &self.room[..n];
        if connection.owed == 0 {
            connection.head.extend_from_slice(bytes);
            let Some(end) = connection.head.windows(4).position(|four| four == b"\r\n\r\n") else {
                return Ok(());
            };
            let body = connection.head.len() - end - 4;
            bytes = &bytes[bytes.len() - body..];
            connection.owed = if connection.head.starts_with(b"POST") { length(&connection.head) } else { 0 };
        }
        connection.owed -= bytes.len().min(connection.owed);
        if connection.owed > 0 {
            return Ok(());
        }
        let answer = self.answers.to(&connection.head);
        connection.head.clear();
        connection.unsent = answer.unwrap_or_default();
        connection.send(&self.set, key)
    }
}

impl Connection {
    fn send(&mut self, set: &OwnedFd, key: u64) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match rustix::io::write(&self.socket, self.unsent) {
                Ok(n) => self.unsent = &self.unsent[n..],
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if self.waits == self.unsent.is_empty() {
            self.waits = !self.waits;
            let interest = if self.waits { EventFlags::OUT } else { EventFlags::IN };
            epoll::modify(set, &self.socket, EventData::new_u64(key), interest)?;
        }
        Ok(())
    }
}

fn length(head: &[u8]) -> usize {
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    let value = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}
