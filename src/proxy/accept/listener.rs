//! Listening sockets: one thread accepts connections and gives each to the thread with the fewest.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::sync::{mpsc, watch};

use super::prepare::{Accepted, Service};
use super::syn_drain::handshakes_end;
use crate::control::data_plane::Listeners;
use crate::drain::ledger::Assigned;
use crate::proxy::shared::Shared;
use crate::repeated::Repeated;

/// Length of the accept queue; the kernel limits it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
/// Delay after an accept that failed for lack of files or memory, and while there are too many connections.
const BACKOFF_DELAY: Duration = Duration::from_millis(50);

/// Opens a listening socket. `[::]` also accepts IPv4; without IPv6, `0.0.0.0` is used instead. `shared`: another
/// process of the same user may listen on the address too, and the kernel spreads new connections (SO_REUSEPORT,
/// socket(7)).
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
    /// The number of closed listening sockets.
    closed: watch::Sender<usize>,
    /// The number of all listening sockets.
    all: Arc<AtomicUsize>,
}

impl Default for Switch {
    /// A switch for listening sockets that do not accept yet.
    fn default() -> Self {
        Self { on: watch::Sender::new(true), closed: watch::Sender::new(0), all: Arc::default() }
    }
}

impl Switch {
    /// Counts one more listening socket.
    fn add(&self) {
        self.all.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts one less of those that are closed.
    fn remove(&self) {
        // In this order, so that none of the others looks closed in between.
        self.closed.send_modify(|closed| *closed -= 1);
        self.all.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Listeners for Switch {
    fn close(&self) {
        self.on.send_replace(false);
    }

    fn listen(&self) {
        self.on.send_replace(true);
    }

    fn is_listening(&self) -> bool {
        *self.closed.borrow() < self.all.load(Ordering::Acquire)
    }

    fn all_open(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let (mut on, mut closed) = (self.on.subscribe(), self.closed.subscribe());
        Box::pin(async move {
            tokio::select! {
                _ = closed.wait_for(|closed| *closed == 0) => {}
                _ = on.wait_for(|on| !*on) => {}
            }
        })
    }
}

/// A listening socket that is to be served.
pub struct NewListener {
    /// The socket.
    pub listener: TcpListener,
    /// What its connections are served as.
    pub service: Service,
    /// It stays open during a drain: it is on loopback, and running requests may call their own app.
    pub stays: bool,
    /// Becomes true when it has to close for good; without it, it never has to.
    pub released: Option<watch::Receiver<bool>>,
}

/// Hands listening sockets to the data plane, from any thread and at any time.
#[derive(Clone)]
pub struct ListenerSender {
    sender: mpsc::UnboundedSender<NewListener>,
    switch: Switch,
}

impl ListenerSender {
    /// The handle, and its other end for the data plane.
    pub fn new(switch: Switch) -> (Self, mpsc::UnboundedReceiver<NewListener>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self { sender, switch }, receiver)
    }

    /// Serves one more listening socket. During a drain it closes like the others.
    pub fn add(&self, new: NewListener) {
        if !new.stays {
            self.switch.add();
        }
        // Fails only when the data plane is gone, and the process with it.
        let _ = self.sender.send(new);
    }
}

/// Whether a listening socket is wanted.
struct Wanted {
    on: watch::Receiver<bool>,
    released: watch::Receiver<bool>,
}

impl Wanted {
    fn now(&self) -> bool {
        *self.on.borrow() && !*self.released.borrow()
    }

    /// Returns once it has to close.
    async fn off(&mut self) {
        tokio::select! {
            _ = self.on.wait_for(|on| !*on) => {}
            _ = self.released.wait_for(|released| *released) => {}
        }
    }

    /// Returns once it may be open; false if it never may again.
    async fn again(&mut self) -> bool {
        tokio::select! {
            biased;
            _ = self.released.wait_for(|released| *released) => false,
            on = self.on.wait_for(|on| *on) => on.is_ok(),
        }
    }
}

/// A connection on its way to its thread.
pub struct Given {
    /// The connection.
    pub accepted: Accepted<TcpStream>,
    /// Counts the connection for that thread until it arrives there.
    pub assigned: Assigned,
}

/// Accepts connections on the first thread and gives each to the thread with the fewest.
pub struct Acceptor {
    shared: Arc<Shared>,
    others: Vec<mpsc::UnboundedSender<Given>>,
    switch: Switch,
}

impl Acceptor {
    /// An acceptor for the first thread; the `others` get their connections through these channels.
    pub fn new(shared: Arc<Shared>, others: Vec<mpsc::UnboundedSender<Given>>, switch: Switch) -> Self {
        Self { shared, others, switch }
    }

    /// Accepts until it has to stop, then waits until it may listen again; returns if that will never be. `serve` gets
    /// this thread's connections; `on_closed` is called when the listening socket has closed.
    pub async fn run(
        self: Rc<Self>,
        NewListener { listener, service, stays, released }: NewListener,
        serve: impl Fn(Accepted<tokio::net::TcpStream>),
        on_closed: impl Fn(),
    ) {
        let (always, never) = (watch::Sender::new(true), watch::Sender::new(false));
        let on = if stays { always.subscribe() } else { self.switch.on.subscribe() };
        let mut wanted = Wanted { on, released: released.unwrap_or_else(|| never.subscribe()) };
        let addr = listener.local_addr();
        let mut listener = Some(listener);
        loop {
            if let Some(listener) = listener.take() {
                let closed = self.accept(listener, service, &serve, &mut wanted).await;
                if let Err(error) = closed {
                    tracing::error!(%error, "a listening socket failed");
                }
                if !stays {
                    self.switch.closed.send_modify(|closed| *closed += 1);
                }
                on_closed();
            }
            if !wanted.again().await {
                if !stays {
                    self.switch.remove();
                    on_closed();
                }
                return;
            }
            let shared = self.shared.settings.reuse_port;
            match addr.as_ref().map(|addr| bind(*addr, shared)) {
                Ok(Ok(again)) => {
                    if !stays {
                        self.switch.closed.send_modify(|closed| *closed -= 1);
                    }
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
        wanted: &mut Wanted,
    ) -> io::Result<()> {
        loop {
            listener = self.accept_until_off(listener, service, serve, wanted).await?;
            handshakes_end(&listener).await;
            if !wanted.now() {
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
        wanted: &mut Wanted,
    ) -> io::Result<TcpListener> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        loop {
            // Connections above the limit wait in the accept queue; a drain accepts them when it closes the socket.
            let full = self.is_full(service);
            tokio::select! {
                biased;
                () = wanted.off() => return listener.into_std(),
                () = tokio::time::sleep(BACKOFF_DELAY), if full => {}
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
                    // One bad connection must not stop those queued behind it.
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

    /// Whether the limit is reached. Handshakes have a lower limit because they cost more than connections.
    fn is_full(&self, service: Service) -> bool {
        if service == Service::Https && self.shared.tls.as_ref().is_some_and(|tls| tls.is_busy()) {
            return true;
        }
        self.shared.is_full()
    }

    /// Gives a connection to the thread with the fewest; this thread is the first.
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
        let local = matches!(service, Service::Captured { local: true, .. });
        let connected = if local { self.shared.local.connect() } else { self.shared.gate.connect() };
        let accepted = Accepted { stream, peer, service, connected };
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

    /// A peer that disconnected before the accept is no fault of ours; other errors won't go away at once, so this
    /// waits.
    async fn back_off(&self, error: &io::Error) {
        if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
            static FAILED: Repeated = Repeated::new();
            if let Some(times) = FAILED.due() {
                tracing::warn!(%error, times, "accept failed");
            }
            tokio::time::sleep(BACKOFF_DELAY).await;
        }
    }
}
