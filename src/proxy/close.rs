//! The lingering close: closes our side first, then reads until the peer closes, so that nothing of the last response
//! is lost.
//!
//! Closing with unread bytes makes the kernel send a reset, which discards what the peer hasn't read yet; and once
//! the pod's network goes with the process, so does what the kernel has not delivered (RFC 9112 §9.6).

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

/// Time limit for a peer that has received everything to close its side.
const DELIVERED_TIMEOUT: Duration = Duration::from_secs(1);
/// Time limit for the whole close, however slowly the peer reads; the end of a drain may come sooner.
const MAX_LINGER: Duration = Duration::from_secs(300);
/// How often the kernel is asked whether everything was delivered.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// Time limit for a peer that keeps sending.
const SENDING_TIMEOUT: Duration = Duration::from_secs(5);

/// Closes our side, then waits for the client's; the connection counts as lingering meanwhile.
pub async fn shut(mut stream: Stream, connected: Connected, shared: &Shared) {
    shared.lingering.fetch_add(1, Ordering::AcqRel);
    // A client that still has much to read no longer counts as connected.
    let mut connected = Some(connected);
    let ended = {
        let mut end = pin!(stream.shutdown());
        let ended = poll_fn(|cx| {
            let ended = end.as_mut().poll(cx);
            connected = None;
            ended
        });
        tokio::time::timeout(MAX_LINGER, ended).await
    };
    if ended.is_ok() {
        linger(stream).await;
    }
    shared.lingering.fetch_sub(1, Ordering::AcqRel);
}

/// Reads and discards until the peer closes, has had everything for a while, or a time limit passes.
async fn linger(mut stream: Stream) {
    let (began, mut delivered) = (Instant::now(), None);
    let mut discarded = Buffer::default();
    while began.elapsed() < MAX_LINGER {
        let read = tokio::time::timeout(POLL_INTERVAL, discarded.fill(&mut stream)).await;
        match read {
            Ok(Ok(0) | Err(_)) => return,
            Ok(Ok(n)) if began.elapsed() < SENDING_TIMEOUT => discarded.consume(n),
            Ok(Ok(_)) => return,
            Err(_) if socket::unacknowledged(stream.tcp()) > 0 => delivered = None,
            Err(_) => {
                let since = *delivered.get_or_insert_with(Instant::now);
                if since.elapsed() >= DELIVERED_TIMEOUT {
                    return;
                }
            }
        }
    }
}
