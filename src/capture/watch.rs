//! `--capture` and `lameduck run`: finds the ports that the app opens, and serves them under their own numbers.
//!
//! We ask the kernel which ports these are: a word of the shim only makes us ask. A port that did not move is
//! left alone and reported, so that capture never breaks an app.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::listeners::{Ports, is_mesh, ports};
use super::place::Place;
use super::run::Run;
use super::word::Words;
use crate::config::CaptureProtocol;
use crate::drain::machine::Phase;
use crate::netlink;
use crate::proxy::accept::listener::{ListenerSender, NewListener, bind};
use crate::proxy::accept::prepare::Service;
use crate::proxy::captured::{Bypass, CapturedPort, PortId, Speaks};
use crate::proxy::shared::Shared;
use crate::repeated::ByReason;
use crate::termination_log;
use crate::upstream::LOOPBACK_SOURCE;

/// When to look without a word, in seconds after the start: an app that doesn't load the shim says nothing. After the
/// last one only words count.
const LOOKS: [u64; 7] = [1, 2, 5, 10, 20, 40, 60];

/// Limit on captured ports: each costs a listening socket per address.
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
    /// Captured addresses, and where they lead.
    open: BTreeMap<SocketAddr, PortId>,
    /// What was last written to the termination log.
    told: String,
}

impl Capture {
    /// Captures the ports of a pod; they are served by `listeners`. Needs a tokio runtime.
    pub fn of_pod(shared: Arc<Shared>, listeners: ListenerSender) -> Self {
        let words = Words::bind(Place::Pod).inspect_err(|error| {
            tracing::error!(%error, "the app can't say that it listens: another lameduck captures its ports");
        });
        Self::new(shared, listeners, Whose::Pod(words.ok()))
    }

    /// Captures the ports of the app of this run.
    pub fn of_run(shared: Arc<Shared>, listeners: ListenerSender, run: Run) -> Self {
        Self::new(shared, listeners, Whose::Run(run))
    }

    fn new(shared: Arc<Shared>, listeners: ListenerSender, whose: Whose) -> Self {
        Self { shared, listeners, whose, open: BTreeMap::new(), told: String::new() }
    }

    /// Looks for ports at its start, some times after it, whenever an app says that it listens, and when a port is given
    /// up.
    pub async fn watch(mut self) {
        let (began, shared) = (Instant::now(), self.shared.clone());
        self.look().await;
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
                () = shared.captured.given_up.notified() => None,
                said = word => Some(said),
            };
            match said {
                None => {
                    self.look().await;
                    if self.whose.next_look(began.elapsed()).is_none() {
                        shared.captured.settle();
                    }
                }
                Some(Ok(said)) => {
                    let refused = self.look().await;
                    let words = self.whose.words();
                    said.iter().for_each(|word| {
                        if let Some(words) = words {
                            words.answer(word, refused.iter().any(|at| at.port() == word.port));
                        }
                    });
                    // Any process can send words.
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
                Some(Err(error)) => {
                    warn("can't read what the app says of its ports", &error);
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
            }
        }
    }

    /// Serves the ports that have moved since the last look, releases those that were given up, and reports those that
    /// have not moved. Returns those that the app can't have because another program does; in a pod they are bypassed
    /// instead.
    async fn look(&mut self) -> BTreeSet<SocketAddr> {
        let seen = match &self.whose {
            Whose::Pod(_) => ports().map(|ports| (ports, vec![])),
            Whose::Run(run) => run.ports(),
        };
        let ((mut ports, listening), addresses) = match (seen, addresses()) {
            (Ok(seen), Ok(addresses)) => (seen, addresses),
            (Err(error), _) => return warn("can't ask the kernel which ports the app opens", &error),
            (_, Err(error)) => return warn("can't ask the kernel for this host's addresses", &error),
        };
        self.set_source(&addresses);
        let moved = |port| ports.moved.iter().any(|at| at.port() == port);
        let given_up = self.shared.captured.all().into_iter().filter(|port| port.is_given_up());
        let (kept, gone): (Vec<_>, Vec<_>) = given_up.partition(|port| moved(port.number()));
        kept.iter().for_each(|port| port.keep());
        // All at once: closing one takes a moment, in which no word is answered.
        gone.iter().for_each(|port| port.begin_release());
        for port in gone {
            let number = port.number();
            tracing::info!(port = number, "the app has closed a port for good: it is released");
            self.release(&port).await;
        }
        let mut refused = BTreeSet::new();
        for at in &ports.moved {
            if self.rule(at.port()) == Some(CaptureProtocol::Skip) {
                continue;
            }
            let asked = self.whose.place().asked(at.ip()).map(|asked| asked.of(&addresses));
            let asked = asked.unwrap_or_default().into_iter().map(|ip| SocketAddr::new(ip, at.port()));
            let asked: Vec<_> = asked.collect();
            self.find_again(*at, &asked, &ports).await;
            if !self.capture(*at, &asked) {
                refused.insert(*at);
            }
        }
        self.report(&ports);
        if let Whose::Run(run) = &mut self.whose {
            ports.moved.retain(|at| !refused.contains(at));
            run.publish(&ports, &listening);
        }
        refused
    }

