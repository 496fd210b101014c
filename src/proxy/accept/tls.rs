//! The TLS handshake with a client: bounded in time, and aware of a drain.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::task::{Context, Poll};

use tokio::io::ReadBuf;
use tokio::net::TcpStream;

use crate::drain::gate::Connected;
use crate::drain::ledger::LedgerEntry;
use crate::proxy::close::shut;
use crate::proxy::request::failure;
use crate::proxy::shared::FIRST_REQUEST_TIMEOUT;
use crate::proxy::stream::Stream;
use crate::proxy::worker::Worker;
use crate::repeated::Repeated;
use crate::tls::stream::speaks_no_tls;

/// Returns the connection after its handshake; `None` if it failed and the connection was closed.
pub async fn handshake(
    tcp: TcpStream,
    peer: SocketAddr,
    connected: Connected,
    worker: &Worker,
) -> Option<(Stream, Connected)> {
    let shared = &worker.shared;
    let termination = shared.tls.as_ref()?;
    let entry = worker.ledger.enter(peer);
    entry.set_deadline(worker.deadline(termination.timeout()));
    // A silent client has the time limit of a connection and takes up no place for a handshake.
    let mut byte = [0];
    let spoke = in_time(worker, &entry, |cx| tcp.poll_peek(cx, &mut ReadBuf::new(&mut byte)));
    if !matches!(spoke.await, Ok(n) if n > 0) {
        return None;
    }
    let mut turn = pin!(termination.place());
    let under_way = in_time(worker, &entry, |cx| turn.as_mut().poll(cx)).await.ok()?;
    let mut tls = match termination.accept(tcp) {
        Ok(accepted) => accepted,
        Err(error) => {
            static FAILED: Repeated = Repeated::new();
            if let Some(times) = FAILED.due() {
                tracing::warn!(%error, times, "could not create a TLS session");
            }
            return None;
        }
    };
    let shaken = in_time(worker, &entry, |cx| tls.poll_handshake(cx)).await;
    drop((under_way, entry));
    match shaken {
        Ok(()) => {
            worker.ledger.assign();
            return Some((Stream::Tls(tls), connected));
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::debug!(%peer, "a TLS handshake failed: {error}");
            let tcp = tls.into_tcp();
            if speaks_no_tls(&error) {
                // The socket's send buffer is empty, so this fits.
                let _ = tcp.try_write(&failure::answer(400, "plain HTTP was sent to an HTTPS port", false));
            }
            worker.ledger.assign();
            // Lets the client read the reason before the connection closes.
            let entry = worker.ledger.enter(peer);
            shut(Stream::Tcp(tcp), connected, shared).await;
            drop(entry);
        }
        Err(error) => tracing::debug!(%peer, "a TLS handshake failed: {error}"),
    }
    None
}

/// Returns the result of `poll`, unless the entry's deadline passes first or the drain leaves no more time.
async fn in_time<T>(
    worker: &Worker,
    entry: &LedgerEntry,
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<io::Result<T>>,
) -> io::Result<T> {
    let shared = &worker.shared;
    let mut hurried = false;
    poll_fn(|cx| {
        entry.register(cx);
        match poll(cx) {
            Poll::Ready(done) => return Poll::Ready(done),
            Poll::Pending if shared.forced() || entry.expired() => {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            // A fresh connection has as long for its first request.
            Poll::Pending if shared.closing_idle() && !hurried => {
                hurried = true;
                entry.set_deadline(worker.deadline(FIRST_REQUEST_TIMEOUT));
            }
            Poll::Pending => {}
        }
        Poll::Pending
    })
    .await
}
