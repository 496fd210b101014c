//! Byte buffers, which idle connections hold none of: [`crate::allocator`] has their room at hand for the next one.

use std::io;
use std::pin::pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncReadExt};

/// What a buffer has room for at first, in bytes.
pub const SIZE: usize = 16 * 1024;
/// What it grows to once a body fills it at one read.
pub const LARGE: usize = 128 * 1024;

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

    /// Reads once, into room for at least a byte; 0 is the end. It has room only while bytes are there to be read.
    pub fn poll_fill<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
    ) -> Poll<io::Result<usize>> {
        if self.bytes.capacity() == 0 {
            self.bytes.reserve_exact(SIZE);
        }
        if self.bytes.len() == self.bytes.capacity() {
            self.make_room();
        }
        let read = poll_append(cx, reader, &mut self.bytes);
        if self.bytes.is_empty() && !matches!(read, Poll::Ready(Ok(n)) if n > 0) {
            self.bytes = Vec::new();
        }
        read
    }

    /// [`Buffer::poll_fill`] as a future.
    pub async fn fill<R: AsyncRead + Unpin>(&mut self, reader: &mut R) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_fill(cx, reader)).await
    }

    /// Gives the room back if nothing is unread.
    pub fn release(&mut self) {
        if self.is_empty() {
            *self = Self::default();
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

    /// A body filled all of it at one read: larger reads cost less.
    pub fn grow(&mut self) {
        if self.is_empty() && self.bytes.capacity() < LARGE {
            self.bytes = Vec::with_capacity(LARGE);
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
