//! The queue of held requests, in order of arrival. Only held requests take the lock.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use crate::drain::gate::Gate;

/// The queue. It releases its requests one by one, so that they reach the app in order.
#[derive(Debug, Default)]
pub struct HoldQueue(Mutex<HeldRequest>);

#[derive(Debug, Default)]
struct HeldRequest {
    /// The wakers, by ticket number.
    wakers: BTreeMap<u64, Option<Waker>>,
    next: u64,
    bytes: usize,
    moving: bool,
}

/// A place in the queue.
struct Ticket<'l> {
    queue: &'l HoldQueue,
    gate: &'l Gate,
    number: u64,
    bytes: usize,
}

impl HoldQueue {
    /// Holds or releases the queue. On release, new requests wait until all earlier ones have gone.
    pub fn hold(&self, gate: &Gate, on: bool) {
        let mut waiting = self.waiting();
        waiting.moving = !on;
        if on {
            gate.set_holding(true);
        } else {
            waiting.move_on(gate);
        }
    }

    /// Waits for its turn. Returns false if `bytes` would exceed the queue's limit of `max` bytes; an empty queue
    /// accepts a request of any size.
    pub async fn wait(&self, gate: &Gate, bytes: usize, max: usize) -> bool {
        let ticket = {
            let mut waiting = self.waiting();
            if waiting.bytes > 0 && waiting.bytes + bytes > max {
                return false;
            }
            waiting.bytes += bytes;
            waiting.next += 1;
            let number = waiting.next;
            waiting.wakers.insert(number, None);
            Ticket { queue: self, gate, number, bytes }
        };
        poll_fn(|cx| {
            let mut waiting = self.waiting();
            let first = waiting.wakers.first_key_value().is_some_and(|(first, _)| *first == ticket.number);
            if first && waiting.moving {
                return Poll::Ready(());
            }
            waiting.wakers.insert(ticket.number, Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
        true
    }

    fn waiting(&self) -> MutexGuard<'_, HeldRequest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HeldRequest {
    fn move_on(&self, gate: &Gate) {
        match self.wakers.first_key_value() {
            Some((_, Some(first))) => first.wake_by_ref(),
            // It is about to check by itself.
            Some((_, None)) => {}
            None => gate.set_holding(false),
        }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut waiting = self.queue.waiting();
        waiting.wakers.remove(&self.number);
        waiting.bytes -= self.bytes;
        if waiting.moving {
            waiting.move_on(self.gate);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    #[test]
    fn who_came_first_goes_first_and_newcomers_wait_behind_them() {
        let (queue, gate) = (HoldQueue::default(), Gate::new(|| ()));
        let cx = &mut Context::from_waker(Waker::noop());
        queue.hold(&gate, true);
        let mut first = pin!(queue.wait(&gate, 1, 9));
        let mut second = Box::pin(queue.wait(&gate, 1, 9));
        assert!(first.as_mut().poll(cx).is_pending() && second.as_mut().poll(cx).is_pending());
        queue.hold(&gate, false);
        assert!(gate.holding(), "a newcomer would overtake");
        let mut third = pin!(queue.wait(&gate, 1, 9));
        assert!(third.as_mut().poll(cx).is_pending() && second.as_mut().poll(cx).is_pending());
        assert_eq!(first.as_mut().poll(cx), Poll::Ready(true));
        // A ticket that gives up leaves no gap.
        drop(second);
        assert_eq!(third.as_mut().poll(cx), Poll::Ready(true));
        assert!(!gate.holding());
    }

    #[test]
    fn bytes_are_bounded_but_one_request_always_fits() {
        let (queue, gate) = (HoldQueue::default(), Gate::new(|| ()));
        let cx = &mut Context::from_waker(Waker::noop());
        queue.hold(&gate, true);
        let mut large = pin!(queue.wait(&gate, 100, 10));
        assert!(large.as_mut().poll(cx).is_pending());
        assert_eq!(pin!(queue.wait(&gate, 1, 10)).poll(cx), Poll::Ready(false));
    }
}
