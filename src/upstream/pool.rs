//! One thread's access to the app: chooses a server, and an idle connection or a new one.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpStream, UnixStream};

use super::attempt::attempt;
use super::backends::{Backend, ServerGuard, Set, Upstream};
use super::habits::KeepAlive;
use super::http2::{Connections, Lease};
use super::slots::{self, Slot};
use super::stream::{UpstreamReader, UpstreamSocket, UpstreamWriter, is_down, is_full, is_lost};
use crate::tls::stream::{Session, Tls};
use crate::tls::{HTTP1, HTTP2};

/// Time that idle connections are kept if the app doesn't say; Node closes its own after 5 s.
const DEFAULT_KEEP_ALIVE: Duration = Duration::from_secs(4);
/// Maximum time that idle connections are kept, whatever the app says, to save memory.
const MAX_KEEP_ALIVE: Duration = Duration::from_secs(60);
/// Subtracted from the app's timeout, which may start slightly before ours.
const KEEP_ALIVE_MARGIN: Duration = Duration::from_secs(1);
/// Maximum number of idle connections per thread.
const MAX_IDLE: usize = 1024;

/// A connection to one of the app's servers, counted there while it is in use.
#[derive(Debug)]
pub struct Connection {
    stream: UpstreamSocket,
    server: ServerGuard,
    slot: Slot,
}

impl Connection {
    /// Returns both halves, which can be used concurrently, and the server.
    pub fn split(&mut self) -> (UpstreamReader<'_>, UpstreamWriter<'_>, &Arc<Backend>) {
        let (reader, writer) = self.stream.split();
        (reader, writer, &self.server.backend)
    }

    /// Returns its server.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.server.backend
    }

    /// Returns the bare socket, still counted at its server.
    ///
    /// # Errors
    /// If the runtime doesn't release it.
    pub fn park(self) -> io::Result<ParkedConnection> {
        let Self { stream, server, slot } = self;
        let (socket, kind) = match stream {
            UpstreamSocket::Tcp(stream) => (stream.into_std()?.into(), SocketKind::Tcp),
            UpstreamSocket::Tls(stream) => {
                let (socket, session) = stream.rest()?;
                (socket.into(), SocketKind::Tls(session))
            }
            UpstreamSocket::Unix(stream) => (stream.into_std()?.into(), SocketKind::Unix),
        };
        Ok(ParkedConnection { socket, kind, server, slot })
    }
}

/// A connection without a task.
#[derive(Debug)]
pub struct ParkedConnection {
    socket: OwnedFd,
    kind: SocketKind,
    server: ServerGuard,
    slot: Slot,
}

/// The type of the socket.
#[derive(Debug)]
enum SocketKind {
    Tcp,
    Tls(Box<Session>),
    Unix,
}

impl ParkedConnection {
    /// Returns its server.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.server.backend
    }

    /// Makes it usable by a task again.
    ///
    /// # Errors
    /// If the runtime doesn't take it.
    pub fn unpark(self) -> io::Result<Connection> {
        let Self { socket, kind, server, slot } = self;
        let stream = match kind {
            SocketKind::Tcp => UpstreamSocket::Tcp(TcpStream::from_std(socket.into())?),
            SocketKind::Tls(session) => UpstreamSocket::Tls(Tls::go_on(socket.into(), session)?),
            SocketKind::Unix => UpstreamSocket::Unix(UnixStream::from_std(socket.into())?),
        };
        Ok(Connection { stream, server, slot })
    }
}

impl AsFd for ParkedConnection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[derive(Debug)]
struct IdleConnection {
    connection: Connection,
    until: Instant,
}

/// One thread's view of the servers, and its idle connections.
#[derive(Debug)]
pub struct Pool {
    upstream: Arc<Upstream>,
    thread: usize,
    version: Cell<u64>,
    set: RefCell<Set>,
    /// There is more than one server.
    several: Cell<bool>,
    idle: RefCell<VecDeque<IdleConnection>>,
    /// Where to begin the search, so that equally busy servers take turns.
    turn: Cell<usize>,
    http2: Rc<Connections>,
    /// Whether the app says how long it keeps a connection.
    pub keep_alive: KeepAlive,
    /// Maximum size of a response's head, in bytes.
    head: usize,
    source: Option<IpAddr>,
}

