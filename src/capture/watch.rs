//! `--capture`: finds the ports that the app opens, and serves them under their own numbers.
//!
//! The shim in the app's process moves what it binds to 127.77.0.1, and says so to [`watch`](Capture::watch); the same
//! port on the pod's addresses is then ours. It is the kernel that is asked which ports these are: a word only makes us
//! ask. A port that did not move is left alone and reported, so that capture never breaks an app.

pub mod addresses;
pub mod sockets;

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::config::{APP_IP, CaptureProtocol, UpstreamAddr};
use crate::proxy::accept::listener::{Listeners, NewListener, bind};
use crate::proxy::accept::prepare::Service;
use crate::proxy::captured::{Bypass, Speaks};
use crate::proxy::shared::Shared;

/// When to look without a word, in seconds after the start: an app that doesn't load the shim says nothing. After the
/// last one only words count.
const LOOKS: [u64; 8] = [0, 1, 2, 5, 10, 20, 40, 60];

/// Captures ports for the lifetime of the process.
pub struct Capture {
    shared: Arc<Shared>,
    listeners: Listeners,
    /// Ports on which this process listens for other purposes.
    own: BTreeSet<u16>,
    /// Captured addresses.
    open: BTreeSet<SocketAddr>,
}

impl Capture {
    /// Captured ports are served by `listeners`.
    pub fn new(shared: Arc<Shared>, listeners: Listeners) -> Self {
        let own = shared.settings.own_addresses().map(|(_, addr)| addr.port()).collect();
        Self { shared, listeners, own, open: BTreeSet::new() }
    }

    /// Looks for ports at its start, some times after it, and whenever an app says that it listens.
    pub async fn watch(mut self) {
        let began = tokio::time::Instant::now();
        let looks = LOOKS.iter().map(|seconds| began + Duration::from_secs(*seconds));
        for next in looks {
            tokio::time::sleep_until(next).await;
            self.look();
        }
    }

    /// Serves the ports that have moved since the last look, and reports those that have not.
    pub fn look(&mut self) {
        let listening = sockets::listening();
        let moved = listening.iter().filter(|addr| addr.ip().to_canonical() == APP_IP);
        let moved: BTreeSet<u16> = moved.map(SocketAddr::port).collect();
        let addresses = addresses::addresses();
        for port in &moved {
            if self.rule(*port) != Some(CaptureProtocol::Skip) {
                self.capture(*port, &addresses);
            }
        }
        for addr in listening {
            let ip = addr.ip().to_canonical();
            let reachable = ip.is_unspecified() || (!ip.is_loopback() && addresses.contains(&ip));
            let ours = self.own.contains(&addr.port())
                || self.open.iter().any(|open| open.port() == addr.port())
                || self.rule(addr.port()) == Some(CaptureProtocol::Skip);
            if reachable && !ours && !moved.contains(&addr.port()) {
                self.bypassed(addr.port(), Bypass::NotMoved);
            }
        }
    }

    fn rule(&self, port: u16) -> Option<CaptureProtocol> {
        let rules = &self.shared.settings.capture.capture_port;
        rules.iter().find(|rule| rule.port == port).map(|rule| rule.protocol)
    }

    /// Listens on those addresses of a moved port on which we don't yet.
    fn capture(&mut self, port: u16, addresses: &[IpAddr]) {
        let new: Vec<_> = addresses.iter().map(|ip| SocketAddr::new(*ip, port)).collect();
        let new: Vec<_> = new.into_iter().filter(|addr| !self.open.contains(addr)).collect();
        if new.is_empty() {
            return;
        }
        let speaks = match self.rule(port) {
            Some(CaptureProtocol::Http) => Speaks::Http,
            Some(CaptureProtocol::Tcp) => Speaks::Opaque,
            Some(CaptureProtocol::Skip) | None => Speaks::Unknown,
        };
        let first = self.shared.captured.all().is_empty();
        self.shared.captured.add(port, speaks, self.shared.ledgers.len());
        if first {
            // The port that readiness and restarts are judged by.
            self.shared.upstream.be_at(UpstreamAddr::Tcp { host: APP_IP.to_string(), port });
        }
        let mut failed = None;
        for addr in new {
            match bind(addr, false) {
                Ok(listener) => {
                    self.open.insert(addr);
                    let (service, stays) = (Service::Captured(port), addr.ip().is_loopback());
                    self.listeners.add(NewListener { listener, service, stays });
                }
                Err(error) => failed = failed.or(why(&error)),
            }
        }
        match failed {
            None => {
                tracing::info!(port, "the app's port is captured");
                self.shared.captured.set_bypassed(port, None);
            }
            Some(bypass) => self.bypassed(port, bypass),
        }
    }

    fn bypassed(&self, port: u16, bypass: Bypass) {
        if self.shared.captured.set_bypassed(port, Some(bypass)) {
            tracing::warn!(port, reason = bypass.name(), "a port is bypassed: {}", bypass.advice());
        }
    }
}

/// Returns why a port is bypassed; `None` for an address that has just gone, which concerns nobody.
fn why(error: &io::Error) -> Option<Bypass> {
    match error.kind() {
        ErrorKind::AddrNotAvailable => None,
        ErrorKind::PermissionDenied => Some(Bypass::NotPermitted),
        _ => Some(Bypass::Taken),
    }
}
