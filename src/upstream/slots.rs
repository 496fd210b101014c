//! Limits the open connections to the app, over all threads: each is an open file of this process.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

static MAX_OPEN: AtomicU64 = AtomicU64::new(u64::MAX);
static OPEN: AtomicU64 = AtomicU64::new(0);
static SHARING: AtomicU64 = AtomicU64::new(0);

/// Counts one connection until it is dropped.
#[derive(Debug)]
pub struct Slot(());

/// Counts one stream on a shared connection, which takes no open file of its own.
#[derive(Debug)]
pub struct Sharing(());

/// Sets the maximum number of connections.
pub fn set_max_connections(max: u64) {
    MAX_OPEN.store(max, Ordering::Relaxed);
}

/// Returns the number of open connections.
pub fn open_connections() -> u64 {
    OPEN.load(Ordering::Relaxed)
}

/// Returns the number of streams on shared connections.
pub fn sharing_streams() -> u64 {
    SHARING.load(Ordering::Relaxed)
}

/// Whether the limit is reached: then no connection is kept idle, because another thread may be waiting for its
/// place.
pub fn are_taken() -> bool {
    open_connections() >= MAX_OPEN.load(Ordering::Relaxed)
}

impl Slot {
    /// Takes a place for one more connection.
    ///
    /// # Errors
    /// `QuotaExceeded` if there is none.
    pub fn take() -> io::Result<Self> {
        if OPEN.fetch_add(1, Ordering::Relaxed) >= MAX_OPEN.load(Ordering::Relaxed) {
            OPEN.fetch_sub(1, Ordering::Relaxed);
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        Ok(Self(()))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Sharing {
    /// Counts one more stream.
    pub fn begin() -> Self {
        SHARING.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Sharing {
    fn drop(&mut self) {
        SHARING.fetch_sub(1, Ordering::Relaxed);
    }
}