impl Pool {
    /// A pool for the thread with this index. `head`: maximum size of a response's head over HTTP/2, in bytes. `source`:
    /// address of this host that the app should see.
    pub fn new(upstream: Arc<Upstream>, thread: usize, head: usize, source: Option<IpAddr>) -> Self {
        let (version, set) = upstream.see(thread);
        Self {
            upstream,
            thread,
            version: Cell::new(version),
            several: Cell::new(set.len() > 1),
            set: RefCell::new(set),
            idle: RefCell::default(),
            turn: Cell::new(thread),
            http2: Rc::default(),
            keep_alive: KeepAlive::default(),
            head,
            source,
        }
    }

    /// Returns the servers that it chooses from.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Returns a live idle connection to the server with the fewest requests; of several the one that was used last.
    ///
    /// Without `surely` it may be one that the app has closed since the runtime last asked the kernel.
    pub fn take(&self, surely: bool) -> Option<Connection> {
        self.look();
        let now = Instant::now();
        let mut idle = self.idle.borrow_mut();
        let best = if self.several.get() { Some(self.best(&[])?) } else { None };
        loop {
            let mut newest = match &best {
                None => idle.pop_back()?,
                Some(best) => {
                    let fits = |idle: &IdleConnection| Arc::ptr_eq(&idle.connection.server.backend, best);
                    let newest = idle.iter().rposition(fits)?;
                    idle.remove(newest)?
                }
            };
            let stream = &mut newest.connection.stream;
            if newest.until > now && stream.is_alive() && (!surely || stream.is_quiet()) {
                newest.connection.server.set_busy(true);
                self.next_turn();
                return Some(newest.connection);
            }
        }
    }

    /// Opens a connection to the server with the fewest requests, or to another one if that is down.
    ///
    /// # Errors
    /// If no server accepts one; `NotFound` if there is no server.
    pub async fn connect(&self) -> io::Result<Connection> {
        let attempt = async |backend: &Arc<Backend>| self.attempt(backend, HTTP1).await;
        let ((stream, slot), server) = self.first_that_answers(attempt).await?;
        Ok(Connection { stream, server, slot })
    }

    /// Reserves one HTTP/2 stream to the server with the fewest requests, on a connection with room or a new one.
    ///
    /// # Errors
    /// As for [`Self::connect`]; `InvalidData` if the app doesn't speak HTTP/2.
    pub async fn lease(&self) -> io::Result<Lease> {
        let room = async |backend: &Arc<Backend>| {
            let connect = || self.attempt(backend, HTTP2);
            self.http2.room(backend, self.head, connect).await
        };
        self.first_that_answers(room).await.map(|(room, server)| Lease::new(room, server))
    }

    fn attempt(
        &self,
        backend: &Arc<Backend>,
        protocol: &'static [u8],
    ) -> impl Future<Output = io::Result<(UpstreamSocket, Slot)>> + use<> {
        attempt(self.upstream.clone(), backend.clone(), protocol, self.source)
    }

    async fn first_that_answers<T>(
        &self,
        attempt: impl AsyncFn(&Arc<Backend>) -> io::Result<T>,
    ) -> io::Result<(T, ServerGuard)> {
        let mut tried = Vec::new();
        let mut failed = io::Error::from(io::ErrorKind::NotFound);
        self.look();
        while let Some(backend) = self.best(&tried) {
            if tried.is_empty() {
                self.next_turn();
            }
            let server = ServerGuard::new(backend.clone(), self.thread);
            match attempt(&backend).await {
                Ok(reached) => {
                    backend.set_unhealthy(false);
                    return Ok((reached, server));
                }
                // Another server may work, whatever is wrong with this one; a full one is only busy.
                Err(error)
                    if is_down(&error) || is_lost(&error) || (self.several.get() && !is_full(&error)) =>
                {
                    backend.habit.forget();
                    failed = error;
                }
                Err(error) => return Err(error),
            }
            if self.several.get() {
                backend.set_unhealthy(true);
                self.idle.borrow_mut().retain(|idle| !Arc::ptr_eq(&idle.connection.server.backend, &backend));
            }
            tried.push(backend);
            self.look();
        }
        self.upstream.re_resolve.notify_one();
        Err(failed)
    }

