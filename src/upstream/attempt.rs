//! One attempt to connect to one of the app's servers.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::backends::{Backend, ServerAddr, Upstream};
use super::slots::Slot;
use super::stream::{UpstreamSocket, open};
use crate::tls::client::handshake;

/// Time limit for one attempt to connect; a new attempt retries sooner than the kernel would.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);
/// How often an attempt to connect checks whether its server is still one of the app's.
const RECHECK_INTERVAL: Duration = Duration::from_millis(50);

/// Attempts to connect, until the server is no longer one of the app's: a container that is gone never answers.
/// `protocol` is offered by ALPN if TLS is used. `source`: address of this host that the server should see.
pub(super) async fn attempt(
    upstream: Arc<Upstream>,
    backend: Arc<Backend>,
    protocol: &[u8],
    source: Option<IpAddr>,
) -> io::Result<(UpstreamSocket, Slot)> {
    let slot = Slot::take()?;
    let connecting = async {
        match &backend.at {
            ServerAddr::Tcp(addrs) | ServerAddr::Tls(addrs, _) => {
                open(addrs, source).await.map(UpstreamSocket::Tcp)
            }
            ServerAddr::Unix(path) => UpstreamSocket::unix(path).await,
        }
    };
    let gone = async {
        for _ in 0..ATTEMPT_TIMEOUT.as_millis() / RECHECK_INTERVAL.as_millis() {
            tokio::time::sleep(RECHECK_INTERVAL).await;
            if backend.is_gone() {
                return Err(io::ErrorKind::NotFound.into());
            }
            upstream.re_resolve.notify_one();
        }
        Err(io::ErrorKind::TimedOut.into())
    };
    let stream = tokio::select! {
        biased;
        connected = connecting => connected,
        gone = gone => gone,
    }?;
    let stream = match (stream, &backend.at) {
        // The server has accepted the connection, so the handshake has its own time limit.
        (UpstreamSocket::Tcp(tcp), ServerAddr::Tls(_, name)) => {
            UpstreamSocket::Tls(handshake(tcp, name, protocol).await?)
        }
        (stream, _) => stream,
    };
    Ok((stream, slot))
}
