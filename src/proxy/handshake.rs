//! The TLS handshake of a client's connection: bounded in time, and told of a drain.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::task::Poll;

use tokio::net::TcpStream;

use super::conn::{FRESH, shut};
use super::error;
use super::plane::Worker;
use super::stream::Stream;
use crate::drain::gate::Connected;
use crate::tls::stream::speaks_no_tls;

/// The connection once its handshake is over; none for one that came to nothing, which is closed.
pub async fn handshake(
    tcp: TcpStream,
    peer: SocketAddr,
    connected: Connected,
    worker: &Worker,
) -> Option<(Stream, Connected)> {
    let plane = &worker.plane;
    let termination = plane.tls.as_ref()?;
    let (mut tls, under_way) = match termination.accept(tcp) {
        Ok(accepted) => accepted,
        Err(error) => {
            tracing::warn!(%error, "no TLS session");
            return None;
        }
    };
    let place = worker.ledger.enter(peer);
    place.set_deadline(worker.deadline(termination.timeout()));
    let mut hurried = false;
    let shaken = poll_fn(|cx| {
        place.register(cx);
        match tls.poll_handshake(cx) {
            Poll::Ready(shaken) => return Poll::Ready(shaken),
            Poll::Pending if plane.forced() || place.expired() => {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            // As long as a fresh connection has for its first request.
            Poll::Pending if plane.closing_idle() && !hurried => {
                hurried = true;
                place.set_deadline(worker.deadline(FRESH.min(termination.timeout())));
            }
            Poll::Pending => {}
        }
        Poll::Pending
    })
    .await;
    drop((under_way, place));
    match shaken {
        Ok(()) => {
            worker.ledger.assign();
            return Some((Stream::Tls(tls), connected));
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::debug!(%peer, "a TLS handshake failed: {error}");
            let tcp = tls.into_tcp();
            if speaks_no_tls(&error) {
                // Written to a connection that has had nothing yet: it fits.
                let _ = tcp.try_write(&error::answer(400, "plain HTTP was sent to a port for HTTPS", false));
            }
            worker.ledger.assign();
            // The client reads why before the connection closes.
            let place = worker.ledger.enter(peer);
            shut(Stream::Tcp(tcp), connected, worker).await;
            drop(place);
        }
        Err(error) => tracing::debug!(%peer, "a TLS handshake failed: {error}"),
    }
    None
}
