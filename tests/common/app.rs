//! A raw app: it shows a test the bytes that reach it and answers with whatever bytes the test likes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use lameduck::proxy::socket;
use socket2::{SockRef, Socket};

use super::{LIMIT, wait_for};

/// A listening app; its threads end with the test's process.
pub struct RawApp {
    /// Where it listens; meaningless for a unix socket.
    pub addr: SocketAddr,
    asked: Receiver<Asked>,
    seen: Arc<Mutex<Vec<u8>>>,
}

/// A connection of the app's over which a request has come.
pub struct Asked {
    /// The request's head, with its last empty line.
    pub head: String,
    stream: Box<dyn Stream>,
    buffer: Vec<u8>,
    seen: Arc<Mutex<Vec<u8>>>,
}

trait Stream: Read + Write + Send {
    fn socket(&self) -> SockRef<'_>;
}

impl Stream for TcpStream {
    fn socket(&self) -> SockRef<'_> {
        SockRef::from(self)
    }
}

impl Stream for UnixStream {
    fn socket(&self) -> SockRef<'_> {
        SockRef::from(self)
    }
}

impl RawApp {
    /// Listens on 127.0.0.1.
    pub fn start() -> Self {
        Self::greeting(b"")
    }

    /// Sends these bytes on each connection before anything was asked.
    pub fn greeting(bytes: &'static [u8]) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let addr = listener.local_addr().expect("its address");
        Self::over(addr, move || {
            let mut stream = listener.accept().expect("accepted").0;
            let _ = stream.write_all(bytes);
            Box::new(stream)
        })
    }

    /// Listens on a unix socket.
    pub fn unix(path: &Path) -> Self {
        Self::accepting(Socket::from(OwnedFd::from(UnixListener::bind(path).expect("a unix socket"))))
    }

    /// Takes over a unix socket that listens already.
    pub fn accepting(listener: Socket) -> Self {
        let listener = UnixListener::from(OwnedFd::from(listener));
        Self::over((Ipv4Addr::LOCALHOST, 0).into(), move || Box::new(listener.accept().expect("accepted").0))
    }

    fn over(addr: SocketAddr, accept: impl Fn() -> Box<dyn Stream> + Send + 'static) -> Self {
        let (sender, asked) = channel();
        let seen = Arc::default();
        let all = Arc::clone(&seen);
        thread::spawn(move || {
            loop {
                let (stream, seen, sender) = (accept(), Arc::clone(&all), sender.clone());
                thread::spawn(move || first_request(stream, seen, &sender));
            }
        });
        Self { addr, asked, seen }
    }

    /// The next connection over which a request comes. The proxy's readiness checks bring none.
    pub fn asked(&self) -> Asked {
        self.asked.recv_timeout(LIMIT).expect("a request reaches the app")
    }

    /// The same, if it comes in this time.
    pub fn asked_within(&self, time: Duration) -> Option<Asked> {
        self.asked.recv_timeout(time).ok()
    }

    /// Answers every request on every connection with these bytes, for as long as the test runs.
    pub fn answer_all(self, answer: &'static str) -> Answering {
        let seen = Arc::clone(&self.seen);
        let addr = self.addr;
        thread::spawn(move || {
            while let Ok(mut asked) = self.asked.recv() {
                thread::spawn(move || {
                    asked.send(answer);
                    while asked.try_next().is_some() {
                        // A chunked body ends as a head does; an answer to it would be taken for the next request's.
                        if asked.head.contains(" HTTP/1.") {
                            asked.send(answer);
                        }
                    }
                });
            }
        });
        Answering { addr, seen }
    }
}

/// A [`RawApp`] that answers by itself.
pub struct Answering {
    /// Where it listens.
    pub addr: SocketAddr,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Answering {
    /// Every byte that has come, over all connections.
    pub fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().expect("not poisoned")).into_owned()
    }
}

fn first_request(stream: Box<dyn Stream>, seen: Arc<Mutex<Vec<u8>>>, sender: &Sender<Asked>) {
    let mut asked = Asked { head: String::new(), stream, buffer: Vec::new(), seen };
    if asked.try_next().is_some() {
        let _ = sender.send(asked);
    }
}

impl Asked {
    /// Reads the next request's head over this connection.
    pub fn next(&mut self) -> &str {
        assert!(self.try_next().is_some(), "no further request over this connection");
        &self.head
    }

    fn try_next(&mut self) -> Option<()> {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            if !self.more() {
                return None;
            }
        };
        self.head = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        self.buffer.drain(..end);
        Some(())
    }

    /// Reads exactly so many bytes of the request's body.
    pub fn take(&mut self, length: usize) -> String {
        while self.buffer.len() < length {
            assert!(self.more(), "wanted {length} bytes, got {}", self.buffer.len());
        }
        let rest = self.buffer.split_off(length);
        String::from_utf8_lossy(&std::mem::replace(&mut self.buffer, rest)).into_owned()
    }

    /// Reads to the connection's end, orderly or not: what still came.
    pub fn rest(&mut self) -> String {
        let end = Instant::now() + LIMIT;
        while self.more() {
            assert!(Instant::now() < end, "the proxy does not end its connection to the app");
        }
        String::from_utf8_lossy(&std::mem::take(&mut self.buffer)).into_owned()
    }

    /// Whether the proxy ends its connection in this time.
    pub fn ends_within(&mut self, time: Duration) -> bool {
        let end = Instant::now() + time;
        self.stream.socket().set_read_timeout(Some(time)).expect("a timeout");
        let mut bytes = [0; 4096];
        while Instant::now() < end {
            match self.stream.read(&mut bytes) {
                Ok(0) => return true,
                Ok(n) => self.buffer.extend(&bytes[..n]),
                Err(error) => return !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
            }
        }
        false
    }

    fn more(&mut self) -> bool {
        self.stream.socket().set_read_timeout(Some(LIMIT)).expect("a timeout");
        let mut bytes = [0; 64 * 1024];
        let n = match self.stream.read(&mut bytes) {
            Ok(n) => n,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("nothing came to the app for {LIMIT:?}");
            }
            Err(_) => 0,
        };
        self.buffer.extend(&bytes[..n]);
        self.seen.lock().expect("not poisoned").extend(&bytes[..n]);
        n > 0
    }

    /// Sends these bytes; whether they were taken is the test's to find out.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref());
    }

    /// Ends the app's side and goes on reading.
    pub fn shutdown(&mut self) {
        let _ = self.stream.socket().shutdown(Shutdown::Write);
    }

    /// Ends the connection, and waits until the proxy's kernel has acknowledged that: on a busy machine a later packet of
    /// another connection may overtake an end.
    pub fn close(mut self) {
        self.shutdown();
        wait_for("the end to be delivered", || {
            (socket::unacknowledged(&*self.stream.socket()) == 0).then_some(())
        });
    }

    /// Ends the connection by a reset.
    pub fn reset(self) {
        self.stream.socket().set_linger(Some(Duration::ZERO)).expect("a linger time");
    }

    /// Whether the head has this line, letter by letter.
    pub fn has_line(&self, line: &str) -> bool {
        self.head.split("\r\n").any(|other| other == line)
    }
}
