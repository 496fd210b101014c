//! Parked connections and tunnels: what rests costs its sockets, a line here and no task. One epoll set per thread
//! holds them; the next byte makes a task of it again.

use std::cell::RefCell;
use std::io;
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use slab::Slab;
use socket2::SockRef;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::spawn_local;

use super::conn;
use super::plane::Worker;
use super::stream;
use super::upgrade::Resting;
use crate::drain::gate::Connected;

/// A connection is parked after resting for so long: busy ones never are.
pub const AFTER: Duration = Duration::from_secs(1);
/// A parked connection that was closed by us waits so long for the client's end.
const LINGER: Duration = Duration::from_secs(1);
/// Events taken from the set at once.
const EVENTS: usize = 256;
const TUNNEL: u64 = 1 << 63;

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
    tunnels: RefCell<Slab<Resting>>,
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
    pub fn park(
        &self,
        stream: stream::Resting,
        peer: SocketAddr,
        connected: Connected,
        accepted: Option<Instant>,
    ) -> io::Result<()> {
        let mut parked = self.parked.borrow_mut();
        let vacant = parked.vacant_entry();
        self.watch(stream.tcp(), vacant.key() as u64)?;
        vacant.insert(Parked { stream, peer, since: Instant::now(), accepted, connected: Some(connected) });
        // The drain may have asked for idle ones just before.
        self.wake.notify_one();
        Ok(())
    }

    /// Parks a tunnel of which no byte is under way; where the kernel has no room for it, it goes on as a task.
    pub fn park_tunnel(&self, tunnel: Resting, worker: &Rc<Worker>) {
        let mut tunnels = self.tunnels.borrow_mut();
        let vacant = tunnels.vacant_entry();
        let key = TUNNEL | vacant.key() as u64;
        let watched = self.watch(tunnel.client.tcp(), key).and_then(|()| self.watch(&tunnel.app, key));
        if watched.is_err() {
            let _ = epoll::delete(&self.set, tunnel.client.tcp());
            return tunnel.go_on(worker);
        }
        vacant.insert(tunnel);
        self.wake.notify_one();
    }

    fn watch(&self, socket: &impl AsFd, key: u64) -> io::Result<()> {
        // One event is all we need: whatever it says ends the rest.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
        Ok(epoll::add(&self.set, socket, epoll::EventData::new_u64(key), flags)?)
    }

    /// Closes those that rested for longer than `idle` in all, and forgets those that were closed long enough.
    pub fn expire(&self, worker: &Worker, idle: Duration) {
        let (now, rest) = (Instant::now(), idle.saturating_sub(AFTER));
        let over: Vec<_> = self
            .parked
            .borrow()
            .iter()
            .filter(|(_, parked)| {
                now.duration_since(parked.since) >= if parked.connected.is_some() { rest } else { LINGER }
            })
            .map(|(key, _)| key)
            .collect();
        over.into_iter().for_each(|key| self.close(worker, key));
    }

    /// The first time closes our side and waits for the client's, the second time lets go.
    fn close(&self, worker: &Worker, key: usize) {
        let mut all = self.parked.borrow_mut();
        let Some(parked) = all.get_mut(key) else { return };
        if parked.connected.is_some() && parked.stream.tcp().shutdown(Shutdown::Write).is_ok() {
            worker.plane.lingering.fetch_add(1, Ordering::AcqRel);
            parked.since = Instant::now();
            parked.connected = None;
            return;
        }
        // With its only file descriptor it leaves the set.
        if all.remove(key).connected.is_none() {
            worker.plane.lingering.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Closes all, but for those whose next request is here already: they are served.
    fn close_all(&self, worker: &Rc<Worker>) {
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
            while self.serve_ready(worker, &mut ended).is_ok_and(|served| served == EVENTS) {}
            few.iter().for_each(|key| self.close(worker, *key));
        }
        ended.into_iter().for_each(|key| self.close(worker, key));
    }

    /// Serves those of which the kernel says that something has come; how many. Those that we have closed and that have
    /// come to their end are added to `ended`.
    fn serve_ready(&self, worker: &Rc<Worker>, ended: &mut Vec<usize>) -> io::Result<usize> {
        let mut events = [const { MaybeUninit::uninit() }; EVENTS];
        let (happened, _) = epoll::wait(&self.set, &mut events, Some(&Default::default()))?;
        for event in &*happened {
            let key = event.data.u64();
            if key & TUNNEL != 0 {
                self.wake_tunnel(worker, (key & !TUNNEL) as usize);
            } else if !self.serve(worker, key as usize) {
                ended.push(key as usize);
            }
        }
        Ok(happened.len())
    }

    /// Makes a task of a tunnel again. Both its sides may have an event: only the first finds it.
    fn wake_tunnel(&self, worker: &Rc<Worker>, key: usize) {
        let Some(tunnel) = self.tunnels.borrow_mut().try_remove(key) else { return };
        let _ = epoll::delete(&self.set, tunnel.client.tcp());
        let _ = epoll::delete(&self.set, &tunnel.app);
        tunnel.go_on(worker);
    }

    /// Makes tasks of those that the drain wants to end.
    fn wake_tunnels(&self, worker: &Rc<Worker>) {
        let ends = |tunnel: &Resting| worker.plane.ends_tunnel(tunnel.tunnel.websocket, tunnel.app.backend());
        let tunnels = self.tunnels.borrow();
        let over: Vec<_> = tunnels.iter().filter(|(_, tunnel)| ends(tunnel)).map(|(key, _)| key).collect();
        drop(tunnels);
        over.into_iter().for_each(|key| self.wake_tunnel(worker, key));
    }

    /// Makes a task of it again; false for one that we have closed.
    fn serve(&self, worker: &Rc<Worker>, key: usize) -> bool {
        let mut all = self.parked.borrow_mut();
        let Some(connected) = all.get_mut(key).and_then(|parked| parked.connected.take()) else {
            return false;
        };
        let Parked { stream, peer, accepted, .. } = all.remove(key);
        let _ = epoll::delete(&self.set, stream.tcp());
        if let Ok(stream) = stream.go_on() {
            worker.ledger.assign();
            spawn_local(conn::serve(stream, peer, connected, accepted, worker.clone()));
        }
        true
    }
}

/// Serves this thread's parked connections for as long as it lives.
///
/// # Errors
/// When the runtime or the kernel refuses the epoll set.
pub async fn run(worker: Rc<Worker>) -> io::Result<()> {
    let parking = &worker.parking;
    #[expect(
        deprecated,
        reason = "unsound only for types that lie about their file descriptor; an OwnedFd doesn't"
    )]
    let set = AsyncFd::new(parking.set.try_clone()?)?;
    loop {
        tokio::select! {
            ready = set.readable() => {
                let mut ready = ready?;
                let mut ended = Vec::new();
                if parking.serve_ready(&worker, &mut ended)? < EVENTS {
                    ready.clear_ready();
                }
                ended.into_iter().for_each(|key| parking.close(&worker, key));
            }
            () = parking.wake.notified() => {
                if worker.plane.closing_idle() {
                    parking.close_all(&worker);
                }
                parking.wake_tunnels(&worker);
            }
        }
    }
}

/// Asks the kernel itself: what it has received may not have been reported yet.
pub fn has_unread(client: &impl AsFd) -> bool {
    let mut byte = [MaybeUninit::uninit()];
    matches!(SockRef::from(client).peek(&mut byte), Ok(n) if n > 0)
}
