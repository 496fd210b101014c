//! Byte buffers. Idle connections hold none; [`crate::allocator`] keeps their memory ready for the next one.

use std::io;
use std::pin::pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Initial capacity, in bytes.
pub const SIZE: usize = 16 * 1024;
/// Capacity once a body has filled the buffer in one read, in bytes.
pub const LARGE: usize = 128 * 1024;

/// Bytes that were read and not yet used.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// Returns the bytes not yet used.
    pub fn unread(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Marks the first `n` bytes as used.
    pub fn consume(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.bytes.len());
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        }
    }

    /// Whether no byte is left unread.
    pub fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    /// Reads once, into room for at least one byte; 0 is the end. Allocates only while there are bytes to read.
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

    /// Frees the memory if nothing is unread.
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

    /// Enlarges a buffer that a body filled in one read: larger reads cost less.
    pub fn grow(&mut self) {
        if self.is_empty() && self.bytes.capacity() < LARGE {
            self.bytes = Vec::with_capacity(LARGE);
        }
    }

    /// Returns the most that one read could have brought, in bytes.
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
    // Only unsafe code can lend a vector's spare capacity to a reader; tokio does it for us.
    pin!(reader.read_buf(bytes)).poll(cx)
}
