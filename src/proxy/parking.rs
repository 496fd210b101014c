//! Parked connections and tunnels: an idle one costs its sockets and an entry here, and has no task. One epoll set
//! per thread watches them; the next byte gives the connection a task again.

use std::cell::RefCell;
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use slab::Slab;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use super::connection::{Idle, ParkedTunnel};
use super::route::Route;
use super::shared::Shared;
use super::stream;
use crate::drain::gate::Connected;
use crate::drain::ledger::Ledger;

/// Idle time after which a connection is parked; busy ones never are.
pub const PARK_AFTER: Duration = Duration::from_secs(1);
/// Time for the client to close its side after we closed a parked connection.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of events per epoll_wait.
const MAX_EVENTS: usize = 256;
const TUNNEL_BIT: u64 = 1 << 63;

/// A connection that is no longer parked and needs a task.
pub enum Unparked {
    /// A connection whose next request may have arrived.
    Idle(Idle),
    /// A tunnel that has bytes to relay, or has to end.
    Tunnel(ParkedTunnel),
}

struct Parked {
    stream: stream::Resting,
    peer: SocketAddr,
    since: Instant,
    /// When it was accepted, if its first request is still to come.
    accepted: Option<Instant>,
    /// `None` once our side has closed.
    connected: Option<Connected>,
    route: Rc<Route>,
}

/// The parked connections and tunnels of one thread.
pub struct Parking {
    set: OwnedFd,
    parked: RefCell<Slab<Parked>>,
    /// The keys of their events have the bit [`TUNNEL_BIT`].
    tunnels: RefCell<Slab<ParkedTunnel>>,
    wake: Arc<Notify>,
}

