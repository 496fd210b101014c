//! Follows the bytes of an HTTP/2 connection frame by frame, to know when a stream's last frame is in the socket, and
//! how many frames a client sends that cause work and carry no data.
//!
//! Frames to the client are gathered and written together at the end of each turn of the connection's task.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frames::{Allowance, Follower, Frame, Sides};
use crate::proxy::buffer::{Buffer, LARGE, SIZE};
use crate::proxy::stream::{Sink, Stream};
use crate::proxy::worker::Worker;

/// A client's connection, shared by the task that runs it and by those who ask for its progress.
pub struct Wire {
    inner: RefCell<Inner>,
    worker: Rc<Worker>,
    /// The client has exceeded its allowance of frames.
    excess: Cell<bool>,
}

struct Inner {
    /// `None` after [`Wire::take`].
    stream: Option<Stream>,
    /// What was read before the connection was known to be HTTP/2.
    read: Buffer,
    gathered: Vec<u8>,
    /// Bytes of it that have been written.
    written: usize,
    /// Bytes written and read in total.
    moved: u64,
    came: Follower,
    went: Follower,
    allowance: Allowance,
    /// Streams whose last frame was written, or that the client has reset, and that are not reported yet.
    ended: Vec<u32>,
}

/// The wire as a transport for `h2`.
pub struct Transport(pub Rc<Wire>);

impl Wire {
    /// A connection that begins with the bytes already read from it.
    pub fn new(stream: Stream, read: Buffer, worker: Rc<Worker>) -> Self {
        let inner = Inner {
            stream: Some(stream),
            read,
            gathered: Vec::new(),
            written: 0,
            moved: 0,
            came: Follower::new(Sides::FromClient),
            went: Follower::new(Sides::ToClient),
            allowance: Allowance::new(worker.ledger.now_ms()),
            ended: Vec::new(),
        };
        Self { inner: RefCell::new(inner), worker, excess: Cell::new(false) }
    }

    /// Writes what was gathered.
    pub fn poll_drain(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.inner.borrow_mut();
        let drained = inner.poll_drain(cx);
        if inner.gathered.is_empty() {
            // An idle connection holds no buffer.
            inner.gathered = Vec::new();
        }
        drained
    }

    /// Reports each stream that has ended since the last call: its last frame was written, or the client reset it, so
    /// that none will be.
    pub fn ended(&self, mut tell: impl FnMut(u32)) {
        let mut inner = self.inner.borrow_mut();
        inner.ended.drain(..).for_each(&mut tell);
    }

    /// Whether the client has exceeded its allowance of frames; nothing more is read then.
    pub fn excess(&self) -> bool {
        self.excess.get()
    }

    /// Bytes written and read in total.
    pub fn moved(&self) -> u64 {
        self.inner.borrow().moved
    }

    /// Bytes written that the client has not acknowledged.
    pub fn unacknowledged(&self) -> u32 {
        let mut inner = self.inner.borrow_mut();
        inner.stream.as_mut().map_or(0, |stream| stream.split().1.unacknowledged())
    }

    /// Whether unread bytes are in the kernel's buffer.
    pub fn has_unread(&self) -> bool {
        let mut inner = self.inner.borrow_mut();
        inner.stream.as_mut().is_some_and(|stream| stream.split().0.has_unread())
    }

    /// Takes the connection, in order to close it. Any later use of the wire returns errors.
    pub fn take(&self) -> Option<Stream> {
        self.inner.borrow_mut().stream.take()
    }
}

impl Inner {
    fn stream(&mut self) -> io::Result<&mut Stream> {
        self.stream.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Whether `more` bytes may be gathered: the usual buffer suffices for heads, a large one is taken for bodies.
    fn make_room(&mut self, more: usize) -> bool {
        let (gathered, needed) = (self.gathered.len(), self.gathered.len() + more);
        if needed > self.gathered.capacity() && needed <= LARGE {
            let room = if needed <= SIZE { SIZE } else { LARGE };
            self.gathered.reserve_exact(room - gathered);
        }
        needed <= self.gathered.capacity()
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.gathered.len() {
            ready!(self.poll_write_with(cx, &[]))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Writes what was gathered, then `more`; returns how many bytes of `more` were taken.
    fn poll_write_with(&mut self, cx: &mut Context<'_>, more: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let Some(stream) = self.stream.as_mut() else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        let own = &self.gathered[self.written..];
        let mut parts = [IoSlice::new(own), IoSlice::new(&[]), IoSlice::new(&[])];
        for (part, more) in parts[1..].iter_mut().zip(more) {
            *part = IoSlice::new(more);
        }
        let n = ready!(Pin::new(stream).poll_write_vectored(cx, &parts))?;
        if n == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.moved += n as u64;
        let mut left = n;
        for part in &parts {
            let taken = left.min(part.len());
            left -= taken;
            self.went.follow(&part[..taken], |frame| match frame {
                Frame::LastOf(stream) => {
                    self.allowance.answered();
                    self.ended.push(stream);
                }
                Frame::Work => self.allowance.worked(),
                Frame::Control | Frame::Reset(_) => {}
            });
        }
        let own = n.min(own.len());
        self.written += own;
        if self.written == self.gathered.len() {
            self.written = 0;
            self.gathered.clear();
        }
        Poll::Ready(Ok(n - own))
    }
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let wire = &self.0;
        if wire.excess() {
            // The connection's task drains the buffer after each of its turns.
            return Poll::Pending;
        }
        let mut inner = wire.inner.borrow_mut();
        let inner = &mut *inner;
        let before = buf.filled().len();
        if inner.read.is_empty() {
            ready!(Pin::new(inner.stream()?).poll_read(cx, buf))?;
        } else {
            let n = inner.read.unread().len().min(buf.remaining());
            buf.put_slice(&inner.read.unread()[..n]);
            inner.read.consume(n);
        }
        inner.moved += (buf.filled().len() - before) as u64;
        let (allowance, ended) = (&mut inner.allowance, &mut inner.ended);
        let mut fine = true;
        inner.came.follow(&buf.filled()[before..], |frame| match frame {
            Frame::Control => fine &= allowance.control(wire.worker.ledger.now_ms()),
            Frame::Reset(stream) => {
                ended.push(stream);
                fine &= allowance.reset(wire.worker.ledger.now_ms());
            }
            Frame::LastOf(_) | Frame::Work => {}
        });
        wire.excess.set(!fine);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.0.inner.borrow_mut();
        // A frame's header and its payload.
        let bufs = &bufs[..bufs.len().min(2)];
        let all: usize = bufs.iter().map(|buf| buf.len()).sum();
        loop {
            if inner.make_room(all) {
                bufs.iter().for_each(|buf| inner.gathered.extend_from_slice(buf));
                return Poll::Ready(Ok(all));
            }
            let taken = ready!(inner.poll_write_with(cx, bufs))?;
            if taken > 0 {
                return Poll::Ready(Ok(taken));
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// The connection's task writes at the end of its turn, once for all frames.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.inner.borrow_mut();
        ready!(inner.poll_drain(cx))?;
        Pin::new(inner.stream()?).poll_shutdown(cx)
    }
}
