//! The app's ports that capture has found: each has an upstream of its own, on the loopback address that the app moved
//! to.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use serde::Serialize;
use tokio::sync::{Notify, watch};

use crate::config::UpstreamAddr;
use crate::drain::ledger::lock;
use crate::upstream::Upstream;

/// Limit on ports that one line names.
const MAX_NAMED: usize = 10;

/// What a captured port's connections are served as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    /// Not known yet: the first bytes of a connection decide, and the app may speak first.
    Unknown,
    /// The app has answered by HTTP here, so a silent client is an idle one.
    Http,
    /// The app speaks first here, or the port was declared not to be HTTP.
    Opaque,
}

/// Which captured port: its number, and which of those with this number. Under `run` an app may have several servers on
/// one port, each on an address of its own.
pub type PortId = (u16, u32);

/// A captured port.
#[derive(Debug)]
pub struct CapturedPort {
    /// Its number is the same for the app and its clients.
    pub id: PortId,
    /// The app.
    pub upstream: Arc<Upstream>,
    speaks: AtomicU8,
    /// The app has closed it for good, as far as its checks can tell.
    given_up: AtomicBool,
    /// Its listening sockets close for good.
    released: watch::Sender<bool>,
}

impl CapturedPort {
    /// Returns what has been learned of its connections.
    pub fn speaks(&self) -> Speaks {
        match self.speaks.load(Ordering::Relaxed) {
            0 => Speaks::Unknown,
            1 => Speaks::Http,
            _ => Speaks::Opaque,
        }
    }

    /// Notes what the app speaks. It is asked for each response, so it only writes once.
    pub fn learn(&self, speaks: Speaks) {
        if self.speaks() == Speaks::Unknown {
            self.speaks.store(speaks as u8, Ordering::Relaxed);
        }
    }

    /// Returns where the app listens.
    pub fn app(&self) -> UpstreamAddr {
        self.upstream.own()
    }

    /// Returns its number.
    pub fn number(&self) -> u16 {
        self.id.0
    }

    /// Whether the app listens at this address.
    pub fn is_at(&self, at: SocketAddr) -> bool {
        self.app().ip() == Some(at)
    }

    /// Whether the app has closed it for good.
    pub fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// The app listens on it after all.
    pub fn keep(&self) {
        self.given_up.store(false, Ordering::Relaxed);
    }

    /// Becomes true when its listening sockets have to close for good.
    pub fn released(&self) -> watch::Receiver<bool> {
        self.released.subscribe()
    }

    /// Begins to close its listening sockets for good.
    pub fn begin_release(&self) {
        self.released.send_replace(true);
    }

    /// Closes its listening sockets for good; returns once all of them have closed.
    pub async fn release(&self) {
        self.begin_release();
        self.released.closed().await;
    }

    /// Whether its listening sockets are closed, or about to.
    pub fn is_released(&self) -> bool {
        *self.released.borrow()
    }
}

/// All captured ports, and the bypassed ones.
#[derive(Debug, Default)]
pub struct CapturedPorts {
    ports: Mutex<BTreeMap<PortId, Arc<CapturedPort>>>,
    bypassed: Mutex<BTreeMap<SocketAddr, Bypass>>,
    settled: AtomicBool,
    /// Ports were given up.
    pub given_up: Notify,
    source: OnceLock<IpAddr>,
}

/// A port that the app opened and that capture does not protect: clients reach the app past us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BypassedPort {
    /// Where somebody listens.
    pub address: SocketAddr,
    /// Why it is bypassed.
    pub reason: Bypass,
    /// What to do about it.
    pub advice: &'static str,
}

/// Why a port is bypassed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bypass {
    /// The app has not moved: it makes its own system calls, or did not load the shim.
    NotMoved,
    /// The same under `lameduck run`.
    #[serde(rename = "not-moved")]
    NotMovedInRun,
    /// The app has moved, but the port is taken on the pod's address.
    Taken,
    /// The app has moved, but this process may not use ports below 1024.
    NotPermitted,
    /// The app has opened more ports than are captured.
    TooMany,
}

impl Bypass {
    /// Returns the value of the metric's label `reason`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotMoved | Self::NotMovedInRun => "not-moved",
            Self::Taken => "taken",
            Self::NotPermitted => "not-permitted",
            Self::TooMany => "too-many",
        }
    }

    fn is_not_moved(self) -> bool {
        matches!(self, Self::NotMoved | Self::NotMovedInRun)
    }

    /// Returns what it means and what to do about it.
    pub fn advice(self) -> &'static str {
        match self {
            Self::NotMoved => {
                "the app listens there itself: it is statically linked, or LD_PRELOAD was not read; connections to it are \
                 not drained. Give it a port by PORT with lameduck.dev/capture: port-env, or let it listen on 127.77.0.1"
            }
            Self::NotMovedInRun => {
                "the app listens there itself, which lameduck can't serve: it is statically linked, or LD_PRELOAD was not \
                 read; connections to it are not drained. Start lameduck with --app-port and this port: the app gets it \
                 as PORT, and lameduck serves it on --listen, PORT or :4880"
            }
            Self::Taken => "another program listens on the pod's address: give one of them another port",
            Self::TooMany => "the app has opened more than 256 ports: let --capture-as skip some",
            Self::NotPermitted => {
                "ports below 1024 need the sysctl net.ipv4.ip_unprivileged_port_start=0 in the pod"
            }
        }
    }
}

