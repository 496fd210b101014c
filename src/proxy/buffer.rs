//! Byte buffers, and a store of them per thread so that idle connections hold none.

use std::cell::RefCell;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncReadExt};

/// What a buffer has room for at first, in bytes.
pub const SIZE: usize = 16 * 1024;
/// What it grows to once a body fills it at one read.
const LARGE: usize = 128 * 1024;
/// Buffers that the store keeps, and large ones.
const KEPT: usize = 64;
const KEPT_LARGE: usize = 4;

/// Bytes that were read and not yet used.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// What was read and not yet used.
    pub fn unread(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// The first `n` bytes have been used.
    pub fn consume(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.bytes.len());
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        }
    }

    /// Nothing is left unread.
    pub fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    /// Reads once, into room for at least a byte; 0 is the end. Takes its room from `store` only when bytes are there
    /// to be read and has given it back when none are.
    pub fn poll_fill<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        store: &Store,
    ) -> Poll<io::Result<usize>> {
        if self.bytes.capacity() == 0 {
            self.bytes = store.take();
        }
        if self.bytes.len() == self.bytes.capacity() {
            self.make_room();
        }
        let read = poll_append(cx, reader, &mut self.bytes);
        if self.bytes.is_empty() && !matches!(read, Poll::Ready(Ok(n)) if n > 0) {
            store.give(std::mem::take(&mut self.bytes));
        }
        read
    }

    /// [`Buffer::poll_fill`] as a future.
    pub async fn fill<R: AsyncRead + Unpin>(&mut self, reader: &mut R, store: &Store) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_fill(cx, reader, store)).await
    }

    /// Gives the room back if nothing is unread.
    pub fn release(&mut self, store: &Store) {
        if self.is_empty() && self.bytes.capacity() > 0 {
            self.start = 0;
            store.give(std::mem::take(&mut self.bytes));
        }
    }

    fn make_room(&mut self) {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        } else {
            self.bytes.reserve_exact(self.bytes.len());
        }
    }

    /// A body filled all of it at one read: larger reads cost less. Both rooms go by the store, since musl's malloc maps
    /// and unmaps each of this size, and every page of it faults anew.
    pub fn grow(&mut self, store: &Store) {
        if self.is_empty() && self.bytes.capacity() < LARGE {
            store.give(std::mem::replace(&mut self.bytes, store.take_large()));
        }
    }

    /// Bytes that one read could have brought at most.
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }
}

/// Reads once into the vector's spare capacity.
fn poll_append<R: AsyncRead + Unpin>(
    cx: &mut Context<'_>,
    reader: &mut R,
    bytes: &mut Vec<u8>,
) -> Poll<io::Result<usize>> {
    // A vector's spare room can't be lent to a reader without unsafe code: tokio does it for us.
    pin!(reader.read_buf(bytes)).poll(cx)
}

/// Buffers of one thread that nobody uses now.
#[derive(Debug, Default)]
pub struct Store {
    free: RefCell<Vec<Vec<u8>>>,
    large: RefCell<Vec<Vec<u8>>>,
}

impl Store {
    /// An empty vector with room.
    pub fn take(&self) -> Vec<u8> {
        self.free.borrow_mut().pop().unwrap_or_else(|| Vec::with_capacity(SIZE))
    }

    /// One with more room, for a body.
    pub fn take_large(&self) -> Vec<u8> {
        self.large.borrow_mut().pop().unwrap_or_else(|| Vec::with_capacity(LARGE))
    }

    /// Keeps the vector's room for the next one, if it is of a usual size.
    pub fn give(&self, mut bytes: Vec<u8>) {
        let (kept, most) = match bytes.capacity() {
            SIZE => (&self.free, KEPT),
            LARGE => (&self.large, KEPT_LARGE),
            _ => return,
        };
        let mut kept = kept.borrow_mut();
        if kept.len() < most {
            bytes.clear();
            kept.push(bytes);
        }
    }
}