impl Parking {
    /// An empty set; `wake` makes it check the phase.
    ///
    /// # Errors
    /// If the kernel can't create an epoll set.
    pub fn new(wake: Arc<Notify>) -> io::Result<Self> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { set, parked: RefCell::default(), tunnels: RefCell::default(), wake })
    }

    /// Parks a connection without unread bytes.
    ///
    /// # Errors
    /// If the kernel can't add it to the set; the connection is closed.
    pub fn park(&self, idle: Idle) -> io::Result<()> {
        let Idle { stream, peer, connected, route, accepted } = idle;
        let mut parked = self.parked.borrow_mut();
        let vacant = parked.vacant_entry();
        self.watch(stream.tcp(), vacant.key() as u64)?;
        let (since, connected) = (Instant::now(), Some(connected));
        vacant.insert(Parked { stream, peer, since, accepted, connected, route });
        // The drain may have closed the idle ones just before.
        self.wake.notify_one();
        Ok(())
    }

    /// Parks a tunnel without unread bytes. Returns it if the kernel can't add it to the set.
    pub fn park_tunnel(&self, tunnel: ParkedTunnel) -> Option<ParkedTunnel> {
        let mut tunnels = self.tunnels.borrow_mut();
        let vacant = tunnels.vacant_entry();
        let key = TUNNEL_BIT | vacant.key() as u64;
        let watched = self.watch(tunnel.client.tcp(), key).and_then(|()| self.watch(&tunnel.app, key));
        if watched.is_err() {
            let _ = epoll::delete(&self.set, tunnel.client.tcp());
            return Some(tunnel);
        }
        vacant.insert(tunnel);
        self.wake.notify_one();
        None
    }

    fn watch(&self, socket: &impl AsFd, key: u64) -> io::Result<()> {
        // ONESHOT: any event, whatever its kind, ends the parking.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
        Ok(epoll::add(&self.set, socket, epoll::EventData::new_u64(key), flags)?)
    }

    /// Closes the connections that have exceeded the idle timeout, and drops those that were closed long enough ago.
    pub fn expire(&self, shared: &Shared) {
        let (now, rest) = (Instant::now(), shared.idle_timeout().saturating_sub(PARK_AFTER));
        let over: Vec<_> = self
            .parked
            .borrow()
            .iter()
            .filter(|(_, parked)| {
                now.duration_since(parked.since)
                    >= if parked.connected.is_some() { rest } else { LINGER_TIMEOUT }
            })
            .map(|(key, _)| key)
            .collect();
        over.into_iter().for_each(|key| self.close(shared, key));
    }

    /// Removes the tunnels that were idle for `--tunnel-timeout`, or quiet for long enough in a drain, so that they end.
    pub fn expire_tunnels(&self, shared: &Shared, ledger: &Ledger, start: impl FnMut(Unparked)) {
        let (max, now) = (shared.settings.limits.tunnel_timeout, ledger.now_ms());
        if max.is_zero() && !shared.ends_all_streams() {
            return;
        }
        let over = |tunnel: &ParkedTunnel| {
            let quiet = now.saturating_sub(tunnel.state.moved_at);
            (!max.is_zero() && quiet >= max.as_millis() as u64)
                || tunnel.state.is_to_end(shared, tunnel.app.backend(), now)
        };
        self.unpark_tunnels(over, start);
    }

    /// The first call closes our side and waits for the client's, the second drops the connection.
    fn close(&self, shared: &Shared, key: usize) {
        let mut all = self.parked.borrow_mut();
        let Some(parked) = all.get_mut(key) else { return };
        if parked.connected.is_some() && parked.stream.close().is_ok() {
            shared.lingering.fetch_add(1, Ordering::AcqRel);
            parked.since = Instant::now();
            parked.connected = None;
            return;
        }
        // Closing its only file descriptor removes it from the set.
        let parked = all.remove(key);
        parked.stream.discard();
        if parked.connected.is_none() {
            shared.lingering.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Closes all connections except those whose next request has already arrived: they are served.
    fn close_all(&self, shared: &Shared, start: &mut impl FnMut(Unparked)) {
        let open: Vec<_> = self
            .parked
            .borrow()
            .iter()
            .filter(|(_, parked)| parked.connected.is_some())
            .map(|(key, _)| key)
            .collect();
        // Checks the set before every few closes instead of each socket: a request is unlikely to arrive in between.
        // The drain waits for these closes, but not for the clients' replies to them.
        let mut ended = Vec::new();
        for few in open.chunks(32) {
            while self.unpark_ready(&mut ended, start).is_ok_and(|ready| ready == MAX_EVENTS) {}
            few.iter().for_each(|key| self.close(shared, *key));
        }
        ended.into_iter().for_each(|key| self.close(shared, key));
    }

    /// Takes out those of which the kernel says that something has come; returns how many. Those that we have closed and
    /// that have come to their end are added to `ended`.
    fn unpark_ready(&self, ended: &mut Vec<usize>, start: &mut impl FnMut(Unparked)) -> io::Result<usize> {
        let mut events = [const { MaybeUninit::uninit() }; MAX_EVENTS];
        let (happened, _) = epoll::wait(&self.set, &mut events, Some(&Default::default()))?;
        for event in &*happened {
            let key = event.data.u64();
            if key & TUNNEL_BIT != 0 {
                self.unpark_tunnel((key & !TUNNEL_BIT) as usize, start);
            } else if let Some(idle) = self.unpark(key as usize) {
                start(Unparked::Idle(idle));
            } else {
                ended.push(key as usize);
            }
        }
        Ok(happened.len())
    }

    /// Removes a tunnel. Both of its sockets may have an event: only the first one finds it.
    fn unpark_tunnel(&self, key: usize, start: &mut impl FnMut(Unparked)) {
        let Some(tunnel) = self.tunnels.borrow_mut().try_remove(key) else { return };
        let _ = epoll::delete(&self.set, tunnel.client.tcp());
        let _ = epoll::delete(&self.set, &tunnel.app);
        start(Unparked::Tunnel(tunnel));
    }

    fn unpark_tunnels(&self, which: impl Fn(&ParkedTunnel) -> bool, mut start: impl FnMut(Unparked)) {
        let tunnels = self.tunnels.borrow();
        let keys: Vec<_> = tunnels.iter().filter(|(_, tunnel)| which(tunnel)).map(|(key, _)| key).collect();
        drop(tunnels);
        keys.into_iter().for_each(|key| self.unpark_tunnel(key, &mut start));
    }

    /// Removes a connection; `None` if we have closed it.
    fn unpark(&self, key: usize) -> Option<Idle> {
        let mut all = self.parked.borrow_mut();
        let connected = all.get_mut(key)?.connected.take()?;
        let Parked { stream, peer, accepted, route, .. } = all.remove(key);
        let _ = epoll::delete(&self.set, stream.tcp());
        Some(Idle { stream, peer, connected, route, accepted })
    }

    /// Passes parked connections that need a task to `start`, for the life of the thread.
    ///
    /// # Errors
    /// If the runtime or the kernel refuses the epoll set.
    pub async fn watch_all(
        &self,
        shared: &Shared,
        ledger: &Ledger,
        mut start: impl FnMut(Unparked),
    ) -> io::Result<()> {
        #[expect(
            deprecated,
            reason = "unsound only for types that lie about their file descriptor; an OwnedFd doesn't"
        )]
        let set = AsyncFd::new(self.set.try_clone()?)?;
        loop {
            tokio::select! {
                ready = set.readable() => {
                    let mut ready = ready?;
                    let mut ended = Vec::new();
                    if self.unpark_ready(&mut ended, &mut start)? < MAX_EVENTS {
                        ready.clear_ready();
                    }
                    ended.into_iter().for_each(|key| self.close(shared, key));
                }
                () = self.wake.notified() => {
                    if shared.closing_idle() {
                        self.close_all(shared, &mut start);
                    }
                    let now = ledger.now_ms();
                    let ends = |tunnel: &ParkedTunnel| tunnel.state.is_to_end(shared, tunnel.app.backend(), now);
                    self.unpark_tunnels(ends, &mut start);
                }
            }
        }
    }
}
