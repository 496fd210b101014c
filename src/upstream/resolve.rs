//! Keeps the app's addresses up to date.
//!
//! By the system's own resolver, on a thread for blocking calls: neither musl's nor glibc's keeps answers, so asking
//! it each second is what a DNS client of our own would do, and it knows /etc/hosts and nsswitch too. An answer's TTL is not
//! looked at: Docker's says 600 s for names that change within one.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::lookup_host;

use super::backends::{At, Backend, Upstream};
use super::open;

/// Between two look-ups of the name.
const EVERY: Duration = Duration::from_secs(1);
/// Between two when connections fail.
const IN_DOUBT: Duration = Duration::from_millis(100);
/// Look-ups at the same time. One that hangs must not keep the next one's answer.
const AT_ONCE: usize = 4;
/// A server that is down gets so long to take a connection.
const PROBE: Duration = Duration::from_secs(1);

/// Looks the app's name up for as long as the process lives, and asks servers that are down whether they are back.
pub async fn keep_up_to_date(upstream: Arc<Upstream>) {
    let mut looking = tokio::task::JoinSet::new();
    let mut probed = Instant::now();
    loop {
        let began = Instant::now();
        if let Some(name) = upstream.name().filter(|_| looking.len() < AT_ONCE) {
            let upstream = upstream.clone();
            looking.spawn(async move {
                // A name without an address: its container is being replaced, so the old addresses are as good as any.
                if let Ok(addrs) = addresses(&name.0, name.1).await {
                    upstream.resolved(&name, addrs);
                }
            });
        }
        if probed.elapsed() >= EVERY {
            probed = Instant::now();
            upstream.servers().iter().filter(|server| server.is_aside()).cloned().for_each(probe);
        }
        let _ = tokio::time::timeout(EVERY, upstream.doubt.notified()).await;
        tokio::time::sleep(IN_DOUBT.saturating_sub(began.elapsed())).await;
        while looking.try_join_next().is_some() {}
    }
}

/// What a name resolves to.
///
/// # Errors
/// When it resolves to nothing, or nobody answers.
pub async fn addresses(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok(lookup_host((host, port)).await?.collect())
}

fn probe(server: Arc<Backend>) {
    tokio::spawn(async move {
        let At::Tcp(addrs) = &server.at else { return };
        if tokio::time::timeout(PROBE, open(addrs)).await.is_ok_and(|opened| opened.is_ok()) {
            server.set_aside(false);
        }
    });
}
