//! Keeps the app's addresses up to date.
//!
//! Uses the system's resolver on a thread for blocking calls: neither musl's nor glibc's caches, so calling it each
//! second does what a DNS client of our own would, and it knows /etc/hosts and nsswitch too. TTLs are ignored:
//! Docker's says 600 s for names that change within one.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::net::lookup_host;
use tokio::task::JoinSet;

use super::backends::{ServerAddr, Upstream};
use crate::config::UpstreamAddr;

/// Time between two lookups of the name.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(1);
/// Time between two lookups while connections fail.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Maximum number of concurrent lookups. One that hangs must not delay the next one's answer.
const MAX_LOOKUPS: usize = 4;
/// Time between two readiness checks of an unhealthy server.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// Looks up the app's name as long as the process lives, and checks whether unhealthy servers `answer`.
pub async fn keep_up_to_date<F>(upstream: Arc<Upstream>, answer: impl Fn(UpstreamAddr) -> F)
where
    F: Future<Output = bool> + Send + 'static,
{
    let mut looking = JoinSet::new();
    loop {
        let began = Instant::now();
        while looking.try_join_next().is_some() {}
        if let Some(name) = upstream.name().filter(|_| looking.len() < MAX_LOOKUPS) {
            let (upstream, number) = (upstream.clone(), upstream.next_look_up());
            looking.spawn(async move {
                // A name without an address: its container is being replaced, so the old addresses stay.
                if let Ok(addrs) = addresses(&name.0, name.1).await {
                    upstream.resolved(&name, number, addrs);
                }
            });
        }
        let look_again = async {
            let _ = tokio::time::timeout(LOOKUP_INTERVAL, upstream.re_resolve.notified()).await;
            tokio::time::sleep(RETRY_INTERVAL.saturating_sub(began.elapsed())).await;
        };
        tokio::select! {
            () = look_again => {}
            () = ask_unhealthy_servers(&upstream, &answer) => {}
        }
    }
}

/// Runs for ever, and sleeps while all servers are healthy. Each has at most one check running.
async fn ask_unhealthy_servers<F>(upstream: &Upstream, answer: &impl Fn(UpstreamAddr) -> F)
where
    F: Future<Output = bool> + Send + 'static,
{
    loop {
        for server in upstream.servers().iter().filter(|server| server.is_unhealthy()).cloned() {
            if server.asked.swap(true, Ordering::Relaxed) {
                continue;
            }
            let answers = answer(server.at.to_addr());
            tokio::spawn(async move {
                if answers.await {
                    server.set_unhealthy(false);
                }
                server.asked.store(false, Ordering::Relaxed);
            });
        }
        match upstream.servers().iter().any(|server| server.is_unhealthy()) {
            true => tokio::time::sleep(CHECK_INTERVAL).await,
            false => std::future::pending().await,
        }
    }
}

/// Returns the TCP addresses of an upstream, without a lookup if they are known; none for a unix socket.
///
/// # Errors
/// As for [`addresses`].
pub async fn locate(addr: &UpstreamAddr) -> io::Result<Vec<SocketAddr>> {
    match (ServerAddr::known(addr), addr.host_and_port()) {
        (Some(ServerAddr::Tcp(addrs) | ServerAddr::Tls(addrs, _)), _) => Ok(addrs),
        (None, Some((host, port))) => addresses(host, port).await,
        (Some(ServerAddr::Unix(_)), _) | (None, None) => Ok(Vec::new()),
    }
}

/// Returns the addresses of a name.
///
/// # Errors
/// If it has none, or no resolver answers.
pub async fn addresses(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok(lookup_host((host, port)).await?.collect())
}
