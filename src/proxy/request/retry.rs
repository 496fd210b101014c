//! Whether a request that failed may be sent again: one rule for HTTP/1.1 and HTTP/2, on either side.

use std::sync::Arc;

use super::exchange::Exchange;
use super::failure::{Failure, Lost, Progress};
use crate::drain::machine::Phase;
use crate::metrics::add;
use crate::upstream::Backend;

/// Limit on the part of a request that is kept for another try, in bytes.
pub const MAX_REPLAY: usize = 64 * 1024;
/// Limit on how often one request is sent.
const MAX_TRIES: u32 = 5;

/// The connection that a failed try used.
#[derive(Clone, Copy)]
pub enum Tried<'a> {
    /// It had carried requests before: the app may have closed it just as it was used again.
    Reused,
    /// It was new, and led to this server.
    New(&'a Arc<Backend>),
    /// Other requests share it; `first` if it was made for this one.
    Shared {
        /// It was made for this request.
        first: bool,
    },
}

/// The tries of one request so far.
#[derive(Debug, Default)]
pub struct Tries {
    failed: u32,
    /// An earlier try reached the app, at least in part.
    sent_before: bool,
}

impl Tries {
    /// Whether the request may be sent again after this failure; counts the try. `unprocessed`: the app said that it did
    /// not look at the request. `rewind` returns whether everything that was sent is still here.
    ///
    /// A request may be sent again if nothing of it went out. One that went out may be if it is idempotent (RFC 9110
    /// §9.2.2) and the app can't have been working on it: it closed a reused connection just as it was used again, or a
    /// shared one that others had used, or its listening socket closed over a new connection before it was accepted. The
    /// last case is a reset from an address where nothing listens any more: an app that had read the request, and perhaps
    /// died of it, would have ended the connection in order.
    pub async fn may_retry(
        &mut self,
        exchange: &Exchange<'_>,
        failure: Failure,
        unprocessed: bool,
        tried: Tried<'_>,
        rewind: impl FnOnce() -> bool,
    ) -> bool {
        self.failed += 1;
        if unprocessed && !self.sent_before {
            exchange.flow.was_left_unread();
        }
        let unanswered = match failure {
            Failure::AppGone(lost) => lost != Lost::Midway || unprocessed,
            Failure::Unprocessed(_) => true,
            _ => false,
        };
        if !unanswered || exchange.flow.is_answering() || self.failed == MAX_TRIES {
            return false;
        }
        let unsent = unprocessed || exchange.flow.progress() == Progress::Unsent;
        let reset = failure == Failure::AppGone(Lost::Reset);
        let safe =
            unsent || (exchange.request.idempotent && self.cant_have_run(exchange, reset, tried).await);
        if !safe || !rewind() {
            return false;
        }
        self.sent_before |= exchange.flow.progress() > Progress::Unsent;
        add(&exchange.worker.shard.retries, 1);
        true
    }

    async fn cant_have_run(&self, exchange: &Exchange<'_>, reset: bool, tried: Tried<'_>) -> bool {
        match tried {
            Tried::Reused => true,
            Tried::Shared { first } => !first || self.failed == 1,
            Tried::New(server) => {
                let serving = exchange.worker.shared.phase() == Phase::Serving;
                serving && reset && exchange.route.pool.has_left(server).await
            }
        }
    }

    /// The failure to report when no connection could be made for a try: once an earlier one was sent, nothing may say
    /// that the app never had the request.
    pub fn unreached(&self, failure: Failure) -> Failure {
        match failure {
            Failure::AppDown if self.sent_before => Failure::AppGone(Lost::Closed),
            other => other,
        }
    }
}
