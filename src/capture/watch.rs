//! `--capture`: finds the ports that the app opens, and serves them under their own numbers.
//!
//! We ask the kernel which ports these are: a word of the shim only makes us ask. A port that did not move is
//! left alone and reported, so that capture never breaks an app.

use std::collections::BTreeSet;
use std::future::pending;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::addresses::addresses;
use super::listeners::ports;
use super::word::Words;
use crate::config::{APP_IP, CaptureProtocol, UpstreamAddr};
use crate::proxy::accept::listener::{ListenerSender, NewListener, bind};
use crate::proxy::accept::prepare::Service;
use crate::proxy::captured::{Bypass, Speaks, from_here};
use crate::proxy::shared::Shared;

/// When to look without a word, in seconds after the start: an app that doesn't load the shim says nothing. After the
/// last one only words count.
const LOOKS: [u64; 8] = [0, 1, 2, 5, 10, 20, 40, 60];

/// Limit on captured ports: each costs a listening socket per address, and remains until the process ends, as its app
/// may come back.
const MAX_PORTS: usize = 256;
/// Shortest time between two looks at words.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Captures ports for the lifetime of the process.
pub struct Capture {
    shared: Arc<Shared>,
    listeners: ListenerSender,
    /// Captured addresses.
    open: BTreeSet<SocketAddr>,
}

impl Capture {
    /// Captured ports are served by `listeners`.
    pub fn new(shared: Arc<Shared>, listeners: ListenerSender) -> Self {
        Self { shared, listeners, open: BTreeSet::new() }
    }

    /// Looks for ports at its start, some times after it, and whenever an app says that it listens.
    pub async fn watch(mut self) {
        let words = match Words::bind() {
            Ok(words) => Some(words),
            Err(error) => {
                tracing::error!(%error, "the app can't say that it listens: another lameduck captures its ports");
                None
            }
        };
        let began = Instant::now();
        let mut looks = LOOKS.into_iter().map(|seconds| began + Duration::from_secs(seconds)).peekable();
        loop {
            let look = async {
                match looks.peek() {
                    Some(next) => sleep_until(*next).await,
                    None => pending().await,
                }
            };
            let word = async {
                match &words {
                    Some(words) => words.next().await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = look => {
                    looks.next();
                    self.look();
                }
                said = word => {
                    match (said, &words) {
                        (Ok(said), Some(words)) => {
                            self.look();
                            said.iter().for_each(|word| words.answer(word));
                        }
                        (Err(error), _) => tracing::warn!(%error, "can't read what the app says of its ports"),
                        (Ok(_), None) => {}
                    }
                    // Any process of the pod can send words.
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
            }
        }
    }

    /// Serves the ports that have moved since the last look, and reports those that have not.
    fn look(&mut self) {
        let ports = match ports() {
            Ok(ports) => ports,
            Err(error) => {
                tracing::warn!(%error, "can't ask the kernel which ports the app opens");
                return;
            }
        };
        let addresses = addresses();
        for port in &ports.moved {
            if self.rule(*port) != Some(CaptureProtocol::Skip) {
                self.capture(*port, &addresses);
            }
        }
        self.shared.captured.forget_unless(|address| ports.bypassed.contains(&address));
        let skipped = |port| ports.moved.contains(&port) || self.rule(port) == Some(CaptureProtocol::Skip);
        for addr in ports.bypassed.iter().filter(|addr| !skipped(addr.port())) {
            self.bypassed(*addr, Bypass::NotMoved);
        }
        self.judge_by_bypassed();
    }

    /// Lets a bypassed port say whether the app is up, if nothing is captured: such a pod gets ready as any other.
    fn judge_by_bypassed(&self) {
        let bypassed = self.shared.captured.bypassed();
        let unmoved = bypassed.iter().find(|port| port.reason == Bypass::NotMoved);
        if let (Some(port), []) = (unmoved, &self.shared.captured.all()[..]) {
            let addr = from_here(port.address);
            if self.shared.upstream.addr() != addr {
                self.shared.upstream.be_at(addr);
            }
        }
    }

    fn rule(&self, port: u16) -> Option<CaptureProtocol> {
        let rules = &self.shared.settings.capture.capture_as;
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
        let captured = self.shared.captured.all();
        if captured.len() >= MAX_PORTS && captured.iter().all(|known| known.number != port) {
            return self.bypassed(SocketAddr::new(APP_IP.into(), port), Bypass::TooMany);
        }
        let first = captured.is_empty();
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
                    let stays = addr.ip().is_loopback();
                    let service = Service::Captured { port, local: stays };
                    self.listeners.add(NewListener { listener, service, stays });
                }
                Err(error) => failed = failed.or(why(&error).map(|reason| (addr, reason))),
            }
        }
        match failed {
            None => {
                tracing::info!(port, "the app's port is captured");
                self.shared.captured.protect(port);
            }
            Some((addr, reason)) => self.bypassed(addr, reason),
        }
    }

    fn bypassed(&self, address: SocketAddr, reason: Bypass) {
        if self.shared.captured.bypass(address, reason) {
            let port = address.port();
            tracing::warn!(port, %address, reason = reason.name(), "a port is bypassed: {}", reason.advice());
        }
    }
}

/// Returns why a port is bypassed; `None` for an address that was just removed: there is nothing to report.
fn why(error: &io::Error) -> Option<Bypass> {
    match error.kind() {
        ErrorKind::AddrNotAvailable => None,
        ErrorKind::PermissionDenied => Some(Bypass::NotPermitted),
        _ => Some(Bypass::Taken),
    }
}
