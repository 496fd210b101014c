//! The app's ports that capture has found: each has an upstream of its own, on the loopback address that the app moved
//! to.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use serde::Serialize;

use crate::config::{APP_IP, UpstreamAddr};
use crate::drain::ledger::lock;
use crate::upstream::Upstream;

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

/// A captured port.
#[derive(Debug)]
pub struct CapturedPort {
    /// Its number, the same for the app and its clients.
    pub number: u16,
    /// The app.
    pub upstream: Arc<Upstream>,
    speaks: AtomicU8,
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
}

/// All captured ports, and the bypassed ones.
#[derive(Debug, Default)]
pub struct CapturedPorts {
    ports: Mutex<BTreeMap<u16, Arc<CapturedPort>>>,
    bypassed: Mutex<BTreeMap<SocketAddr, BypassedPort>>,
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
            Self::NotMoved => "not-moved",
            Self::Taken => "taken",
            Self::NotPermitted => "not-permitted",
            Self::TooMany => "too-many",
        }
    }

    /// Returns what it means and what to do about it.
    pub fn advice(self) -> &'static str {
        match self {
            Self::NotMoved => {
                "the app listens there itself: it is statically linked, or LD_PRELOAD was not read; connections to it are \
                 not drained. Give it a port by PORT with lameduck.dev/capture: port-env, or let it listen on 127.77.0.1"
            }
            Self::Taken => "another program listens on the pod's address: give one of them another port",
            Self::TooMany => "the app has opened more than 256 ports: let --capture-as skip some",
            Self::NotPermitted => {
                "ports below 1024 need the sysctl net.ipv4.ip_unprivileged_port_start=0 in the pod"
            }
        }
    }
}

/// Returns how to reach a listener from here. One on all addresses may be of one family only, and `localhost` means
/// either loopback address.
pub fn from_here(listener: SocketAddr) -> UpstreamAddr {
    let ip = listener.ip();
    let host = if ip.is_unspecified() { "localhost".to_owned() } else { ip.to_string() };
    UpstreamAddr::Tcp { host, port: listener.port() }
}

impl CapturedPorts {
    /// Adds a port; one that is known already keeps its upstream. `threads`: the number of data-plane threads.
    pub fn add(&self, number: u16, speaks: Speaks, threads: usize) -> Arc<CapturedPort> {
        let mut ports = lock(&self.ports);
        let new = || {
            let addr = UpstreamAddr::Tcp { host: APP_IP.to_string(), port: number };
            let upstream = Arc::new(Upstream::new(addr, threads));
            Arc::new(CapturedPort { number, upstream, speaks: AtomicU8::new(speaks as u8) })
        };
        ports.entry(number).or_insert_with(new).clone()
    }

    /// Returns a port.
    pub fn get(&self, number: u16) -> Option<Arc<CapturedPort>> {
        lock(&self.ports).get(&number).cloned()
    }

    /// Returns all ports, in order.
    pub fn all(&self) -> Vec<Arc<CapturedPort>> {
        lock(&self.ports).values().cloned().collect()
    }

    /// Notes that somebody listens at `address` and that we can't take its place. Returns whether that is new.
    pub fn bypass(&self, address: SocketAddr, reason: Bypass) -> bool {
        let port = BypassedPort { address, reason, advice: reason.advice() };
        lock(&self.bypassed).insert(address, port) != Some(port)
    }

    /// Notes that a port is not bypassed.
    pub fn protect(&self, port: u16) {
        lock(&self.bypassed).retain(|address, _| address.port() != port);
    }

    /// Forgets the ports that have not moved and on which nobody listens any more.
    pub fn forget_unless(&self, listens: impl Fn(SocketAddr) -> bool) {
        lock(&self.bypassed).retain(|address, port| port.reason != Bypass::NotMoved || listens(*address));
    }

    /// Returns the bypassed ports, in order.
    pub fn bypassed(&self) -> Vec<BypassedPort> {
        lock(&self.bypassed).values().copied().collect()
    }

    /// Returns where the app itself listens on this port, past us; `None` for a port that it has not opened.
    pub fn app(&self, port: u16) -> Option<SocketAddr> {
        if self.get(port).is_some() {
            return Some((APP_IP, port).into());
        }
        lock(&self.bypassed).keys().find(|address| address.port() == port).copied()
    }
}
