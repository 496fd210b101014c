//! Who is in flight: method, path, age, class, peer. One ledger per data-plane thread, one entry per connection, and one
//! per stream of HTTP/2.
//! The entry is also the handle by which the drain and the sweeper reach a connection's task.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Waker};
use std::time::Instant;

use slab::Slab;

/// What a response turned out to be, which decides how a drain ends it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Class {
    /// The app has not answered yet.
    #[default]
    Request,
    /// A response that ends by itself.
    Finite,
    /// An event stream that its client can reopen.
    EventStream,
    /// A long poll that the app has not answered yet.
    LongPoll,
    /// A gRPC call that the app is answering. It ends by itself, or with trailers at the deadline.
    GrpcStream,
    /// A WebSocket.
    WebSocket,
    /// Any other upgraded connection.
    Tunnel,
    /// A connection that is passed on byte for byte.
    Tcp,
}

impl Class {
    /// As it stands in logs and the ledger.
    pub fn name(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Finite => "response",
            Self::EventStream => "event-stream",
            Self::LongPoll => "long-poll",
            Self::GrpcStream => "grpc-stream",
            Self::WebSocket => "websocket",
            Self::Tunnel => "tunnel",
            Self::Tcp => "tcp",
        }
    }
}

/// The longest method and path that an entry keeps, in bytes.
const METHOD: usize = 16;
const PATH: usize = 256;

/// The request that a connection is busy with.
#[derive(Debug, Default)]
struct Work {
    since: Option<Instant>,
    method: String,
    path: String,
    class: Class,
}

/// One client connection, or one stream of an HTTP/2 connection, as others see it.
#[derive(Debug)]
pub struct Entry {
    /// The client's address.
    pub peer: SocketAddr,
    waker: OnceLock<Waker>,
    /// When the sweeper wakes the task, in milliseconds of the ledger's clock; 0 for never.
    deadline: AtomicU64,
    expired: AtomicBool,
    work: Mutex<Work>,
}

impl Entry {
    /// Remembers whom to wake. A task's waker stays the same for its whole life, so the first one will do.
    pub fn register(&self, cx: &Context<'_>) {
        self.waker.get_or_init(|| cx.waker().clone());
    }

    /// Whether the deadline set last has passed.
    pub fn expired(&self) -> bool {
        self.expired.load(Ordering::Relaxed)
    }

    /// Sets when the task is woken with [`Entry::expired`], in milliseconds of the ledger's clock; 0 for never.
    pub fn set_deadline(&self, at_ms: u64) {
        self.deadline.store(at_ms, Ordering::Relaxed);
        self.expired.store(false, Ordering::Relaxed);
    }

    /// A request has begun. Without its query: that may hold secrets.
    pub fn begin(&self, method: &[u8], path: &[u8], since: Instant) {
        let mut work = lock(&self.work);
        work.since = Some(since);
        work.class = Class::Request;
        fill(&mut work.method, method, METHOD);
        let path = path.split(|b| *b == b'?').next().unwrap_or_default();
        fill(&mut work.path, path, PATH);
    }

    /// What the response is, once that is known.
    pub fn set_class(&self, class: Class) {
        lock(&self.work).class = class;
    }

    /// The request has ended.
    pub fn end(&self) {
        lock(&self.work).since = None;
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker.wake_by_ref();
        }
    }
}

/// One line of the ledger.
#[derive(Clone, Debug, serde::Serialize)]
pub struct LedgerRow {
    /// The request's method.
    pub method: String,
    /// Its path, without the query.
    pub path: String,
    /// Milliseconds since its first byte.
    pub age_ms: u64,
    /// [`Class::name`].
    pub class: &'static str,
    /// The client.
    pub peer: String,
}

/// The connections of one data-plane thread.
#[derive(Debug)]
pub struct Ledger {
    entries: Mutex<Slab<Arc<Entry>>>,
    /// Connections that were given to this thread and have not closed, and their streams.
    open: AtomicUsize,
    /// Coarse time in milliseconds, kept by the sweeper.
    clock: AtomicU64,
    began: Instant,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            entries: Mutex::default(),
            open: AtomicUsize::new(0),
            clock: AtomicU64::new(1),
            began: Instant::now(),
        }
    }
}

/// A connection on its way to the thread of this ledger, which enters it.
#[must_use = "dropping it says that the connection never got there"]
#[derive(Debug)]
pub struct Assigned(Arc<Ledger>);

