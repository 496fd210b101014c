//! The lingering close: our end first, then read until the peer's, so that nothing of the last answer is lost.
//!
//! Closing over unread bytes makes the kernel send a reset, which takes from the peer what it hasn't read yet; and
//! when the pod's network goes with the process, so does what the kernel has not delivered (RFC 9112 §9.6).

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;

use super::buffer::Buffer;
use super::shared::Shared;
use super::socket;
use super::stream::Stream;
use crate::drain::gate::Connected;

/// A peer that has everything and doesn't close is waited for so long, and so is one that only sends.
const DELIVERED: Duration = Duration::from_secs(1);
/// Nobody is waited for longer than this, however slowly it reads; a drain's end may be sooner.
const MOST: Duration = Duration::from_secs(300);
/// How often it is asked whether everything has been delivered.
const LOOK: Duration = Duration::from_millis(250);
/// What a peer may still send, in time, when its answer is long there.
const SENDING: Duration = Duration::from_secs(5);

/// Ends our side, then waits for the client's end; counted as lingering meanwhile.
pub async fn shut(mut stream: Stream, connected: Connected, shared: &Shared) {
    shared.lingering.fetch_add(1, Ordering::AcqRel);
    // A client that has much to read yet is not counted any more while it does.
    let mut connected = Some(connected);
    let ended = {
        let mut end = pin!(stream.shutdown());
        let ended = poll_fn(|cx| {
            let ended = end.as_mut().poll(cx);
            connected = None;
            ended
        });
        tokio::time::timeout(MOST, ended).await
    };
    if ended.is_ok() {
        linger(stream).await;
    }
    shared.lingering.fetch_sub(1, Ordering::AcqRel);
}

/// Reads and discards until the peer closes, has had everything for a while, or the bound is over.
async fn linger(mut stream: Stream) {
    let (began, mut delivered) = (Instant::now(), None);
    let mut discarded = Buffer::default();
    while began.elapsed() < MOST {
        let read = tokio::time::timeout(LOOK, discarded.fill(&mut stream)).await;
        match read {
            Ok(Ok(0) | Err(_)) => return,
            Ok(Ok(n)) if began.elapsed() < SENDING => discarded.consume(n),
            Ok(Ok(_)) => return,
            Err(_) if socket::unacknowledged(stream.tcp()) > 0 => delivered = None,
            Err(_) => {
                let since = *delivered.get_or_insert_with(Instant::now);
                if since.elapsed() >= DELIVERED {
                    return;
                }
            }
        }
    }
}
