//! How many connections to the app may be open at once, over all threads: each is an open file of this process.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

static MOST: AtomicU64 = AtomicU64::new(u64::MAX);
static OPEN: AtomicU64 = AtomicU64::new(0);

/// Counts one connection until it is dropped.
#[derive(Debug)]
pub struct Slot(());

/// Sets how many there may be.
pub fn set_most(most: u64) {
    MOST.store(most, Ordering::Relaxed);
}

/// How many there are.
pub fn open_connections() -> u64 {
    OPEN.load(Ordering::Relaxed)
}

/// Whether there may be no more: then none rests, since another thread may wait for its place.
pub fn are_taken() -> bool {
    open_connections() >= MOST.load(Ordering::Relaxed)
}

impl Slot {
    /// A place for one more.
    ///
    /// # Errors
    /// `QuotaExceeded` when there is none.
    pub fn take() -> io::Result<Self> {
        if OPEN.fetch_add(1, Ordering::Relaxed) >= MOST.load(Ordering::Relaxed) {
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
