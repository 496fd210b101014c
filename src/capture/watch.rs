//! `--capture` and `lameduck run`: finds the ports that the app opens, and serves them under their own numbers.
//!
//! We ask the kernel which ports these are: a word of the shim only makes us ask. A port that did not move is
//! left alone and reported, so that capture never breaks an app.

use std::collections::BTreeSet;
use std::future::pending;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::addresses::addresses;
use super::listeners::{Ports, ports};
use super::place::Place;
use super::run::Run;
use super::word::Words;
use crate::config::CaptureProtocol;
use crate::proxy::accept::listener::{ListenerSender, NewListener, bind};
use crate::proxy::accept::prepare::Service;
use crate::proxy::captured::{Bypass, Speaks};
use crate::proxy::shared::Shared;

/// When to look without a word, in seconds after the start: an app that doesn't load the shim says nothing. After the
/// last one only words count.
const LOOKS: [u64; 7] = [1, 2, 5, 10, 20, 40, 60];

/// Limit on captured ports: each costs a listening socket per address, and remains until the process ends, as its app
/// may come back.
const MAX_PORTS: usize = 256;
/// Shortest time between two looks for an app that `lameduck run` has not found yet.
const FIRST_LOOKS: Duration = Duration::from_millis(50);
/// Shortest time between two looks at words.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Whose ports are captured.
enum Whose {
    /// Everybody's in this network namespace; without words if another lameduck gets them.
    Pod(Option<Words>),
    /// Those of the app of `lameduck run`.
    Run(Run),
}

impl Whose {
    fn words(&self) -> Option<&Words> {
        match self {
            Self::Pod(words) => words.as_ref(),
            Self::Run(run) => Some(&run.words),
        }
    }

    fn place(&self) -> Place {
        match self {
            Self::Pod(_) => Place::Pod,
            Self::Run(run) => run.place,
        }
    }

    /// How long to wait until the next look without a word; `None` is for ever. `LOOKS` that are over are in the past.
    fn next_look(&self, since: Duration) -> Option<Duration> {
        match self {
            Self::Run(run) if !run.has_found() => {
                Some((since / 8).clamp(FIRST_LOOKS, Duration::from_secs(1)))
            }
            _ => {
                let next = LOOKS.into_iter().map(Duration::from_secs).find(|at| *at > since)?;
                Some(next.saturating_sub(since))
            }
        }
    }
}

/// Captures ports for the lifetime of the process.
pub struct Capture {
    shared: Arc<Shared>,
    listeners: ListenerSender,
    whose: Whose,
    /// Captured addresses.
    open: BTreeSet<SocketAddr>,
}

impl Capture {
    /// Captures the ports of a pod; they are served by `listeners`. Needs a tokio runtime.
    pub fn of_pod(shared: Arc<Shared>, listeners: ListenerSender) -> Self {
        let words = Words::bind(Place::Pod).inspect_err(|error| {
            tracing::error!(%error, "the app can't say that it listens: another lameduck captures its ports");
        });
        Self { shared, listeners, whose: Whose::Pod(words.ok()), open: BTreeSet::new() }
    }

    /// Captures the ports of the app of this run.
    pub fn of_run(shared: Arc<Shared>, listeners: ListenerSender, run: Run) -> Self {
        Self { shared, listeners, whose: Whose::Run(run), open: BTreeSet::new() }
    }

