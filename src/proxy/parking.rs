//! Parked connections and tunnels: what rests costs its sockets, a line here and no task. One epoll set per thread
//! holds them; the next byte makes a task of it again.

use std::cell::RefCell;
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use slab::Slab;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use super::connection::{Idle, ParkedTunnel};
use super::shared::Shared;
use super::stream;
use crate::drain::gate::Connected;
use crate::drain::ledger::Ledger;

/// A connection is parked after resting for so long: busy ones never are.
pub const AFTER: Duration = Duration::from_secs(1);
/// A parked connection that was closed by us waits so long for the client's end.
const LINGER: Duration = Duration::from_secs(1);
/// Events taken from the set at once.
const EVENTS: usize = 256;
const TUNNEL: u64 = 1 << 63;

/// What is parked no longer: it needs a task again.
pub enum Unparked {
    /// A connection whose next request may be here.
    Idle(Idle),
    /// A tunnel over which something moves, or that is to end.
    Tunnel(ParkedTunnel),
}

struct Parked {
    stream: stream::Resting,
    peer: SocketAddr,
    since: Instant,
    /// When it was accepted, if its first request is still to come.
    accepted: Option<Instant>,
    /// Gone once our side has closed.
    connected: Option<Connected>,
}

/// The parked connections and tunnels of one thread.
pub struct Parking {
    set: OwnedFd,
    parked: RefCell<Slab<Parked>>,
    /// Their events' keys have the bit [`TUNNEL`].
    tunnels: RefCell<Slab<ParkedTunnel>>,
    wake: Arc<Notify>,
}

