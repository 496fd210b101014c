//! The app's servers: the addresses of its name, the requests in flight at each, and which of them are unhealthy.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::habits::Habit;
use crate::config::UpstreamAddr;

/// One server of the app, at one of the addresses of the app's name.
#[derive(Debug)]
pub struct Backend {
    /// Its address.
    pub at: ServerAddr,
    /// Requests and tunnels in flight to it, counted per thread.
    busy: Box<[Counter]>,
    /// It is new beside others, or refused a connection: healthy servers are preferred.
    unhealthy: AtomicBool,
    /// Its readiness check is running.
    pub(super) asked: AtomicBool,
    /// The app's name no longer has it, or another upstream was chosen.
    gone: AtomicBool,
    /// The time within which its streams end, in milliseconds; `NO_STREAM_END` while they need not.
    streams_ms: AtomicU64,
    /// How it treats its connections.
    pub habit: Habit,
}

/// The address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerAddr {
    /// TCP. Several addresses only for `localhost`, which means one server on either loopback address.
    Tcp(Vec<SocketAddr>),
    /// TCP with TLS, and the name that its certificate must have.
    Tls(Vec<SocketAddr>, String),
    /// A unix socket.
    Unix(PathBuf),
}

/// On a cache line of its own, because a single thread writes to it.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counter(AtomicU64);

const NO_STREAM_END: u64 = u64::MAX;

impl Backend {
    fn new(at: ServerAddr, threads: usize) -> Self {
        Self {
            at,
            busy: (0..threads).map(|_| Counter::default()).collect(),
            unhealthy: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            streams_ms: AtomicU64::new(NO_STREAM_END),
            habit: Habit::default(),
        }
    }

    /// Returns the requests and tunnels in flight to it.
    pub fn in_flight(&self) -> u64 {
        self.busy.iter().map(|busy| busy.0.load(Ordering::Acquire)).sum()
    }

    /// Counts one more or one less in flight. Only `thread` writes to its counter, so a plain store suffices.
    pub(super) fn count(&self, thread: usize, more: bool) {
        let busy = &self.busy[thread].0;
        let now = busy.load(Ordering::Relaxed);
        busy.store(if more { now + 1 } else { now - 1 }, Ordering::Release);
    }

    /// Whether other servers are preferred because this one did not answer lately, or has not yet.
    pub fn is_unhealthy(&self) -> bool {
        self.unhealthy.load(Ordering::Relaxed)
    }

    pub(super) fn set_unhealthy(&self, unhealthy: bool) {
        if self.unhealthy.swap(unhealthy, Ordering::Relaxed) != unhealthy {
            tracing::info!(address = %self.at, "a server of the app {}", if unhealthy { "is down" } else { "answers" });
        }
    }

    /// Whether no new request goes there.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Ends its WebSockets and event streams, each at a random time within `spread`.
    pub fn end_streams(&self, spread: Duration) {
        self.streams_ms.store(spread.as_millis() as u64, Ordering::Release);
    }

    /// Returns the time within which its streams have to end; `None` if they need not.
    pub fn streams_end(&self) -> Option<Duration> {
        let ms = self.streams_ms.load(Ordering::Acquire);
        (ms != NO_STREAM_END).then(|| Duration::from_millis(ms))
    }

    /// Returns the addresses of a server on loopback, which other hosts can't reach; none for any other server.
    pub fn loopback(&self) -> &[SocketAddr] {
        match &self.at {
            ServerAddr::Tcp(addrs) | ServerAddr::Tls(addrs, _)
                if addrs.iter().all(|addr| addr.ip().is_loopback()) =>
            {
                addrs
            }
            _ => &[],
        }
    }

    fn is_at(&self, ip: IpAddr) -> bool {
        matches!(&self.at, ServerAddr::Tcp(addrs) | ServerAddr::Tls(addrs, _) if addrs.iter().any(|addr| addr.ip().to_canonical() == ip))
    }
}

impl fmt::Display for ServerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addrs) | Self::Tls(addrs, _) => write!(f, "{}", addrs[0]),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl ServerAddr {
    /// Returns the address in a form that can be connected to.
    pub fn to_addr(&self) -> UpstreamAddr {
        match self {
            Self::Tcp(addrs) => UpstreamAddr::Tcp { host: addrs[0].ip().to_string(), port: addrs[0].port() },
            Self::Tls(addrs, name) => UpstreamAddr::Tls {
                host: addrs[0].ip().to_string(),
                port: addrs[0].port(),
                name: name.clone(),
            },
            Self::Unix(path) => UpstreamAddr::Unix(path.clone()),
        }
    }

