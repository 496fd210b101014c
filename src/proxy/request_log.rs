//! What is recorded of a request once it has ended: metrics and the access log.

use std::time::Instant;

use super::http1::head::Request;
use crate::metrics::{Ended, Shard, add};

/// What a request's head says.
pub struct RequestLog {
    since: Instant,
    head: usize,
    health_check: bool,
    line: Option<Box<AccessLine>>,
}

/// What only the access log needs.
struct AccessLine {
    method: String,
    path: String,
    peer: String,
}

/// What is known at the end of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// The response's status; 0 if there was none.
    pub status: u16,
    /// Bytes from the client after the head.
    pub received: u64,
    /// Bytes to the client.
    pub sent: u64,
}

impl RequestLog {
    /// Starts the log of a request for this method and target; `log` is whether there is an access log.
    pub fn new(
        since: Instant,
        request: &Request,
        (method, target): (&[u8], &[u8]),
        peer: &str,
        log: bool,
    ) -> Self {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        let line = log.then(|| {
            let mut path = text(target);
            path.truncate(path.find('?').unwrap_or(path.len()));
            Box::new(AccessLine { method: text(method), path, peer: peer.to_owned() })
        });
        Self { since, head: request.len, health_check: request.health_check, line }
    }

    /// Starts the log of a connection relayed to `upstream`.
    pub fn tcp(since: Instant, upstream: &str, peer: &str, log: bool) -> Self {
        let line = log.then(|| {
            Box::new(AccessLine {
                method: "TCP".to_owned(),
                path: upstream.to_owned(),
                peer: peer.to_owned(),
            })
        });
        Self { since, head: 0, health_check: false, line }
    }

    /// Counts the request and logs it.
    pub fn write(&self, shard: &Shard, totals: Totals, ended: Ended) {
        let took = self.since.elapsed();
        add(&shard.received, totals.received + self.head as u64);
        add(&shard.sent, totals.sent);
        match self.health_check {
            true => shard.health_check(totals.status, ended, took),
            false => shard.request(totals.status, ended, took),
        }
        if let Some(line) = &self.line {
            tracing::info!(
                target: "access",
                method = line.method,
                path = line.path,
                status = totals.status,
                received = totals.received,
                sent = totals.sent,
                ms = took.as_millis() as u64,
                ended = ended.name(),
                peer = line.peer,
            );
        }
    }
}
