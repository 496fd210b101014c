//! Who speaks first on a connection to a captured port: with HTTP it is the client, with MySQL or SMTP the app.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::metrics::add;
use crate::proxy::captured::Speaks;
use crate::proxy::first_bytes::is_http_server;
use crate::proxy::request::exchange::reach;
use crate::proxy::route::Route;
use crate::proxy::shared::FIRST_REQUEST_TIMEOUT;
use crate::proxy::stream::Stream;
use crate::proxy::worker::Worker;
use crate::upstream::{Connection, UpstreamReader};

/// Time for a client to send its first byte before the app gets the chance to speak first.
const CLIENT_FIRST: Duration = Duration::from_millis(20);

/// Who speaks first.
pub enum FirstSpeaker {
    /// The client, or nobody yet on a port where clients do: its first bytes decide.
    Client,
    /// The app, on this connection; without one, the port is known not to be HTTP.
    App(Option<Connection>),
    /// Nobody, and idle connections have to close.
    Nobody,
}

/// Finds out who speaks first. Reads nothing: the bytes stay in the kernel. A client that says nothing for 20 ms may
/// wait for the app to speak, so the app is connected as well; whichever side speaks first decides.
pub async fn first_speaker(
    client: &Stream,
    peer: std::net::SocketAddr,
    route: &Route,
    worker: &Worker,
) -> FirstSpeaker {
    let Some(port) = &route.captured else { return FirstSpeaker::Client };
    match port.speaks() {
        Speaks::Http => return FirstSpeaker::Client,
        Speaks::Opaque => return FirstSpeaker::App(None),
        Speaks::Unknown => {}
    }
    let (tcp, since) = (client.tcp(), Instant::now());
    // Not `readable`, which may be ready for no reason.
    let mut first = [0];
    if tokio::time::timeout(CLIENT_FIRST, tcp.peek(&mut first)).await.is_ok() {
        return FirstSpeaker::Client;
    }
    // A client that speaks is not kept waiting for an app that restarts.
    let connected = tokio::select! {
        app = reach(worker, async || route.pool.connect().await) => app,
        _ = tcp.peek(&mut first) => return FirstSpeaker::Client,
    };
    let Ok(mut app) = connected else { return FirstSpeaker::Client };
    add(&worker.shard.connects, 1);
    let entry = worker.ledger.enter(peer);
    let speaker = {
        let mut client_speaks = pin!(tcp.peek(&mut first));
        let mut app_speaks = pin!(greets(app.split().0));
        poll_fn(|cx| {
            entry.register(cx);
            let (shared, age) = (&worker.shared, since.elapsed());
            let closing = shared.closing_idle() && age >= FIRST_REQUEST_TIMEOUT;
            if client_speaks.as_mut().poll(cx).is_ready() || port.speaks() == Speaks::Http {
                return Poll::Ready(FirstSpeaker::Client);
            }
            match app_speaks.as_mut().poll(cx) {
                Poll::Ready(Some(whole)) => {
                    // Less than a frame's head could still be HTTP/2 on the next connection.
                    if whole {
                        port.learn(Speaks::Opaque);
                    }
                    return Poll::Ready(FirstSpeaker::App(None));
                }
                // It closed, or it speaks HTTP: the client is to speak.
                Poll::Ready(None) => return Poll::Ready(FirstSpeaker::Client),
                Poll::Pending => {}
            }
            if closing || shared.forced() || age >= shared.idle_timeout() {
                return Poll::Ready(FirstSpeaker::Nobody);
            }
            entry.set_deadline(worker.deadline(FIRST_REQUEST_TIMEOUT));
            Poll::Pending
        })
        .await
    };
    if !matches!(speaker, FirstSpeaker::Nobody) {
        // The connection gets a new ledger entry from whatever serves it.
        worker.ledger.assign();
    }
    match speaker {
        FirstSpeaker::App(_) => FirstSpeaker::App(Some(app)),
        // The app's connection is not kept: an app may have spoken on it.
        other => other,
    }
}

/// Waits for the app's first bytes. Returns whether there are enough to be sure of all connections, if they are a greeting
/// that isn't HTTP.
async fn greets(app: UpstreamReader<'_>) -> Option<bool> {
    // A frame's head of HTTP/2.
    let mut first = [0; 9];
    match app {
        UpstreamReader::Tcp(mut half) => {
            let n = half.peek(&mut first).await.ok().filter(|n| *n > 0)?;
            (!is_http_server(&first[..n])).then_some(n == first.len())
        }
        // Captured apps are reached by TCP only.
        UpstreamReader::Tls(_) | UpstreamReader::Unix(_) => None,
    }
}