    /// Returns the address if no name has to be resolved.
    pub(super) fn known(addr: &UpstreamAddr) -> Option<Self> {
        if let UpstreamAddr::Unix(path) = addr {
            return Some(Self::Unix(path.clone()));
        }
        let (host, port) = addr.host_and_port()?;
        match host.parse() {
            Ok(ip) => Some(Self::of(addr, vec![SocketAddr::new(ip, port)])),
            // Always loopback (RFC 6761 §6.3).
            Err(_) if host == "localhost" => {
                let both: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
                Some(Self::of(addr, both.map(|ip| SocketAddr::new(ip, port)).into()))
            }
            Err(_) => None,
        }
    }

    /// The server at these addresses.
    fn of(addr: &UpstreamAddr, at: Vec<SocketAddr>) -> Self {
        match addr {
            UpstreamAddr::Tls { name, .. } => Self::Tls(at, name.clone()),
            _ => Self::Tcp(at),
        }
    }
}

/// The servers to choose from.
pub type Set = Arc<[Arc<Backend>]>;

/// The app's address, shared by all threads. They read the version each time, and the rest only when it has changed.
#[derive(Debug)]
pub struct Upstream {
    version: AtomicU64,
    state: Mutex<UpstreamState>,
    /// The version that each thread uses.
    seen: Box<[AtomicU64]>,
    /// The number of lookups begun.
    look_ups: AtomicU64,
    /// A connection failed: the name may have another address now.
    pub(super) re_resolve: Notify,
}

#[derive(Debug)]
struct UpstreamState {
    /// `--upstream`, or the address `run` gave its app: the address unless another one was chosen.
    own: UpstreamAddr,
    addr: UpstreamAddr,
    set: Set,
    /// No longer chosen, but perhaps still busy.
    old: Vec<Arc<Backend>>,
    /// The number of the lookup that produced the set.
    look_up: u64,
}

impl Upstream {
    /// The app at `addr`, for `threads` threads. A name has no server before its first lookup.
    pub fn new(addr: UpstreamAddr, threads: usize) -> Self {
        let at = ServerAddr::known(&addr);
        let set = at.into_iter().map(|at| Arc::new(Backend::new(at, threads))).collect();
        Self {
            version: AtomicU64::new(1),
            state: Mutex::new(UpstreamState { own: addr.clone(), addr, set, old: Vec::new(), look_up: 0 }),
            seen: (0..threads).map(|_| AtomicU64::new(0)).collect(),
            look_ups: AtomicU64::new(0),
            re_resolve: Notify::new(),
        }
    }

    /// Returns the current address, unresolved.
    pub fn addr(&self) -> UpstreamAddr {
        self.state().addr.clone()
    }

    /// Returns the address that applies unless another one is chosen.
    pub fn own(&self) -> UpstreamAddr {
        self.state().own.clone()
    }

    /// Replaces the app's own address, before anything has been served.
    pub fn be_at(&self, addr: UpstreamAddr) {
        self.state().own = addr.clone();
        self.switch(addr, &[]);
    }

    /// Returns the servers that new requests go to.
    pub fn servers(&self) -> Set {
        self.state().set.clone()
    }

    /// Returns the name and port to look up; `None` if no lookup is needed.
    pub(super) fn name(&self) -> Option<(String, u16)> {
        match self.addr() {
            addr if ServerAddr::known(&addr).is_some() => None,
            addr => addr.host_and_port().map(|(host, port)| (host.to_owned(), port)),
        }
    }

