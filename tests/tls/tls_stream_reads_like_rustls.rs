//! Whatever a TLS peer sends and however the network cuts it, our stream reads the same bytes, ends in the same way and
//! sends the same as tokio-rustls, which uses rustls' buffered interface.
//! `LAMEDUCK_SEED=N cargo test --test tls tls_stream_reads` replays a script and prints it.

use std::fmt;
use std::future::poll_fn;
use std::io::{self, ErrorKind, Write};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::pin::{Pin, pin};
use std::task::Poll;

use lameduck::tls::stream::{Side, Tls};
use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::common::http2::run;
use crate::scripted_peer::{Config, Heard, Peer, Script, Step, name};

const SEEDS: u64 = 300;

/// A stream, before and after its handshake.
enum Stream {
    Ours(Tls),
    Theirs(Box<TlsStream<tokio::net::TcpStream>>),
}

impl Stream {
    async fn shake(ours: bool, tcp: tokio::net::TcpStream, config: Config) -> io::Result<Self> {
        if !ours {
            return Ok(Self::Theirs(Box::new(match config {
                Config::Client(config) => TlsConnector::from(config).connect(name(), tcp).await?.into(),
                Config::Server(config) => TlsAcceptor::from(config).accept(tcp).await?.into(),
            })));
        }
        let mut tls = Tls::new(
            tcp,
            match config {
                Config::Client(config) => {
                    Side::Client(UnbufferedClientConnection::new(config, name()).expect("a session"))
                }
                Config::Server(config) => {
                    Side::Server(UnbufferedServerConnection::new(config).expect("a session"))
                }
            },
        );
        poll_fn(|cx| tls.poll_handshake(cx)).await?;
        Ok(Self::Ours(tls))
    }

    async fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Ours(tls) => tls.read(bytes).await,
            Self::Theirs(tls) => tls.read(bytes).await,
        }
    }

    /// Ready once all bytes are in the socket.
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Ours(tls) => tls.split().1.write_all(bytes).await,
            Self::Theirs(tls) => {
                tls.write_all(bytes).await?;
                tls.flush().await
            }
        }
    }

    async fn shutdown(&mut self) -> io::Result<()> {
        match self {
            Self::Ours(tls) => tls.split().1.shutdown().await,
            Self::Theirs(tls) => tls.shutdown().await,
        }
    }
}

/// How a stream ended for its reader.
#[derive(PartialEq, Debug)]
enum End {
    Notified,
    Failed(ErrorKind, Option<String>),
}

/// What came of a script.
#[derive(Default, PartialEq)]
struct Outcome {
    read: Vec<u8>,
    end: Option<End>,
    heard: Heard,
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { read, end, heard } = self;
        let (read, heard, other) = (read.len(), heard.bytes.len(), &heard.other);
        write!(f, "{read} bytes read, end {end:?}, {heard} bytes and {other:?} heard")
    }
}

impl Outcome {
    fn failed(&mut self, error: &io::Error) {
        let why = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        self.end = Some(End::Failed(error.kind(), why.map(|why| format!("{why:?}"))));
    }
}

/// Polls once.
async fn now<T>(mut future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
    poll_fn(|cx| {
        Poll::Ready(match future.as_mut().poll(cx) {
            Poll::Ready(done) => Some(done),
            Poll::Pending => None,
        })
    })
    .await
}

struct Trial<'s> {
    script: &'s Script,
    peer: Peer,
    /// The stream's socket.
    socket: TcpStream,
    /// Bytes that the stream has sent.
    written: usize,
    outcome: Outcome,
}

/// Two connected sockets with small buffers, so that writes are partial.
fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let there = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
    let here = listener.accept().expect("accepted").0;
    for tcp in [&there, &here] {
        tcp.set_nonblocking(true).expect("a socket");
        tcp.set_nodelay(true).expect("a socket");
        SockRef::from(tcp).set_send_buffer_size(8_000).expect("a socket");
        SockRef::from(tcp).set_recv_buffer_size(8_000).expect("a socket");
    }
    (there, here)
}

/// Whether there is something left to receive.
fn is_unread(socket: &TcpStream) -> bool {
    SockRef::from(socket).peek(&mut [MaybeUninit::uninit()]).is_ok()
}