impl CapturedPorts {
    /// Sets the address that the app sees of clients from outside the pod.
    pub fn set_source(&self, ip: IpAddr) {
        let _ = self.source.set(ip);
    }

    /// Returns the address that the app sees of clients from outside the pod: one of the pod's own. By a loopback address
    /// the app would trust them, as MySQL's root@localhost or a status page for 127.0.0.1 only.
    pub fn source(&self) -> Option<IpAddr> {
        self.source.get().copied()
    }

    /// Returns the port whose app listens `at` this address, which is added if it is new. `threads`: the number of data-plane
    /// threads.
    pub fn add(&self, at: SocketAddr, speaks: Speaks, threads: usize) -> Arc<CapturedPort> {
        let (same, number) = (self.of(at.port()), at.port());
        if let Some(known) = same.iter().find(|port| port.is_at(at)) {
            return known.clone();
        }
        let id = (number, same.last().map_or(0, |last| last.id.1 + 1));
        let new = Arc::new(CapturedPort {
            id,
            upstream: Arc::new(Upstream::new(UpstreamAddr::from(at), threads)),
            speaks: AtomicU8::new(speaks as u8),
            given_up: AtomicBool::new(false),
            released: watch::Sender::new(false),
        });
        lock(&self.ports).insert(id, new.clone());
        new
    }

    /// Forgets a port.
    pub fn remove(&self, id: PortId) {
        lock(&self.ports).remove(&id);
    }

    /// Asks for the release of a port: its app has been away for long, while it listens on others.
    pub fn give_up(&self, at: &UpstreamAddr) {
        let port = self.all().into_iter().find(|port| port.app() == *at);
        if port.is_some_and(|port| !port.given_up.swap(true, Ordering::Relaxed)) {
            self.given_up.notify_one();
        }
    }

    /// Notes that the app has opened a port, or has had the time to.
    pub fn settle(&self) {
        self.settled.store(true, Ordering::Relaxed);
    }

    /// Whether the app has opened a port, or has had the time to: some apps serve nobody.
    pub fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }

    /// Returns a port.
    pub fn get(&self, id: PortId) -> Option<Arc<CapturedPort>> {
        lock(&self.ports).get(&id).cloned()
    }

    /// Returns those with this number.
    pub fn of(&self, number: u16) -> Vec<Arc<CapturedPort>> {
        lock(&self.ports).range((number, 0)..=(number, u32::MAX)).map(|(_, port)| port.clone()).collect()
    }

    /// Returns all ports, in order.
    pub fn all(&self) -> Vec<Arc<CapturedPort>> {
        lock(&self.ports).values().cloned().collect()
    }

    /// Notes that somebody listens at `address` and that we can't take its place. Returns whether that is new.
    pub fn bypass(&self, address: SocketAddr, reason: Bypass) -> bool {
        lock(&self.bypassed).insert(address, reason) != Some(reason)
    }

    /// Notes that a port is not bypassed.
    pub fn protect(&self, port: u16) {
        lock(&self.bypassed).retain(|address, _| address.port() != port);
    }

    /// Forgets the ports that have not moved and on which nobody listens any more.
    pub fn forget_unless(&self, listens: impl Fn(SocketAddr) -> bool) {
        lock(&self.bypassed).retain(|address, reason| !reason.is_not_moved() || listens(*address));
    }

    /// Returns the bypassed ports, in order.
    pub fn bypassed(&self) -> Vec<BypassedPort> {
        let port = |(address, reason): (&SocketAddr, &Bypass)| BypassedPort {
            address: *address,
            reason: *reason,
            advice: reason.advice(),
        };
        lock(&self.bypassed).iter().map(port).collect()
    }

    /// Returns one line for each reason for which ports are bypassed: which, why, and what to do. It is written where
    /// operators look first, the container's termination message.
    pub fn bypassed_lines(&self) -> String {
        let mut by_reason = BTreeMap::<_, Vec<u16>>::new();
        for BypassedPort { address, advice, .. } in self.bypassed() {
            by_reason.entry(advice).or_default().push(address.port());
        }
        let mut text = String::new();
        for (advice, mut ports) in by_reason {
            ports.sort_unstable();
            ports.dedup();
            let named: Vec<_> = ports.iter().take(MAX_NAMED).map(u16::to_string).collect();
            let (named, more) = (named.join(", "), ports.len().saturating_sub(MAX_NAMED));
            let _ = match ports.len() {
                1 => writeln!(text, "port {named} is bypassed: {advice}"),
                _ if more == 0 => writeln!(text, "ports {named} are bypassed: {advice}"),
                _ => writeln!(text, "ports {named} and {more} more are bypassed: {advice}"),
            };
        }
        text
    }

    /// Returns where the app itself listens on this port, past us; `None` for a port that it has not opened.
    pub fn app(&self, port: u16) -> Option<SocketAddr> {
        if let Some(known) = self.of(port).first() {
            return known.app().ip();
        }
        lock(&self.bypassed).keys().find(|address| address.port() == port).copied()
    }
}
