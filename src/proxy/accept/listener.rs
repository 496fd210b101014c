//! Listening sockets: one thread accepts and gives each connection to the thread that has the fewest.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::sync::{mpsc, watch};

use super::prepare::{Accepted, Service};
use super::syn_drain::handshakes_end;
use crate::drain::ledger::Assigned;
use crate::proxy::shared::Shared;
use crate::repeated::Repeated;

/// Connections that wait for being accepted; the kernel cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
/// After an accept that failed for want of files or memory, and while there are too many connections.
const BACK_OFF: Duration = Duration::from_millis(50);

/// A listening socket. `[::]` takes IPv4 too; where there is no IPv6, it is `0.0.0.0` instead. `shared`: another process
/// of the same user may listen there too, and the kernel gives each its part of the new connections (socket(7)).
pub fn bind(addr: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    match bind_exactly(addr, shared) {
        Err(error) if addr.is_ipv6() && addr.ip().is_unspecified() => {
            bind_exactly((Ipv4Addr::UNSPECIFIED, addr.port()).into(), shared).map_err(|_| error)
        }
        bound => bound,
    }
}

fn bind_exactly(addr: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(!addr.ip().is_unspecified())?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Opens and closes the listening sockets, from any thread.
#[derive(Clone)]
pub struct Switch {
    on: watch::Sender<bool>,
    /// How many listening sockets are closed.
    closed: watch::Sender<usize>,
    /// How many there are.
    all: Arc<AtomicUsize>,
}

impl Default for Switch {
    /// A switch for listening sockets that nobody accepts from yet.
    fn default() -> Self {
        Self { on: watch::Sender::new(true), closed: watch::Sender::new(0), all: Arc::default() }
    }
}

impl Switch {
    /// For this many listening sockets.
    pub fn expect(&self, listeners: usize) {
        self.all.store(listeners, Ordering::Release);
    }

    /// Takes what is in the accept queues, then closes the listening sockets.
    pub fn close(&self) {
        self.on.send_replace(false);
    }

    /// Begins to listen again at the same addresses.
    pub fn listen(&self) {
        self.on.send_replace(true);
    }

    /// Whether a listening socket is still open.
    pub fn is_listening(&self) -> bool {
        *self.closed.borrow() < self.all.load(Ordering::Acquire)
    }

    /// Returns when every listening socket is open, or when they are to close after all.
    pub async fn all_open(&self) {
        let (mut on, mut closed) = (self.on.subscribe(), self.closed.subscribe());
        tokio::select! {
            _ = closed.wait_for(|closed| *closed == 0) => {}
            _ = on.wait_for(|on| !*on) => {}
        }
    }
}

/// A connection on its way to its thread.
pub struct Given {
    /// The connection.
    pub accepted: Accepted<TcpStream>,
    /// Counts it for that thread until it is there.
    pub assigned: Assigned,
}

/// Accepts connections on the first thread and gives each to the thread that has the fewest.
pub struct Acceptor {
    shared: Arc<Shared>,
    others: Vec<mpsc::UnboundedSender<Given>>,
    switch: Switch,
}

impl Acceptor {
    /// For the first thread; the `others` get their connections by these.
    pub fn new(shared: Arc<Shared>, others: Vec<mpsc::UnboundedSender<Given>>, switch: Switch) -> Self {
        Self { shared, others, switch }
    }

    /// Accepts until told to stop, then waits to be told to listen again. `serve` gets this thread's connections;
    /// `on_closed` is called when the listening socket has closed.
    pub async fn run(
        self: Rc<Self>,
        listener: TcpListener,
        service: Service,
        serve: impl Fn(Accepted<tokio::net::TcpStream>),
        on_closed: impl Fn(),
    ) {
        let mut on = self.switch.on.subscribe();
        let addr = listener.local_addr();
        let mut listener = Some(listener);
        loop {
            if let Some(listener) = listener.take() {
                let closed = self.accept(listener, service, &serve, &mut on).await;
                if let Err(error) = closed {
                    tracing::error!(%error, "a listening socket failed");
                }
                self.switch.closed.send_modify(|closed| *closed += 1);
                on_closed();
            }
            if on.wait_for(|on| *on).await.is_err() {
                return;
            }
            let shared = self.shared.settings.reuse_port;
            match addr.as_ref().map(|addr| bind(*addr, shared)) {
                Ok(Ok(again)) => {
                    self.switch.closed.send_modify(|closed| *closed -= 1);
                    listener = Some(again);
                }
                failed => {
                    tracing::error!(?failed, "can't listen again after a resume; trying once a second");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    async fn accept(
        &self,
        mut listener: TcpListener,
        service: Service,
        serve: &impl Fn(Accepted<tokio::net::TcpStream>),
        on: &mut watch::Receiver<bool>,
    ) -> io::Result<()> {
        loop {
            listener = self.accept_until_off(listener, service, serve, on).await?;
            handshakes_end(&listener).await;
            if !*on.borrow() {
                return self.empty_queue(&listener, service, serve);
            }
            SockRef::from(&listener).detach_filter()?;
        }
    }

    async fn accept_until_off(
        &self,
        listener: TcpListener,
        service: Service,
        serve: &impl Fn(Accepted<tokio::net::TcpStream>),
        on: &mut watch::Receiver<bool>,
    ) -> io::Result<TcpListener> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        loop {
            // Those past the bound wait in the socket's queue, and are taken when a drain closes it.
            let full = self.is_full(service);
            tokio::select! {
                biased;
                _ = on.wait_for(|on| !*on) => return listener.into_std(),
                () = tokio::time::sleep(BACK_OFF), if full => {}
                accepted = listener.accept(), if !full => match accepted {
                    Ok((stream, peer)) => self.give(stream, peer, service, serve),
                    Err(error) => self.back_off(&error).await,
                },
            }
        }
    }

    fn empty_queue(
        &self,
        listener: &TcpListener,
        service: Service,
        serve: &impl Fn(Accepted<tokio::net::TcpStream>),
    ) -> io::Result<()> {
        loop {
            match listener.accept() {
                Ok((stream, peer)) => {
                    // One that fails is no reason to leave those behind it.
                    let stream =
                        stream.set_nonblocking(true).and_then(|()| tokio::net::TcpStream::from_std(stream));
                    if let Ok(stream) = stream {
                        self.give(stream, peer, service, serve);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(_) => return Ok(()),
            }
        }
    }

    /// Handshakes cost more than connections: fewer have room.
    fn is_full(&self, service: Service) -> bool {
        if service == Service::Https && self.shared.tls.as_ref().is_some_and(|tls| tls.is_busy()) {
            return true;
        }
        self.shared.is_full()
    }

    /// To the thread with the fewest connections; this one is the first.
    fn give(
        &self,
        stream: tokio::net::TcpStream,
        peer: SocketAddr,
        service: Service,
        serve: &impl Fn(Accepted<tokio::net::TcpStream>),
    ) {
        let ledgers = &self.shared.ledgers;
        let fewest = (0..ledgers.len()).min_by_key(|thread| ledgers[*thread].open()).unwrap_or(0);
        if stream.set_nodelay(true).is_err() {
            return; // it has been reset already
        }
        let assigned = ledgers[fewest].assigned();
        let accepted = Accepted { stream, peer, service, connected: self.shared.gate.connect() };
        self.shared.share_files();
        match fewest.checked_sub(1) {
            None => {
                assigned.arrived();
                serve(accepted);
            }
            Some(other) => match accepted.with(tokio::net::TcpStream::into_std) {
                Ok(accepted) => drop(self.others[other].send(Given { accepted, assigned })),
                Err(error) => tracing::warn!(%error, "an accepted connection could not be served"),
            },
        }
    }

    /// A peer that left before it was accepted is nobody's fault; anything else won't be better at once.
    async fn back_off(&self, error: &io::Error) {
        if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
            static FAILED: Repeated = Repeated::new();
            if let Some(times) = FAILED.due() {
                tracing::warn!(%error, times, "accept failed");
            }
            tokio::time::sleep(BACK_OFF).await;
        }
    }
}