impl Assigned {
    /// It is there: [`Ledger::enter`] follows, and its place counts it from then on.
    pub fn arrived(self) {
        // Taken back by `drop`.
        self.0.open.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Assigned {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection's place in its ledger, given back when it is dropped.
#[derive(Debug)]
pub struct LedgerEntry {
    ledger: Arc<Ledger>,
    key: usize,
    entry: Arc<Entry>,
}

impl std::ops::Deref for LedgerEntry {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl LedgerEntry {
    /// A place with the same work for another task, which registers anew.
    pub fn hand_over(self) -> Self {
        self.ledger.assign();
        let entry = self.ledger.enter(self.peer);
        *lock(&entry.work) = std::mem::take(&mut *lock(&self.work));
        entry
    }
}

impl Drop for LedgerEntry {
    fn drop(&mut self) {
        lock(&self.ledger.entries).remove(self.key);
        self.ledger.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Ledger {
    /// Connections that this thread has or is about to get.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// A connection is on its way to this thread, and may yet be lost.
    pub fn assigned(self: &Arc<Self>) -> Assigned {
        self.assign();
        Assigned(self.clone())
    }

    /// A connection of this thread's, which will [`Ledger::enter`] it.
    pub fn assign(&self) {
        self.open.fetch_add(1, Ordering::Relaxed);
    }

    /// Enters a new connection, which was assigned before.
    pub fn enter(self: &Arc<Self>, peer: SocketAddr) -> LedgerEntry {
        let entry = Arc::new(Entry {
            peer,
            waker: OnceLock::new(),
            deadline: AtomicU64::new(0),
            expired: AtomicBool::new(false),
            work: Mutex::default(),
        });
        let key = lock(&self.entries).insert(entry.clone());
        LedgerEntry { ledger: self.clone(), key, entry }
    }

    /// Coarse time, a quarter of a second exact, for deadlines.
    pub fn now_ms(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }

    /// Moves the coarse clock and wakes the connections whose deadline has passed. One look at each replaces a timer each.
    pub fn sweep(&self) {
        let now = self.began.elapsed().as_millis() as u64 + 1;
        self.clock.store(now, Ordering::Relaxed);
        for (_, entry) in lock(&self.entries).iter() {
            let deadline = entry.deadline.load(Ordering::Relaxed);
            if deadline != 0 && deadline <= now {
                entry.deadline.store(0, Ordering::Relaxed);
                entry.expired.store(true, Ordering::Relaxed);
                entry.wake();
            }
        }
    }

    /// Wakes every connection's task to look at the phase again.
    pub fn wake_all(&self) {
        for (_, entry) in lock(&self.entries).iter() {
            entry.wake();
        }
    }

    /// Adds this thread's running requests to `rows`.
    pub fn collect(&self, rows: &mut Vec<LedgerRow>) {
        for (_, entry) in lock(&self.entries).iter() {
            let work = lock(&entry.work);
            if let Some(since) = work.since {
                rows.push(LedgerRow {
                    method: work.method.clone(),
                    path: work.path.clone(),
                    age_ms: since.elapsed().as_millis() as u64,
                    class: work.class.name(),
                    peer: entry.peer.to_string(),
                });
            }
        }
    }
}

/// A panic elsewhere doesn't make what a lock guards here unusable.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reuses the string's room; bytes that are not UTF-8 and all past `most` are left out.
fn fill(text: &mut String, bytes: &[u8], most: usize) {
    text.clear();
    let bytes = &bytes[..bytes.len().min(most)];
    match std::str::from_utf8(bytes) {
        Ok(whole) => text.push_str(whole),
        Err(cut) => text.push_str(std::str::from_utf8(&bytes[..cut.valid_up_to()]).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_show_what_runs_without_its_query() {
        let ledger = Arc::new(Ledger::default());
        ledger.assign();
        let entry = ledger.enter(([127, 0, 0, 1], 9).into());
        let mut rows = Vec::new();
        ledger.collect(&mut rows);
        assert!(rows.is_empty(), "an idle connection is no work");
        entry.begin(b"GET", b"/a?secret=1", Instant::now());
        entry.set_class(Class::WebSocket);
        ledger.collect(&mut rows);
        assert_eq!(
            (rows[0].method.as_str(), rows[0].path.as_str(), rows[0].class),
            ("GET", "/a", "websocket")
        );
        entry.end();
        drop(entry);
        assert!(lock(&ledger.entries).is_empty());
    }

    #[test]
    fn a_connection_that_never_gets_to_its_thread_is_not_counted_there() {
        let ledger = Arc::new(Ledger::default());
        let (lost, there) = (ledger.assigned(), ledger.assigned());
        assert_eq!(ledger.open(), 2);
        drop(lost);
        assert_eq!(ledger.open(), 1);
        there.arrived();
        let entry = ledger.enter(([127, 0, 0, 1], 9).into());
        assert_eq!(ledger.open(), 1);
        drop(entry);
        assert_eq!(ledger.open(), 0);
    }

    #[test]
    fn a_passed_deadline_is_seen_by_the_sweep_only_once() {
        let ledger = Arc::new(Ledger::default());
        ledger.assign();
        let entry = ledger.enter(([127, 0, 0, 1], 9).into());
        entry.set_deadline(1);
        ledger.sweep();
        assert!(entry.expired());
        entry.set_deadline(0);
        ledger.sweep();
        assert!(!entry.expired());
    }
}