    /// Whether this server's address no longer accepts connections.
    pub async fn has_left(&self, backend: &Arc<Backend>) -> bool {
        let again = self.attempt(backend, HTTP1).await;
        again.is_err_and(|error| is_down(&error) || is_lost(&error))
    }

    /// Returns the untried server with the fewest requests; unhealthy ones come last.
    fn best(&self, tried: &[Arc<Backend>]) -> Option<Arc<Backend>> {
        let set = self.set.borrow();
        let from = self.turn.get().checked_rem(set.len())?;
        let untried = |backend: &&Arc<Backend>| !tried.iter().any(|tried| Arc::ptr_eq(tried, backend));
        let inturn = set[from..].iter().chain(&set[..from]).filter(untried);
        inturn.min_by_key(|backend| (backend.is_unhealthy(), backend.in_flight())).cloned()
    }

    /// Once per request: a failed search for an idle connection and the new connection that follows use the same
    /// server.
    fn next_turn(&self) {
        self.turn.set(self.turn.get().wrapping_add(1));
    }

    /// Keeps a connection whose last response was read to its end. `timeout` is the app's `Keep-Alive: timeout=`.
    pub fn put(&self, mut connection: Connection, timeout: Option<Duration>) {
        self.keep_alive.learn(timeout);
        if connection.server.backend.is_gone() || slots::are_taken() {
            return;
        }
        let rest = match timeout {
            Some(timeout) => timeout.saturating_sub(KEEP_ALIVE_MARGIN).max(timeout / 2).min(MAX_KEEP_ALIVE),
            None => DEFAULT_KEEP_ALIVE,
        };
        connection.server.set_busy(false);
        let mut idle = self.idle.borrow_mut();
        if idle.len() == MAX_IDLE {
            idle.pop_front();
        }
        idle.push_back(IdleConnection { connection, until: Instant::now() + rest });
    }

    /// Closes connections that were idle for too long or that the app has closed.
    pub fn retire(&self) {
        self.look();
        let now = Instant::now();
        self.idle.borrow_mut().retain(|idle| idle.until > now && idle.connection.stream.is_quiet());
        self.http2.retire();
    }

    /// Closes all idle connections, so that an app which waits for them can exit.
    pub fn clear(&self) {
        self.look();
        self.idle.borrow_mut().clear();
        self.http2.clear();
    }

    /// Switches to the latest set of servers. Idle connections to other servers are closed.
    fn look(&self) {
        if self.version.get() == self.upstream.version() {
            return;
        }
        let (version, set) = self.upstream.see(self.thread);
        self.version.set(version);
        self.several.set(set.len() > 1);
        self.set.replace(set);
        self.idle.borrow_mut().retain(|idle| !idle.connection.server.backend.is_gone());
        self.http2.retire();
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};

    use super::*;
    use crate::config::UpstreamAddr;

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    fn named() -> UpstreamAddr {
        "app.test:80".parse().unwrap()
    }

    fn pool(addrs: &[SocketAddr]) -> (Arc<Upstream>, Pool) {
        let upstream = Arc::new(Upstream::new(named(), 1));
        upstream.switch(named(), addrs);
        (upstream.clone(), Pool::new(upstream, 0, 1 << 16, None))
    }

    fn load(upstream: &Upstream) -> Vec<u64> {
        upstream.servers().iter().map(|server| server.in_flight()).collect()
    }

    #[tokio::test]
    async fn the_server_with_the_fewest_requests_comes_first() {
        let ((_one, a), (_two, b)) = (listener(), listener());
        let (upstream, pool) = pool(&[a, b]);
        let mut busy = Vec::new();
        for _ in 0..6 {
            busy.push(pool.connect().await.unwrap());
        }
        assert_eq!(load(&upstream), [3, 3]);
        busy.retain(|connection| !connection.server.backend.at.to_string().contains(&b.to_string()));
        assert_eq!(load(&upstream), [3, 0]);
        // An idle connection is preferred to a new one, but only if it is to the least busy server.
        pool.put(busy.pop().unwrap(), None);
        assert!(pool.take(false).is_none(), "it leads to the busier one");
        for _ in 0..2 {
            busy.push(pool.connect().await.unwrap());
        }
        assert_eq!(load(&upstream), [2, 2]);
    }

