//! `--capture`: finds the ports that the app opens, and serves them under their own numbers.
//!
//! We ask the kernel which ports these are: a word of the shim only makes us ask. A port that did not move is
//! left alone and reported, so that capture never breaks an app.

use std::collections::BTreeSet;
use std::future::pending;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::listeners::{is_mesh, ports};
use super::word::Words;
use crate::config::{APP_IP, CaptureProtocol};
use crate::drain::machine::Phase;
use crate::netlink;
use crate::proxy::accept::listener::{ListenerSender, NewListener, bind};
use crate::proxy::accept::prepare::Service;
use crate::proxy::captured::{Bypass, CapturedPort, Speaks};
use crate::proxy::shared::Shared;
use crate::repeated::ByReason;
use crate::termination_log;

/// When to look without a word, in seconds after the start: an app that doesn't load the shim says nothing. After the
/// last one only words count.
const LOOKS: [u64; 8] = [0, 1, 2, 5, 10, 20, 40, 60];

/// Limit on captured ports: each costs a listening socket per address.
const MAX_PORTS: usize = 256;
/// Shortest time between two looks at words.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Captures ports for the lifetime of the process.
pub struct Capture {
    shared: Arc<Shared>,
    listeners: ListenerSender,
    /// Captured addresses.
    open: BTreeSet<SocketAddr>,
    /// What was last written to the termination log.
    told: String,
}

impl Capture {
    /// Captured ports are served by `listeners`.
    pub fn new(shared: Arc<Shared>, listeners: ListenerSender) -> Self {
        Self { shared, listeners, open: BTreeSet::new(), told: String::new() }
    }

    /// Looks for ports at its start, some times after it, whenever an app says that it listens, and when a port is given
    /// up.
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
            let shared = self.shared.clone();
            tokio::select! {
                () = look => {
                    looks.next();
                    self.look().await;
                    if looks.peek().is_none() {
                        self.shared.captured.settle();
                    }
                }
                () = shared.captured.given_up.notified() => self.look().await,
                said = word => {
                    match (said, &words) {
                        (Ok(said), Some(words)) => {
                            self.look().await;
                            said.iter().for_each(|word| words.answer(word));
                        }
                        (Err(error), _) => warn("can't read what the app says of its ports", &error),
                        (Ok(_), None) => {}
                    }
                    // Any process of the pod can send words.
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
            }
        }
    }

    /// Serves the ports that have moved since the last look, releases those that were given up, and reports those that
    /// have not moved.
    async fn look(&mut self) {
        let (ports, addresses) = match (ports(), addresses()) {
            (Ok(ports), Ok(addresses)) => (ports, addresses),
            (Err(error), _) => return warn("can't ask the kernel which ports the app opens", &error),
            (_, Err(error)) => return warn("can't ask the kernel for the pod's addresses", &error),
        };
        if let Some(ip) = addresses.iter().find(|ip| ip.is_ipv4() && !ip.is_loopback()) {
            self.shared.captured.set_source(*ip);
        }
        for port in self.shared.captured.all().into_iter().filter(|port| port.is_given_up()) {
            match ports.moved.contains(&port.number) {
                true => port.keep(),
                false => self.release(&port).await,
            }
        }
        for port in &ports.moved {
            if self.rule(*port) != Some(CaptureProtocol::Skip) {
                self.capture(*port, &addresses);
            }
        }
        self.shared.captured.forget_unless(|address| ports.bypassed.contains(&address));
        let skipped = |port| {
            ports.moved.contains(&port) || self.rule(port) == Some(CaptureProtocol::Skip) || is_mesh(port)
        };
        for addr in ports.bypassed.iter().filter(|addr| !skipped(addr.port())) {
            self.bypassed(*addr, Bypass::NotMoved);
        }
        if !ports.moved.is_empty() || !self.shared.captured.bypassed().is_empty() {
            self.shared.captured.settle();
        }
        self.tell();
    }

    /// Writes the bypassed ports to the termination log, if they are others than before. A drain writes its own.
    fn tell(&mut self) {
        let lines = self.shared.captured.bypassed_lines();
        if lines != self.told && self.shared.phase() == Phase::Serving {
            termination_log::write(&self.shared.settings.termination_log, &lines);
            self.told = lines;
        }
    }

    /// Leaves a port that its app has closed for good: clients are refused, as without us.
    async fn release(&mut self, port: &CapturedPort) {
        port.release().await;
        self.open.retain(|addr| addr.port() != port.number);
        let captured = &self.shared.captured;
        captured.remove(port.number);
        captured.protect(port.number);
        tracing::info!(port = port.number, "the app has closed a port for good: it is released");
        if self.shared.upstream.addr() == port.app()
            && let Some(other) = captured.all().first()
        {
            self.shared.upstream.be_at(other.app());
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
        let captured = self.shared.captured.add(port, speaks, self.shared.ledgers.len());
        if first {
            // The port that `--ready-check` and the warm-up ask.
            self.shared.upstream.be_at(captured.app());
        }
        let mut failed = None;
        for addr in new {
            match bind(addr, false) {
                Ok(listener) => {
                    self.open.insert(addr);
                    let stays = addr.ip().is_loopback();
                    let service = Service::Captured { port, local: stays };
                    let released = Some(captured.released());
                    self.listeners.add(NewListener { listener, service, stays, released });
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

/// Any process of the pod can make us look, so the log is rate-limited.
fn warn(what: &'static str, error: &io::Error) {
    static FAILED: ByReason = ByReason::new();
    if let Some(times) = FAILED.due(what) {
        tracing::warn!(%error, times, "{what}");
    }
}

/// The addresses at which clients may reach the app. Of IPv4's loopback network others than 127.0.0.1 are the app's own
/// affair.
fn addresses() -> io::Result<Vec<IpAddr>> {
    let mut found = netlink::addresses()?;
    found.retain(|ip| {
        !ip.is_loopback() || [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()].contains(ip)
    });
    Ok(found)
}

/// Returns why a port is bypassed; `None` for an address that was just removed: there is nothing to report.
fn why(error: &io::Error) -> Option<Bypass> {
    match error.kind() {
        ErrorKind::AddrNotAvailable => None,
        ErrorKind::PermissionDenied => Some(Bypass::NotPermitted),
        _ => Some(Bypass::Taken),
    }
}
