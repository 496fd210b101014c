//! Keeps the app's addresses up to date.
//!
//! By the system's own resolver, on a thread for blocking calls: neither musl's nor glibc's keeps answers, so asking
//! it each second is what a DNS client of our own would do, and it knows /etc/hosts and nsswitch too. An answer's TTL is not
//! looked at: Docker's says 600 s for names that change within one.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::net::lookup_host;
use tokio::task::JoinSet;

use super::backends::{ServerAddr, Upstream};
use crate::config::UpstreamAddr;

/// Between two look-ups of the name.
const EVERY: Duration = Duration::from_secs(1);
/// Between two when connections fail.
const IN_DOUBT: Duration = Duration::from_millis(100);
/// Look-ups at the same time. One that hangs must not keep the next one's answer.
const AT_ONCE: usize = 4;
/// Between two questions to an unhealthy server.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// Looks the app's name up for as long as the process lives, and asks unhealthy servers whether they `answer`.
pub async fn keep_up_to_date<F>(upstream: Arc<Upstream>, answer: impl Fn(UpstreamAddr) -> F)
where
    F: Future<Output = bool> + Send + 'static,
{
    let mut looking = JoinSet::new();
    loop {
        let began = Instant::now();
        while looking.try_join_next().is_some() {}
        if let Some(name) = upstream.name().filter(|_| looking.len() < AT_ONCE) {
            let (upstream, number) = (upstream.clone(), upstream.next_look_up());
            looking.spawn(async move {
                // A name without an address: its container is being replaced, so the old addresses are as good as any.
                if let Ok(addrs) = addresses(&name.0, name.1).await {
                    upstream.resolved(&name, number, addrs);
                }
            });
        }
        let look_again = async {
            let _ = tokio::time::timeout(EVERY, upstream.re_resolve.notified()).await;
            tokio::time::sleep(IN_DOUBT.saturating_sub(began.elapsed())).await;
        };
        tokio::select! {
            () = look_again => {}
            () = ask_unhealthy_servers(&upstream, &answer) => {}
        }
    }
}

/// Goes on for ever, and wakes nobody while all are healthy. Each is asked once at a time.
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
            true => tokio::time::sleep(ASK_AGAIN).await,
            false => std::future::pending().await,
        }
    }
}

/// Where an upstream is by TCP; nobody is asked for what is known. Nothing for a unix socket.
///
/// # Errors
/// As [`addresses`].
pub async fn locate(addr: &UpstreamAddr) -> io::Result<Vec<SocketAddr>> {
    match (ServerAddr::known(addr), addr.host_and_port()) {
        (Some(ServerAddr::Tcp(addrs) | ServerAddr::Tls(addrs, _)), _) => Ok(addrs),
        (None, Some((host, port))) => addresses(host, port).await,
        (Some(ServerAddr::Unix(_)), _) | (None, None) => Ok(Vec::new()),
    }
}

/// What a name resolves to.
///
/// # Errors
/// When it resolves to nothing, or nobody answers.
pub async fn addresses(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok(lookup_host((host, port)).await?.collect())
}
