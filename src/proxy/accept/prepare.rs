//! Prepares a connection that was just accepted: who the client is, and what precedes its first request.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::task::Poll;
use std::time::Instant;

use tokio::io::ReadBuf;
use tokio::net::TcpStream;

use super::proxy_protocol;
use super::tls::handshake;
use crate::drain::gate::Connected;
use crate::metrics::add;
use crate::proxy::captured::PortId;
use crate::proxy::shared::FIRST_REQUEST_TIMEOUT;
use crate::proxy::stream::Stream;
use crate::proxy::worker::Worker;
use crate::repeated::ByReason;

/// What a listening socket's connections are served as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// `--listen`.
    Http,
    /// `--tls-listen`.
    Https,
    /// `--tcp`, by its index.
    Tcp(usize),
    /// A captured port.
    Captured {
        /// Which.
        port: PortId,
        /// Reached by loopback, from this pod.
        local: bool,
    },
}

/// An accepted connection. It counts from the accept, so that no drain ends while it is on its way to its thread.
pub struct Accepted<S> {
    /// The client's connection.
    pub stream: S,
    /// The peer's address.
    pub peer: SocketAddr,
    /// Set by the listening socket.
    pub service: Service,
    /// Counts the connection.
    pub connected: Connected,
}

impl<S> Accepted<S> {
    /// Converts the stream.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn with<T>(self, change: impl FnOnce(S) -> io::Result<T>) -> io::Result<Accepted<T>> {
        let Self { stream, peer, service, connected } = self;
        Ok(Accepted { stream: change(stream)?, peer, service, connected })
    }
}

/// Reads the PROXY protocol header and does the TLS handshake, if they are due. Returns the connection with its
/// client's address; `None` if it was closed.
pub async fn welcome(accepted: Accepted<TcpStream>, worker: &Worker) -> Option<Accepted<Stream>> {
    add(&worker.shard.accepted, 1);
    let Accepted { stream, mut peer, service, connected } = accepted;
    let trusted = &worker.shared.settings.proxy_protocol_from;
    if trusted.iter().any(|network| network.contains(peer.ip())) {
        match announced(&stream, peer, worker).await {
            Ok(client) => peer = client,
            Err(why) => {
                if let Some(why) = why {
                    warn_of_closed(peer, why);
                }
                return None;
            }
        }
    }
    if service == Service::Https {
        // Boxed, because few connections are in a handshake at a time.
        let (stream, connected) = Box::pin(handshake(stream, peer, connected, worker)).await?;
        return Some(Accepted { stream, peer, service, connected });
    }
    Some(Accepted { stream: Stream::Tcp(stream), peer, service, connected })
}

fn warn_of_closed(peer: SocketAddr, why: &'static str) {
    static CLOSED: ByReason = ByReason::new();
    if let Some(times) = CLOSED.due(why) {
        tracing::warn!(%peer, times, "a connection from --proxy-protocol-from was closed: {why}");
    }
}

/// Reads exactly the PROXY protocol header. Returns the client that it names, or the peer if it names none.
///
/// # Errors
/// Why there is no header; `None` if the peer sent nothing at all.
async fn announced(
    stream: &TcpStream,
    peer: SocketAddr,
    worker: &Worker,
) -> Result<SocketAddr, Option<&'static str>> {
    let (shared, since) = (&worker.shared, Instant::now());
    let entry = worker.ledger.enter(peer);
    entry.set_deadline(worker.deadline(shared.settings.limits.head_timeout));
    let mut head = Vec::new();
    let client = poll_fn(|cx| {
        entry.register(cx);
        loop {
            let mut room = [0; 256];
            let mut coming = ReadBuf::new(&mut room);
            match stream.poll_peek(cx, &mut coming) {
                Poll::Ready(Ok(n)) if n > 0 => {}
                // A TCP health check.
                Poll::Ready(_) if head.is_empty() => return Poll::Ready(Err(None)),
                Poll::Ready(_) => return Poll::Ready(Err(Some("its PROXY protocol header is incomplete"))),
                Poll::Pending => break,
            }
            let before = head.len();
            head.extend_from_slice(coming.filled());
            let read = proxy_protocol::header(&head).map_err(|broken| Some(broken.0))?;
            // All bytes of an incomplete header belong to the header.
            let own = read.map_or(head.len(), |header| header.len) - before;
            if !matches!(stream.try_read(&mut room[..own]), Ok(n) if n == own) {
                return Poll::Ready(Err(Some("its PROXY protocol header can't be read")));
            }
            if let Some(header) = read {
                return Poll::Ready(Ok(header.client.unwrap_or(peer)));
            }
        }
        if shared.closing_idle() {
            if since.elapsed() >= FIRST_REQUEST_TIMEOUT || shared.forced() {
                return Poll::Ready(Err(None));
            }
            entry.set_deadline(worker.deadline(FIRST_REQUEST_TIMEOUT));
        } else if entry.expired() {
            return Poll::Ready(Err(Some("its PROXY protocol header came too slowly (--head-timeout)")));
        }
        Poll::Pending
    });
    let client = client.await?;
    // The connection gets a new ledger entry, for the client.
    worker.ledger.assign();
    Ok(client)
}