impl Trial<'_> {
    async fn run(script: &Script, ours: bool) -> Outcome {
        let (there, socket) = sockets();
        let (peer, config) = Peer::new(script, there);
        let tcp = socket.try_clone().and_then(tokio::net::TcpStream::from_std).expect("a socket");
        let shaking = Box::pin(Stream::shake(ours, tcp, config));
        let mut trial = Trial { script, peer, socket, written: 0, outcome: Outcome::default() };
        let mut stream = trial.shake(shaking).await;
        for step in &script.steps {
            trial.step(&mut stream, step).await;
        }
        if !matches!(trial.outcome.end, Some(End::Failed(ErrorKind::InvalidData, _))) {
            let _ = stream.shutdown().await;
        }
        let _ = trial.socket.shutdown(Shutdown::Write);
        while trial.peer.receive(1 << 20) {
            tokio::task::yield_now().await;
        }
        trial.peer.hear(&mut trial.outcome.heard);
        trial.outcome
    }

    /// Does the handshake, which succeeds on both sides.
    async fn shake(&mut self, mut shaking: Pin<Box<impl Future<Output = io::Result<Stream>>>>) -> Stream {
        let mut stream = None;
        while stream.is_none() || self.peer.is_handshaking() {
            for part in self.peer.outgoing().chunks(self.script.cut.max(50)) {
                (&self.peer.tcp).write_all(part).expect("room");
                while stream.is_none() && is_unread(&self.socket) {
                    stream = now(shaking.as_mut()).await;
                    tokio::task::yield_now().await;
                }
            }
            if stream.is_none() {
                stream = now(shaking.as_mut()).await;
            }
            self.peer.receive(1 << 20);
            self.peer.hear(&mut self.outcome.heard);
            tokio::task::yield_now().await;
        }
        stream.expect("done").expect("a handshake")
    }

    async fn step(&mut self, stream: &mut Stream, step: &Step) {
        match step {
            Step::Hear(bytes, at_once) => {
                let bytes: Vec<_> = (0..*bytes).map(|n| (n % 253) as u8).collect();
                let mut writing = pin!(stream.write(&bytes));
                loop {
                    match now(writing.as_mut()).await {
                        Some(Ok(())) => break,
                        Some(Err(error)) => return self.outcome.failed(&error),
                        None => drop(self.peer.receive(*at_once)),
                    }
                    tokio::task::yield_now().await;
                }
                // Part of them may still be on the way.
                self.written += bytes.len();
                while self.outcome.heard.bytes.len() < self.written && self.peer.receive(*at_once) {
                    self.peer.hear(&mut self.outcome.heard);
                    tokio::task::yield_now().await;
                }
            }
            Step::Eof => {
                let _ = self.peer.tcp.shutdown(Shutdown::Write);
                while self.outcome.end.is_none() {
                    self.read(stream).await;
                    tokio::task::yield_now().await;
                }
            }
            _ => {
                let bytes = self.peer.say(step, self.script.tls13);
                for part in bytes.chunks(self.script.cut.max(bytes.len() / 50)) {
                    let mut left = part;
                    while !left.is_empty() && self.outcome.end.is_none() {
                        match (&self.peer.tcp).write(left) {
                            Ok(n) => left = &left[n..],
                            Err(_) => self.read(stream).await,
                        }
                    }
                    if !self.script.late {
                        self.read(stream).await;
                    }
                }
                self.read(stream).await;
            }
        }
    }

    /// Reads until nothing has come that was not read.
    async fn read(&mut self, stream: &mut Stream) {
        let mut bytes = vec![0; self.script.room];
        while self.outcome.end.is_none() {
            let read = now(pin!(stream.read(&mut bytes))).await;
            match read {
                Some(Ok(0)) => self.outcome.end = Some(End::Notified),
                Some(Ok(n)) => self.outcome.read.extend(&bytes[..n]),
                Some(Err(error)) => self.outcome.failed(&error),
                None if is_unread(&self.socket) => tokio::task::yield_now().await,
                None => break,
            }
        }
    }
}

#[test]
fn any_script_has_the_same_outcome() {
    let seeds = match std::env::var("LAMEDUCK_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("a number");
            eprintln!("{:?}", Script::new(seed));
            seed..=seed
        }
        Err(_) => 1..=SEEDS,
    };
    for seed in seeds {
        let script = Script::new(seed);
        let (ours, theirs) =
            run(async { (Trial::run(&script, true).await, Trial::run(&script, false).await) });
        assert!(ours == theirs, "LAMEDUCK_SEED={seed}: ours: {ours:?}, theirs: {theirs:?}");
    }
}