    /// Looks for ports at its start, some times after it, and whenever an app says that it listens.
    pub async fn watch(mut self) {
        let began = Instant::now();
        self.look();
        loop {
            let next = self.whose.next_look(began.elapsed());
            let look = async {
                match next {
                    Some(next) => tokio::time::sleep(next).await,
                    None => pending().await,
                }
            };
            let word = async {
                match self.whose.words() {
                    Some(words) => words.next().await,
                    None => pending().await,
                }
            };
            let said = tokio::select! {
                () = look => None,
                said = word => Some(said),
            };
            match said {
                None => drop(self.look()),
                Some(Ok(said)) => {
                    let refused = self.look();
                    let words = self.whose.words();
                    said.iter().for_each(|word| {
                        if let Some(words) = words {
                            words.answer(word, refused.contains(&word.port));
                        }
                    });
                    // Any process can send words.
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
                Some(Err(error)) => {
                    tracing::warn!(%error, "can't read what the app says of its ports");
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
            }
        }
    }

    /// Serves the ports that have moved since the last look, and reports those that have not. Returns those that the app
    /// can't have because another program does; in a pod they are bypassed instead.
    fn look(&mut self) -> BTreeSet<u16> {
        let seen = match &self.whose {
            Whose::Pod(_) => ports().map(|ports| (ports, vec![])),
            Whose::Run(run) => run.ports(),
        };
        let (mut ports, listening) = match seen {
            Ok(seen) => seen,
            Err(error) => {
                tracing::warn!(%error, "can't ask the kernel which ports the app opens");
                return BTreeSet::new();
            }
        };
        let addresses = addresses();
        let mut refused = BTreeSet::new();
        for at in &ports.moved {
            if self.rule(at.port()) == Some(CaptureProtocol::Skip) {
                continue;
            }
            let asked = self.whose.place().asked(at.ip()).map(|asked| asked.of(&addresses));
            if !self.capture(*at, &asked.unwrap_or_default(), &ports) {
                refused.insert(at.port());
            }
        }
        self.shared.captured.forget_unless(|address| ports.bypassed.contains(&address));
        let moved = |port| ports.moved.iter().any(|at| at.port() == port);
        let skipped = |port| moved(port) || self.rule(port) == Some(CaptureProtocol::Skip);
        let reason = match self.whose {
            Whose::Pod(_) => Bypass::NotMoved,
            Whose::Run(_) => Bypass::NotMovedInRun,
        };
        for addr in ports.bypassed.iter().filter(|addr| !skipped(addr.port())) {
            self.bypassed(*addr, reason);
        }
        if let Whose::Run(run) = &mut self.whose {
            ports.moved.retain(|at| !refused.contains(&at.port()));
            run.publish(&ports, &listening);
        }
        refused
    }

    fn rule(&self, port: u16) -> Option<CaptureProtocol> {
        let rules = &self.shared.settings.capture.capture_as;
        rules.iter().find(|rule| rule.port == port).map(|rule| rule.protocol)
    }

    /// Listens on those addresses of a moved port on which we don't yet. Returns false if the app can't have it.
    fn capture(&mut self, at: SocketAddr, addresses: &[IpAddr], ports: &Ports) -> bool {
        let port = at.port();
        let all: Vec<_> = addresses.iter().map(|ip| SocketAddr::new(*ip, port)).collect();
        if let (Some(known), Whose::Run(_)) = (self.shared.captured.get(port), &self.whose)
            && let Some(own) = known.upstream.own().ip().filter(|own| *own != at)
        {
            if !ports.moved.contains(&own) {
                // It came back on another address.
                known.upstream.be_at(at.into());
            } else if let Some(addr) = all.iter().find(|addr| self.open.contains(addr)) {
                return refuse(*addr, Bypass::Taken);
            }
        }
        let new: Vec<_> = all.into_iter().filter(|addr| !self.open.contains(addr)).collect();
        let captured = self.shared.captured.all();
        let is_known = captured.iter().any(|known| known.number == port);
        if new.is_empty() {
            return is_known;
        }
        if captured.len() >= MAX_PORTS && !is_known {
            self.bypassed(at, Bypass::TooMany);
            return true;
        }
        let (mut bound, mut failed) = (Vec::new(), None);
        for addr in new {
            match bind(addr, false) {
                Ok(listener) => bound.push((addr, listener)),
                Err(error) => failed = failed.or(why(&error).map(|reason| (addr, reason))),
            }
        }
        if let (Some((addr, reason)), Whose::Run(_)) = (failed, &self.whose) {
            return refuse(addr, reason);
        }
        self.serve(at, bound, captured.is_empty());
        match failed {
            None => {
                tracing::info!(port, "the app's port is captured");
                self.shared.captured.protect(port);
            }
            Some((addr, reason)) => self.bypassed(addr, reason),
        }
        true
    }

    fn serve(&mut self, at: SocketAddr, bound: Vec<(SocketAddr, TcpListener)>, first: bool) {
        let port = at.port();
        let speaks = match self.rule(port) {
            Some(CaptureProtocol::Http) => Speaks::Http,
            Some(CaptureProtocol::Tcp) => Speaks::Opaque,
            Some(CaptureProtocol::Skip) | None => Speaks::Unknown,
        };
        self.shared.captured.add(at, speaks, self.shared.ledgers.len());
        let in_pod = self.whose.place() == Place::Pod;
        if first && in_pod {
            // The port that readiness and restarts are judged by.
            self.shared.upstream.be_at(at.into());
        }
        for (addr, listener) in bound {
            self.open.insert(addr);
            // In a pod clients on loopback are parts of the pod. Elsewhere they are clients like any other.
            let stays = in_pod && addr.ip().is_loopback();
            let service = Service::Captured { port, local: stays };
            self.listeners.add(NewListener { listener, service, stays });
        }
    }

    fn bypassed(&self, address: SocketAddr, reason: Bypass) {
        if self.shared.captured.bypass(address, reason) {
            let port = address.port();
            tracing::warn!(port, %address, reason = reason.name(), "a port is bypassed: {}", reason.advice());
        }
    }
}

/// Says why the app can't have this port; returns false.
fn refuse(address: SocketAddr, reason: Bypass) -> bool {
    let why = match reason {
        Bypass::NotPermitted => "lameduck may not use ports below 1024",
        _ => "another program listens there",
    };
    tracing::warn!(%address, "the app's listen fails (EADDRINUSE): {why}");
    false
}

/// Returns why a port is bypassed; `None` for an address that was just removed: there is nothing to report.
fn why(error: &io::Error) -> Option<Bypass> {
    match error.kind() {
        ErrorKind::AddrNotAvailable => None,
        ErrorKind::PermissionDenied => Some(Bypass::NotPermitted),
        _ => Some(Bypass::Taken),
    }
}
