//! What is written down of a request once it has ended: metrics and the access log.

use std::time::Instant;

use super::http1::head::Request;
use crate::metrics::{Ended, Shard, add};

/// What is known of a request from its head.
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

/// What is known at its end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// The answer's status; 0 when there was none.
    pub status: u16,
    /// Bytes from the client behind the head.
    pub received: u64,
    /// Bytes to the client.
    pub sent: u64,
}

impl RequestLog {
    /// `head` is what the request was read from; `log` whether there is an access log.
    pub fn new(since: Instant, head: &[u8], request: &Request, peer: &str, log: bool) -> Self {
        let text = |range: std::ops::Range<usize>| String::from_utf8_lossy(&head[range]).into_owned();
        let line = log.then(|| {
            let mut path = text(request.target.clone());
            path.truncate(path.find('?').unwrap_or(path.len()));
            Box::new(AccessLine { method: text(request.method.clone()), path, peer: peer.to_owned() })
        });
        Self { since, head: request.len, health_check: request.health_check, line }
    }

    /// Of a connection that is passed on byte for byte to `upstream`.
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

    /// Counts it and logs it.
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
