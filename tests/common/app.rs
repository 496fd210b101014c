//! A raw app: shows the test the bytes that it receives, and responds with any bytes that the test wants.

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

/// A listening app; its threads end with the test process.
pub struct RawApp {
    /// Address on which it listens; meaningless for a unix socket.
    pub addr: SocketAddr,
    asked: Receiver<Asked>,
    seen: Arc<Mutex<Vec<u8>>>,
}

/// A connection to the app with a request.
pub struct Asked {
    /// Head of the request, with the empty line.
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

    /// Sends these bytes on each new connection, before any request.
    pub fn greeting(bytes: &'static [u8]) -> Self {
        Self::greeting_at((Ipv4Addr::LOCALHOST, 0).into(), bytes)
    }

    /// Listens on this address.
    pub fn at(addr: SocketAddr) -> Self {
        Self::greeting_at(addr, b"")
    }

    /// Listens on this address, and sends these bytes on each new connection.
    pub fn greeting_at(addr: SocketAddr, bytes: &'static [u8]) -> Self {
        let listener = TcpListener::bind(addr).expect("a port");
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

    /// Takes over a listening unix socket.
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

    /// Waits for the next connection with a request. The proxy's readiness checks send none.
    pub fn asked(&self) -> Asked {
        self.asked.recv_timeout(LIMIT).expect("a request reaches the app")
    }

    /// The same with a time limit; none if it expires.
    pub fn asked_within(&self, time: Duration) -> Option<Asked> {
        self.asked.recv_timeout(time).ok()
    }

    /// Responds to every request on every connection with these bytes, until the test ends.
    pub fn answer_all(self, answer: &'static str) -> Answering {
        let seen = Arc::clone(&self.seen);
        let addr = self.addr;
        thread::spawn(move || {
            while let Ok(mut asked) = self.asked.recv() {
                thread::spawn(move || {
                    asked.send(answer);
                    while asked.try_next().is_some() {
                        // A chunked body ends like a head; a response to it would be taken for the next request's.
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

/// A [`RawApp`] that responds by itself.
pub struct Answering {
    /// Address on which it listens.
    pub addr: SocketAddr,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Answering {
    /// All bytes received so far, over all connections.
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
    /// Reads the head of the next request on this connection.
    pub fn next(&mut self) -> &str {
        assert!(self.try_next().is_some(), "no further request on this connection");
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

    /// Reads exactly this number of bytes of the request's body.
    pub fn take(&mut self, length: usize) -> String {
        while self.buffer.len() < length {
            assert!(self.more(), "wanted {length} bytes, got {}", self.buffer.len());
        }
        let rest = self.buffer.split_off(length);
        String::from_utf8_lossy(&std::mem::replace(&mut self.buffer, rest)).into_owned()
    }

    /// Reads until the connection ends, cleanly or not; returns the remaining bytes.
    pub fn rest(&mut self) -> String {
        let end = Instant::now() + LIMIT;
        while self.more() {
            assert!(Instant::now() < end, "the proxy does not close its connection to the app");
        }
        String::from_utf8_lossy(&std::mem::take(&mut self.buffer)).into_owned()
    }

    /// Whether the proxy ends its connection within this time.
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

    /// Sends these bytes; ignores errors.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref());
    }

    /// Shuts down the app's sending side; the app keeps reading.
    pub fn shutdown(&mut self) {
        let _ = self.stream.socket().shutdown(Shutdown::Write);
    }

    /// Closes the connection, and waits until the proxy's kernel has acknowledged it: on a busy machine a later packet
    /// of another connection may overtake the FIN.
    pub fn close(mut self) {
        self.shutdown();
        wait_for("the end to be delivered", || {
            (socket::unacknowledged(&*self.stream.socket()) == 0).then_some(())
        });
    }

    /// Resets the connection.
    pub fn reset(self) {
        self.stream.socket().set_linger(Some(Duration::ZERO)).expect("a linger time");
    }

    /// Whether the head contains exactly this line.
    pub fn has_line(&self, line: &str) -> bool {
        self.head.split("\r\n").any(|other| other == line)
    }
}
