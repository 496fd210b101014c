//! Capture under `lameduck run`: the addresses that a run has for itself, and which of the app's ports is the one to
//! serve.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::listeners::{Ports, listeners, sort};
use super::place::Place;
use super::word::Words;
use crate::supervise;

/// Number of places to try: another run may have one.
const MAX_TRIES: u16 = 64;
/// Time for an app to open its `PORT` after another port, which is then taken for the one to serve. Long, because an app
/// may serve metrics while it boots, and requests must not go there.
const PORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Without a `PORT`: time for an app to move, if it listens past us or only where debuggers and helpers do.
const MOVE_TIMEOUT: Duration = Duration::from_secs(1);

/// How good a guess an address is, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// The `PORT` that we chose.
    Given,
    /// Moved, and reachable from other machines.
    Moved,
    /// Moved, for this machine's own programs.
    MovedLoopback,
    /// Reachable from other machines, past us.
    Unmoved,
    /// Anything else.
    Private,
}

/// Where the app listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The app's address.
    pub addr: SocketAddr,
    /// How long a better one may still come.
    pub patience: Duration,
    rank: Rank,
}

/// The `PORT` that we chose for the app. It may change until the app listens.
#[derive(Clone, Debug, Default)]
pub struct GivenPort(Arc<AtomicU16>);

impl GivenPort {
    /// Sets it.
    pub fn set(&self, port: u16) {
        self.0.store(port, Ordering::Relaxed);
    }

    /// Returns it; `None` if the app's `PORT` is its own affair.
    pub fn get(&self) -> Option<u16> {
        Some(self.0.load(Ordering::Relaxed)).filter(|port| *port != 0)
    }
}

/// One run, as capture sees it.
#[derive(Debug)]
pub struct Run {
    /// Its addresses.
    pub place: Place,
    /// Where its app's words arrive.
    pub words: Words,
    /// The `PORT` that we chose.
    pub given: GivenPort,
    found: watch::Sender<Option<Found>>,
    /// Moved addresses in the order in which they were found.
    order: Vec<SocketAddr>,
}

impl Run {
    /// Takes addresses that no other run of this network namespace has: the kernel gives the name of their socket to one
    /// process only. Needs a tokio runtime.
    ///
    /// # Errors
    /// No such socket can be bound.
    pub fn reserve() -> io::Result<Self> {
        let first = RandomState::new().hash_one(std::process::id()) as u16;
        let mut tried = (0..MAX_TRIES).map(|number| Place::of_run(first.wrapping_add(number)));
        let bind = |place| Words::bind(place).map(|words| (place, words));
        let (place, words) =
            tried.find_map(|place| bind(place).ok()).map_or_else(|| bind(Place::of_run(first)), Ok)?;
        let found = watch::Sender::new(None);
        Ok(Self { place, words, given: GivenPort::default(), found, order: vec![] })
    }

    /// Number of the run.
    pub fn number(&self) -> u16 {
        match self.place {
            Place::Run(number) => number,
            Place::Pod => 0,
        }
    }

    /// Follows where the app listens.
    pub fn found(&self) -> watch::Receiver<Option<Found>> {
        self.found.subscribe()
    }

    /// Whether the app has been found.
    pub fn has_found(&self) -> bool {
        self.found.borrow().is_some()
    }

    /// The app's ports as they are now, and all addresses on which it listens. What another program has put at our place
    /// is not the app's, as far as `/proc` says whose it is.
    ///
    /// # Errors
    /// As [`listeners`].
    pub fn ports(&self) -> io::Result<(Ports, Vec<SocketAddr>)> {
        let (all, apps) = (listeners()?, supervise::sockets());
        let is_apps = |inode| apps.inodes.contains(&inode);
        let mut ports = sort(&all, self.place, is_apps);
        if !apps.complete {
            ports.moved = sort(&all, self.place, |_| true).moved;
        }
        let given = self.given.get();
        ports.bypassed.retain(|addr| Some(addr.port()) != given);
        let unsure = |addr: &SocketAddr| !apps.complete && Some(addr.port()) == given;
        let listening =
            all.iter().filter(|(addr, inode)| is_apps(*inode) || unsure(addr)).map(|(addr, _)| *addr);
        Ok((ports, listening.collect()))
    }

    /// Publishes the best address, unless a better one was there before on another port: an app that restarts opens its
    /// ports in some order.
    pub fn publish(&mut self, ports: &Ports, listening: &[SocketAddr]) {
        let new = ports.moved.iter().filter(|addr| !self.order.contains(addr));
        let new: Vec<_> = new.copied().collect();
        self.order.extend(new);
        let Some(best) = self.best(ports, listening) else { return };
        let gone = |old: &Found| !listening.contains(&old.addr) && !ports.moved.contains(&old.addr);
        self.found.send_if_modified(|found| {
            let in_place = |old: &Found| best.rank == old.rank || best.addr.port() == old.addr.port();
            let better = found.is_none_or(|old| best.rank < old.rank || in_place(&old) && gone(&old));
            if better {
                *found = Some(best);
            }
            better
        });
    }

    fn best(&self, ports: &Ports, listening: &[SocketAddr]) -> Option<Found> {
        let given = self.given.get();
        let moved = self.order.iter().copied().filter(|addr| ports.moved.contains(addr));
        let private =
            |addr: &SocketAddr| self.place.asked(addr.ip()).is_some_and(|asked| asked.is_loopback());
        let of_given = listening.iter().copied().filter(|addr| Some(addr.port()) == given);
        let ranked = of_given.map(|addr| (Rank::Given, addr));
        let ranked = ranked
            .chain(moved.map(|addr| (if private(&addr) { Rank::MovedLoopback } else { Rank::Moved }, addr)));
        let ranked = ranked.chain(ports.bypassed.iter().map(|addr| (Rank::Unmoved, *addr)));
        let ranked = ranked.chain(listening.iter().map(|addr| (Rank::Private, *addr)));
        let (rank, addr) = ranked.min_by_key(|(rank, _)| *rank)?;
        let patience = match rank {
            Rank::Given => Duration::ZERO,
            _ if given.is_some() => PORT_TIMEOUT,
            Rank::Moved | Rank::MovedLoopback => Duration::ZERO,
            Rank::Unmoved | Rank::Private => MOVE_TIMEOUT,
        };
        Some(Found { addr, patience, rank })
    }
}

/// Waits until the app listens, and no better address has come for a while.
pub async fn first(mut found: watch::Receiver<Option<Found>>) -> SocketAddr {
    loop {
        let now = *found.borrow_and_update();
        if let Some(Found { addr, patience: PORT_TIMEOUT, .. }) = now {
            tracing::info!(
                port = addr.port(),
                "the app listens on another port than its PORT: if that does not open within 10 s, this one is served in \
                 its place (--app-port saves the wait)"
            );
        }
        let settled = async {
            match now {
                Some(now) => {
                    tokio::time::sleep(now.patience).await;
                    now.addr
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            addr = settled => return addr,
            changed = found.changed() => if changed.is_err() { return std::future::pending().await },
        }
    }
}
