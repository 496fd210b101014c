//! What is in flight: method, path, age, class, peer. There is one ledger per data-plane thread, with one entry per
//! connection and one per HTTP/2 stream. The drain and the sweeper also use the entry to wake a connection's task.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Waker};
use std::time::Instant;

use slab::Slab;

/// The kind of a response, which decides how a drain ends it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Class {
    /// The app has not answered yet.
    #[default]
    Request,
    /// A response that ends on its own.
    Finite,
    /// An event stream that its client can reopen.
    EventStream,
    /// A long poll that the app has not answered yet.
    LongPoll,
    /// A gRPC call that the app is answering. It ends on its own, or with trailers at the deadline.
    GrpcStream,
    /// A WebSocket.
    WebSocket,
    /// Any other upgraded connection.
    Tunnel,
    /// A connection that is forwarded byte for byte.
    Tcp,
}

impl Class {
    /// The name used in logs and in the ledger.
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

/// Limit on the method that an entry keeps, in bytes; the rest is cut off.
const MAX_METHOD: usize = 16;
/// Limit on the path that an entry keeps, in bytes; the rest is cut off.
const MAX_PATH: usize = 256;

/// The request that a connection is serving.
#[derive(Debug, Default)]
struct Work {
    since: Option<Instant>,
    method: String,
    path: String,
    class: Class,
}

/// One client connection or HTTP/2 stream, as other tasks see it.
#[derive(Debug)]
pub struct Entry {
    /// The client's address.
    pub peer: SocketAddr,
    waker: OnceLock<Waker>,
    /// When the sweeper wakes the task, in milliseconds on the ledger's clock; 0 means never.
    deadline: AtomicU64,
    expired: AtomicBool,
    work: Mutex<Work>,
}

impl Entry {
    /// Stores the waker of the task. A task keeps the same waker for its whole life, so only the first call matters.
    pub fn register(&self, cx: &Context<'_>) {
        self.waker.get_or_init(|| cx.waker().clone());
    }

    /// Whether the most recently set deadline has passed.
    pub fn expired(&self) -> bool {
        self.expired.load(Ordering::Relaxed)
    }

    /// Sets when the task is woken with [`Entry::expired`] true, in milliseconds on the ledger's clock; 0 means never.
    pub fn set_deadline(&self, at_ms: u64) {
        self.deadline.store(at_ms, Ordering::Relaxed);
        self.expired.store(false, Ordering::Relaxed);
    }

    /// Records that a request has begun. The query is left out because it may contain secrets.
    pub fn begin(&self, method: &[u8], path: &[u8], since: Instant) {
        let mut work = lock(&self.work);
        work.since = Some(since);
        work.class = Class::Request;
        fill(&mut work.method, method, MAX_METHOD);
        let path = path.split(|b| *b == b'?').next().unwrap_or_default();
        fill(&mut work.path, path, MAX_PATH);
    }

    /// Sets the kind of the response once it is known.
    pub fn set_class(&self, class: Class) {
        lock(&self.work).class = class;
    }

    /// Records that the request has ended.
    pub fn end(&self) {
        lock(&self.work).since = None;
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker.wake_by_ref();
        }
    }
}

/// One running request, as the status shows it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct LedgerRow {
    /// The request's method.
    pub method: String,
    /// Its path, without the query.
    pub path: String,
    /// Milliseconds since the request's first byte.
    pub age_ms: u64,
    /// [`Class::name`].
    pub class: &'static str,
    /// The client's address.
    pub peer: String,
}

/// The connections of one data-plane thread.
#[derive(Debug)]
pub struct Ledger {
    entries: Mutex<Slab<Arc<Entry>>>,
    /// Open connections assigned to this thread, and their HTTP/2 streams.
    open: AtomicUsize,
    /// Coarse time in milliseconds, updated by the sweeper.
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

/// A connection on its way to the thread of this ledger.
#[must_use = "dropping it means that the connection was lost on the way"]
#[derive(Debug)]
pub struct Assigned(Arc<Ledger>);

impl Assigned {
    /// The connection has arrived. [`Ledger::enter`] must follow; the [`LedgerEntry`] counts it from then on.
    pub fn arrived(self) {
        // `drop` subtracts this again.
        self.0.open.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Assigned {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection's entry in its ledger, removed when this guard is dropped.
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
    /// Moves the work to a new entry for another task, which registers its own waker.
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
    /// Number of connections and HTTP/2 streams on this thread, including connections on their way to it.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Counts a connection that is on its way to this thread and may still be lost.
    pub fn assigned(self: &Arc<Self>) -> Assigned {
        self.assign();
        Assigned(self.clone())
    }

    /// Counts a connection or stream of this thread. [`Ledger::enter`] must follow.
    pub fn assign(&self) {
        self.open.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds an entry for a connection that has been assigned before.
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

    /// Coarse time for deadlines, in milliseconds, accurate to 250 ms.
    pub fn now_ms(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }

    /// Advances the coarse clock and wakes the connections whose deadline has passed. One periodic pass over all
    /// entries replaces a timer per connection.
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

    /// Wakes every connection's task so that it reads the phase again.
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

/// Locks the mutex even if a panic has poisoned it; the data guarded here stays valid.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Replaces the text, reusing its allocation. Cuts it off after `max` bytes or at the first invalid UTF-8.
fn fill(text: &mut String, bytes: &[u8], max: usize) {
    text.clear();
    let bytes = &bytes[..bytes.len().min(max)];
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