    #[tokio::test]
    async fn requests_one_after_the_other_take_turns_and_use_what_rests() {
        let ((_one, a), (_two, b)) = (listener(), listener());
        let (_, pool) = pool(&[a, b]);
        let mut made = 0;
        for _ in 0..6 {
            let connection = match pool.take(false) {
                Some(rested) => rested,
                None => {
                    made += 1;
                    pool.connect().await.unwrap()
                }
            };
            pool.put(connection, None);
        }
        assert_eq!(made, 2, "one to each server");
    }

    #[tokio::test]
    async fn one_that_is_down_is_unhealthy_and_costs_nobody_a_request() {
        let ((alive, a), (dead, b)) = (listener(), listener());
        drop(dead);
        let (upstream, pool) = pool(&[a, b]);
        for _ in 0..4 {
            pool.connect().await.unwrap();
        }
        let unhealthy: Vec<_> = upstream.servers().iter().map(|server| server.is_unhealthy()).collect();
        assert_eq!(unhealthy, [false, true]);
        drop(alive);
        assert!(is_down(&pool.connect().await.unwrap_err()), "all are down");
    }

    #[test]
    fn a_new_server_beside_others_proves_first_that_it_answers() {
        let [old, new] = ["10.0.0.7:80", "10.0.0.8:80"].map(|addr| addr.parse().unwrap());
        let (upstream, pool) = pool(&[old]);
        upstream.switch(named(), &[old, new]);
        pool.look();
        let best = |pool: &Pool| pool.best(&[]).unwrap().at.to_string();
        assert!((0..9).all(|_| best(&pool) == "10.0.0.7:80"));
        upstream.switch(named(), &[new]);
        pool.look();
        assert_eq!(best(&pool), "10.0.0.8:80", "alone it is tried at once");
    }

    #[tokio::test]
    async fn what_leads_to_a_server_that_was_left_is_closed_and_no_longer_counted() {
        let ((_one, a), (_two, b)) = (listener(), listener());
        let (upstream, pool) = pool(&[a]);
        let (resting, busy) = (pool.connect().await.unwrap(), pool.connect().await.unwrap());
        pool.put(resting, None);
        let left = upstream.switch(named(), &[b]);
        assert!(!upstream.is_seen_by_all() && left[0].in_flight() == 1);
        assert!(pool.take(false).is_none() && upstream.is_seen_by_all());
        pool.put(busy, None);
        assert_eq!((left[0].in_flight(), pool.idle.borrow().len()), (0, 0));
        assert_eq!(pool.connect().await.unwrap().server.backend.at.to_string(), b.to_string());
    }

    #[test]
    fn the_app_is_told_by_its_address_but_not_on_loopback() {
        let (upstream, _pool) = pool(&["10.0.0.7:80".parse().unwrap(), "127.0.0.1:80".parse().unwrap()]);
        let is_app = |ip: &str| upstream.is_app(ip.parse().unwrap());
        assert!(is_app("10.0.0.7") && is_app("::ffff:10.0.0.7"));
        assert!(!is_app("10.0.0.8") && !is_app("127.0.0.1"));
    }

    #[test]
    fn a_look_up_for_a_name_that_was_left_changes_nothing() {
        let (upstream, _pool) = pool(&["10.0.0.7:80".parse().unwrap()]);
        let (name, addrs) = (("app.test".to_owned(), 80), vec!["10.0.0.9:80".parse().unwrap()]);
        upstream.switch("green.test:80".parse().unwrap(), &["10.0.0.8:80".parse().unwrap()]);
        upstream.resolved(&name, upstream.next_look_up(), addrs.clone());
        assert_eq!(upstream.servers()[0].at.to_string(), "10.0.0.8:80");
        upstream.switch(named(), &[]);
        upstream.resolved(&name, upstream.next_look_up(), addrs);
        assert_eq!(upstream.servers()[0].at.to_string(), "10.0.0.9:80");
    }

    #[test]
    fn an_answer_that_a_later_look_up_overtook_changes_nothing() {
        let (upstream, _pool) = pool(&[]);
        let name = ("app.test".to_owned(), 80);
        let [slow, quick] = [upstream.next_look_up(), upstream.next_look_up()];
        upstream.resolved(&name, quick, vec!["10.0.0.9:80".parse().unwrap()]);
        upstream.resolved(&name, slow, vec!["10.0.0.7:80".parse().unwrap()]);
        assert_eq!(upstream.servers()[0].at.to_string(), "10.0.0.9:80");
    }
}