    /// Begins a lookup; returns its number.
    pub(super) fn next_look_up(&self) -> u64 {
        self.look_ups.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Sets the addresses of a name, unless a lookup that began later has already set them. Servers that remain keep
    /// their counts.
    pub(super) fn resolved(&self, name: &(String, u16), look_up: u64, mut addrs: Vec<SocketAddr>) {
        addrs.sort();
        addrs.dedup();
        let mut state = self.state();
        let asked = state.addr.host_and_port() == Some((&name.0, name.1));
        let at = at_each(&state.addr, &addrs);
        let same = state.set.iter().map(|backend| &backend.at).eq(&at);
        if !asked || look_up < state.look_up {
            return;
        }
        state.look_up = look_up;
        if same {
            return;
        }
        let list = addrs.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(" ");
        tracing::info!(addresses = list, "{} has {} address(es)", name.0, addrs.len());
        self.choose(&mut state, at);
    }

    /// Sends new requests to `addr`; `addrs` are its resolved addresses. Returns the servers no longer used.
    pub fn switch(&self, addr: UpstreamAddr, addrs: &[SocketAddr]) -> Vec<Arc<Backend>> {
        let mut state = self.state();
        let at = ServerAddr::known(&addr).map_or_else(|| at_each(&addr, addrs), |at| vec![at]);
        state.addr = addr;
        state.look_up = self.next_look_up();
        self.choose(&mut state, at);
        state.old.clone()
    }

    fn choose(&self, state: &mut UpstreamState, at: Vec<ServerAddr>) {
        let threads = self.seen.len();
        let known = |at: &ServerAddr| state.set.iter().find(|backend| backend.at == *at).cloned();
        let some_stay = at.iter().any(|at| known(at).is_some());
        let chosen = |at: ServerAddr| {
            known(&at).unwrap_or_else(|| {
                let new = Backend::new(at, threads);
                // It may still be booting: while there are others, it has to pass a readiness check first.
                new.unhealthy.store(some_stay, Ordering::Relaxed);
                Arc::new(new)
            })
        };
        let set: Set = at.into_iter().map(chosen).collect();
        state.old.retain(|old| old.in_flight() > 0);
        for left in state.set.iter().filter(|left| !set.iter().any(|kept| Arc::ptr_eq(kept, left))) {
            left.gone.store(true, Ordering::Release);
            state.old.push(left.clone());
        }
        state.set = set;
        // Check new servers beside others now.
        self.re_resolve.notify_one();
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Whether a client at this address is the app itself, or a host that shares the address with it (through NAT, or
    /// in the same network namespace). False on loopback, where any process could be the client.
    pub fn is_app(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        let state = self.state();
        let old = state.old.iter().filter(|old| old.in_flight() > 0);
        !ip.is_loopback() && state.set.iter().chain(old).any(|backend| backend.is_at(ip))
    }

    /// Whether [`Upstream::is_app`] can tell.
    pub fn tells_app(&self) -> bool {
        let told = |backend: &Arc<Backend>| match &backend.at {
            ServerAddr::Tcp(addrs) | ServerAddr::Tls(addrs, _) => {
                addrs.iter().all(|addr| !addr.ip().to_canonical().is_loopback())
            }
            ServerAddr::Unix(_) => false,
        };
        self.state().set.iter().all(told)
    }

    /// Whether every thread uses the latest set: nothing new goes to a server that was dropped.
    pub fn is_seen_by_all(&self) -> bool {
        let version = self.version.load(Ordering::Acquire);
        self.seen.iter().all(|seen| seen.load(Ordering::Acquire) == version)
    }

    /// Returns the version that a thread must have seen.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Relaxed)
    }

    /// Returns the set and its version, which this thread uses from now on.
    pub(super) fn see(&self, thread: usize) -> (u64, Set) {
        let state = self.state();
        let version = self.version.load(Ordering::Acquire);
        self.seen[thread].store(version, Ordering::Release);
        (version, state.set.clone())
    }

    fn state(&self) -> MutexGuard<'_, UpstreamState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn at_each(addr: &UpstreamAddr, addrs: &[SocketAddr]) -> Vec<ServerAddr> {
    addrs.iter().map(|at| ServerAddr::of(addr, vec![*at])).collect()
}
/// Counts one request at a server while the server is busy with it.
#[derive(Debug)]
pub struct ServerGuard {
    /// The server.
    pub backend: Arc<Backend>,
    thread: usize,
    busy: bool,
}

impl ServerGuard {
    /// A guard for a busy server.
    pub fn new(backend: Arc<Backend>, thread: usize) -> Self {
        let mut guard = Self { backend, thread, busy: false };
        guard.set_busy(true);
        guard
    }

    /// Starts or stops counting while the connection is kept.
    pub fn set_busy(&mut self, busy: bool) {
        if self.busy != busy {
            self.busy = busy;
            self.backend.count(self.thread, busy);
        }
    }
}

impl Drop for ServerGuard {
    fn drop(&mut self) {
        self.set_busy(false);
    }
}
