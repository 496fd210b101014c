//! Thousands of client connections on one thread: opened one after the other or all at once, kept, and closed.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use socket2::{Domain, SockRef, Socket, Type};

use crate::app::{HELD, HELLO, WEBSOCKET};
use crate::server::Result;

/// Time limit for a crowd to connect, or to leave.
const CROWD_TIMEOUT: Duration = Duration::from_secs(30);

/// What each connection of a crowd does once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Requests the small response and stays idle.
    Rest,
    /// Becomes a WebSocket and stays silent.
    WebSocket,
    /// Sends a request that never gets a response.
    Hang,
}

impl Act {
    fn request(self) -> String {
        let get = |path, more| format!("GET {path} HTTP/1.1\r\nHost: bench\r\n{more}\r\n");
        match self {
            Self::Rest => get("/", ""),
            Self::Hang => get(HELD, ""),
            Self::WebSocket => get(
                WEBSOCKET,
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
                 Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
            ),
        }
    }

    fn is_answered(self, answer: &[u8]) -> bool {
        match self {
            Self::Rest => answer.starts_with(b"HTTP/1.1 200") && answer.ends_with(HELLO.as_bytes()),
            Self::WebSocket => answer.starts_with(b"HTTP/1.1 101") && answer.ends_with(b"\r\n\r\n"),
            Self::Hang => true,
        }
    }
}

/// Open connections.
pub struct Crowd {
    /// Connections that completed their act.
    pub open: Vec<TcpStream>,
    /// Number of connections that were refused, reset, or got a wrong response.
    pub failed: usize,
    /// Time from the first connect to the last response.
    pub took: Duration,
}

/// A connection that has not completed its act yet.
struct Coming {
    stream: TcpStream,
    asked: bool,
    answer: Vec<u8>,
}

/// Opens `count` connections, with at most `at_once` at a time between connect and response.
pub fn gather(address: SocketAddr, count: usize, at_once: usize, act: Act) -> Result<Crowd> {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let request = act.request();
    let mut coming: Vec<Option<Coming>> = Vec::with_capacity(count);
    let mut crowd = Crowd { open: Vec::with_capacity(count), failed: 0, took: Duration::ZERO };
    let mut events = [const { MaybeUninit::uninit() }; 1024];
    let began = Instant::now();
    while crowd.open.len() + crowd.failed < count {
        while coming.len() < count && coming.len() - crowd.open.len() - crowd.failed < at_once {
            let started = connect(address, &set, coming.len());
            crowd.failed += usize::from(started.is_err());
            coming.push(started.ok());
        }
        if began.elapsed() > CROWD_TIMEOUT {
            crowd.failed = count - crowd.open.len();
            break;
        }
        let wait = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        let (happened, _) = epoll::wait(&set, &mut events, Some(&wait))?;
        for event in happened {
            let at = event.data.u64() as usize;
            let Some(one) = &mut coming[at] else { continue };
            match one.step(&set, at, act, &request) {
                Ok(false) => continue,
                Ok(true) => crowd.open.extend(coming[at].take().map(|one| one.stream)),
                Err(_) => crowd.failed += usize::from(coming[at].take().is_some()),
            }
        }
    }
    crowd.took = began.elapsed();
    Ok(crowd)
}

fn connect(address: SocketAddr, set: &OwnedFd, at: usize) -> io::Result<Coming> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    // Closed by a reset at the end, so that no port stays in TIME_WAIT: over the rounds, they would run out.
    socket.set_linger(Some(Duration::ZERO))?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {
            return Err(error);
        }
        _ => {}
    }
    epoll::add(set, &socket, EventData::new_u64(at as u64), EventFlags::OUT)?;
    Ok(Coming { stream: socket.into(), asked: false, answer: Vec::new() })
}

impl Coming {
    /// Continues; returns true once its act is done.
    fn step(&mut self, set: &OwnedFd, at: usize, act: Act, request: &str) -> io::Result<bool> {
        if !self.asked {
            if let Some(error) = SockRef::from(&self.stream).take_error()? {
                return Err(error);
            }
            self.stream.write_all(request.as_bytes())?;
            self.asked = true;
            epoll::modify(set, &self.stream, EventData::new_u64(at as u64), EventFlags::IN)?;
        } else {
            let mut room = [0; 1024];
            let n = self.stream.read(&mut room)?;
            self.answer.extend_from_slice(&room[..n]);
            if n == 0 || self.answer.len() > 4096 {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        let done = act.is_answered(&self.answer);
        if done {
            epoll::delete(set, &self.stream)?;
        }
        Ok(done)
    }
}

impl Crowd {
    /// Returns an error unless all connections succeeded.
    pub fn whole(self) -> Result<Self> {
        match self.failed {
            0 => Ok(self),
            failed => Err(format!("{failed} of {} connections failed", failed + self.open.len()).into()),
        }
    }

    /// Number of connections that the proxy has closed.
    pub fn closed(&self) -> usize {
        let waits = |error: io::Error| error.kind() == io::ErrorKind::WouldBlock;
        self.open.iter().filter(|stream| !stream.peek(&mut [0]).is_err_and(waits)).count()
    }

    /// Closes each connection after the proxy has; returns how many the proxy did not close in time.
    pub fn leave_when_told(self) -> Result<usize> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (at, stream) in self.open.iter().enumerate() {
            epoll::add(&set, stream, EventData::new_u64(at as u64), EventFlags::IN)?;
        }
        let mut left = self.open.len();
        let mut open: Vec<_> = self.open.into_iter().map(Some).collect();
        let mut events = [const { MaybeUninit::uninit() }; 1024];
        let began = Instant::now();
        while left > 0 && began.elapsed() < CROWD_TIMEOUT {
            let wait = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
            let (happened, _) = epoll::wait(&set, &mut events, Some(&wait))?;
            for event in happened {
                left -= usize::from(open[event.data.u64() as usize].take().is_some());
            }
        }
        Ok(left)
    }
}