impl Parking {
    /// An empty one; `wake` makes it look at the phase.
    ///
    /// # Errors
    /// When the kernel gives no epoll set.
    pub fn new(wake: Arc<Notify>) -> io::Result<Self> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { set, parked: RefCell::default(), tunnels: RefCell::default(), wake })
    }

    /// Parks a connection of which no byte is unread.
    ///
    /// # Errors
    /// When the kernel has no room for it; the connection is closed.
    pub fn park(&self, idle: Idle) -> io::Result<()> {
        let Idle { stream, peer, connected, accepted } = idle;
        let mut parked = self.parked.borrow_mut();
        let vacant = parked.vacant_entry();
        self.watch(stream.tcp(), vacant.key() as u64)?;
        vacant.insert(Parked { stream, peer, since: Instant::now(), accepted, connected: Some(connected) });
        // The drain may have asked for idle ones just before.
        self.wake.notify_one();
        Ok(())
    }

    /// Parks a tunnel of which no byte is under way; gives it back where the kernel has no room for it.
    pub fn park_tunnel(&self, tunnel: ParkedTunnel) -> Option<ParkedTunnel> {
        let mut tunnels = self.tunnels.borrow_mut();
        let vacant = tunnels.vacant_entry();
        let key = TUNNEL | vacant.key() as u64;
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
        // One event is all we need: whatever it says ends the rest.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
        Ok(epoll::add(&self.set, socket, epoll::EventData::new_u64(key), flags)?)
    }

    /// Closes those that were idle in all for as long as may be now, and forgets those that were closed long enough ago.
    pub fn expire(&self, shared: &Shared) {
        let (now, rest) = (Instant::now(), shared.idle_timeout().saturating_sub(AFTER));
        let over: Vec<_> = self
            .parked
            .borrow()
            .iter()
            .filter(|(_, parked)| {
                now.duration_since(parked.since) >= if parked.connected.is_some() { rest } else { LINGER }
            })
            .map(|(key, _)| key)
            .collect();
        over.into_iter().for_each(|key| self.close(shared, key));
    }

    /// Takes out the tunnels over which nothing has moved for `--tunnel-timeout`: they end.
    pub fn expire_tunnels(&self, shared: &Shared, ledger: &Ledger, start: impl FnMut(Unparked)) {
        let most = shared.settings.limits.tunnel_timeout;
        if !most.is_zero() {
            let now = ledger.now_ms();
            let quiet =
                |tunnel: &ParkedTunnel| now.saturating_sub(tunnel.state.moved_at) >= most.as_millis() as u64;
            self.unpark_tunnels(quiet, start);
        }
    }

    /// The first time closes our side and waits for the client's, the second time lets go.
    fn close(&self, shared: &Shared, key: usize) {
        let mut all = self.parked.borrow_mut();
        let Some(parked) = all.get_mut(key) else { return };
        if parked.connected.is_some() && parked.stream.close().is_ok() {
            shared.lingering.fetch_add(1, Ordering::AcqRel);
            parked.since = Instant::now();
            parked.connected = None;
            return;
        }
        // With its only file descriptor it leaves the set.
        let parked = all.remove(key);
        parked.stream.discard();
        if parked.connected.is_none() {
            shared.lingering.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Closes all, but for those whose next request is here already: they are served.
    fn close_all(&self, shared: &Shared, start: &mut impl FnMut(Unparked)) {
        let open: Vec<_> = self
            .parked
            .borrow()
            .iter()
            .filter(|(_, parked)| parked.connected.is_some())
            .map(|(key, _)| key)
            .collect();
        // A look at the set before every few, instead of one at each socket: a request comes hardly in between. The
        // drain waits for these closes, and not for the clients' answers to them.
        let mut ended = Vec::new();
        for few in open.chunks(32) {
            while self.unpark_ready(&mut ended, start).is_ok_and(|ready| ready == EVENTS) {}
            few.iter().for_each(|key| self.close(shared, *key));
        }
        ended.into_iter().for_each(|key| self.close(shared, key));
    }

    /// Takes out those of which the kernel says that something has come; returns how many. Those that we have closed and
    /// that have come to their end are added to `ended`.
    fn unpark_ready(&self, ended: &mut Vec<usize>, start: &mut impl FnMut(Unparked)) -> io::Result<usize> {
        let mut events = [const { MaybeUninit::uninit() }; EVENTS];
        let (happened, _) = epoll::wait(&self.set, &mut events, Some(&Default::default()))?;
        for event in &*happened {
            let key = event.data.u64();
            if key & TUNNEL != 0 {
                self.unpark_tunnel((key & !TUNNEL) as usize, start);
            } else if let Some(idle) = self.unpark(key as usize) {
                start(Unparked::Idle(idle));
            } else {
                ended.push(key as usize);
            }
        }
        Ok(happened.len())
    }

    /// Takes a tunnel out. Both its sides may have an event: only the first finds it.
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

    /// Takes a connection out; none if it is one that we have closed.
    fn unpark(&self, key: usize) -> Option<Idle> {
        let mut all = self.parked.borrow_mut();
        let connected = all.get_mut(key)?.connected.take()?;
        let Parked { stream, peer, accepted, .. } = all.remove(key);
        let _ = epoll::delete(&self.set, stream.tcp());
        Some(Idle { stream, peer, connected, accepted })
    }

    /// Hands what needs a task again to `start`, for as long as the thread lives.
    ///
    /// # Errors
    /// When the runtime or the kernel refuses the epoll set.
    pub async fn watch_all(&self, shared: &Shared, mut start: impl FnMut(Unparked)) -> io::Result<()> {
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
                    if self.unpark_ready(&mut ended, &mut start)? < EVENTS {
                        ready.clear_ready();
                    }
                    ended.into_iter().for_each(|key| self.close(shared, key));
                }
                () = self.wake.notified() => {
                    if shared.closing_idle() {
                        self.close_all(shared, &mut start);
                    }
                    let ends = |tunnel: &ParkedTunnel| shared.ends_tunnel(tunnel.state.websocket, tunnel.app.backend());
                    self.unpark_tunnels(ends, &mut start);
                }
            }
        }
    }
}