    /// Sets the address that the app sees of clients from outside the pod. With IPv6 alone there is none of the pod's that
    /// could connect to the app's, so it is at least not the one that the pod's own clients have.
    fn set_source(&self, addresses: &[IpAddr]) {
        if matches!(self.whose, Whose::Pod(_)) {
            let own = addresses.iter().find(|ip| ip.is_ipv4() && !ip.is_loopback());
            self.shared.captured.set_source(own.copied().unwrap_or(LOOPBACK_SOURCE));
        }
    }

    /// Reports the ports that have not moved.
    fn report(&mut self, ports: &Ports) {
        self.shared.captured.forget_unless(|address| ports.bypassed.contains(&address));
        let (reason, in_pod) = match self.whose {
            Whose::Pod(_) => (Bypass::NotMoved, true),
            Whose::Run(_) => (Bypass::NotMovedInRun, false),
        };
        // In a pod an IPv6-only socket is as good as moved if its port has.
        let moved = |addr: &SocketAddr| {
            (in_pod || addr.is_ipv4()) && ports.moved.iter().any(|at| at.port() == addr.port())
        };
        let skipped = |addr: &SocketAddr| {
            moved(addr)
                || self.rule(addr.port()) == Some(CaptureProtocol::Skip)
                || in_pod && is_mesh(addr.port())
        };
        for addr in ports.bypassed.iter().filter(|addr| !skipped(addr)) {
            self.bypassed(*addr, reason);
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

    /// A server of the app may come back on another address, and what waits for it goes on there. But nothing may lead to
    /// one that asks for fewer addresses, as after a test whether the port is free.
    async fn find_again(&mut self, at: SocketAddr, asked: &[SocketAddr], ports: &Ports) {
        let same = self.shared.captured.of(at.port());
        if same.iter().any(|known| known.is_at(at)) {
            return;
        }
        for known in same.iter().filter(|known| !ports.moved.iter().any(|at| known.is_at(*at))) {
            if self.open.iter().all(|(addr, id)| *id != known.id || asked.contains(addr)) {
                return known.upstream.be_at(at.into());
            }
            self.release(known).await;
        }
    }

    /// Leaves a port that its app has closed for good: clients are refused, as without us.
    async fn release(&mut self, port: &CapturedPort) {
        port.release().await;
        self.open.retain(|_, id| *id != port.id);
        let captured = &self.shared.captured;
        captured.remove(port.id);
        captured.protect(port.number());
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

    /// Listens on those addresses of a moved port on which we don't yet. Returns false if the app can't have it.
    fn capture(&mut self, at: SocketAddr, asked: &[SocketAddr]) -> bool {
        let port = at.port();
        let captured = self.shared.captured.all();
        let own = captured.iter().find(|known| known.is_at(at)).map(|known| known.id);
        let is_others = |addr: &&SocketAddr| self.open.get(addr).is_some_and(|id| Some(*id) != own);
        if let Some(addr) = asked.iter().find(is_others) {
            return refuse(*addr, Bypass::Taken);
        }
        let new: Vec<_> = asked.iter().copied().filter(|addr| !self.open.contains_key(addr)).collect();
        let is_known = own.is_some();
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
        let captured = self.shared.captured.add(at, speaks, self.shared.ledgers.len());
        let in_pod = self.whose.place() == Place::Pod;
        if first && in_pod {
            // The port that `--ready-check` and the warm-up ask.
            self.shared.upstream.be_at(captured.app());
        }
        for (addr, listener) in bound {
            self.open.insert(addr, captured.id);
            // In a pod clients on loopback are parts of the pod. Elsewhere they are clients like any other.
            let stays = in_pod && addr.ip().is_loopback();
            let service = Service::Captured { port: captured.id, local: stays };
            let released = Some(captured.released());
            self.listeners.add(NewListener { listener, service, stays, released });
        }
    }

    fn bypassed(&self, address: SocketAddr, reason: Bypass) {
        if self.shared.captured.bypass(address, reason) {
            let port = address.port();
            tracing::warn!(port, %address, reason = reason.name(), "a port is bypassed: {}", reason.advice());
        }
    }
}

/// Any process can make us look, so the log is rate-limited. Returns no port.
fn warn(what: &'static str, error: &io::Error) -> BTreeSet<SocketAddr> {
    static FAILED: ByReason = ByReason::new();
    if let Some(times) = FAILED.due(what) {
        tracing::warn!(%error, times, "{what}");
    }
    BTreeSet::new()
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
