//! Connections relayed byte for byte, of `--tcp` or of a captured port. Each counts as in flight from its accept (or
//! from its first bytes, where these decide) to its close, and is a tunnel once the app has accepted it.

use std::future::{Future, poll_fn};
use std::hash::{BuildHasher, RandomState};
use std::pin::pin;
use std::task::Poll;
use std::time::Instant;

use crate::drain::ledger::{Class, LedgerEntry};
use crate::metrics::add;
use crate::proxy::buffer::Buffer;
use crate::proxy::connection::{Next, Opaque, Tunnel, TunnelKind, TunnelState};
use crate::proxy::request::exchange::{held_back, reach};
use crate::proxy::request::failure::{Failure, Progress};
use crate::proxy::request_log::{RequestLog, Totals};
use crate::proxy::route::Route;
use crate::proxy::socket::keep_alive;
use crate::proxy::stream::{Source, Stream};
use crate::proxy::worker::Worker;
use crate::upstream::Connection;

/// Connects a client to the app. Returns the tunnel it becomes.
pub async fn serve(opaque: Box<Opaque>, worker: &Worker) -> Next {
    let Opaque { mut client, peer, client_buf, app, in_flight, connected, route } = *opaque;
    let since = Instant::now();
    let (shared, entry) = (&worker.shared, worker.ledger.enter(peer));
    let upstream = route.pool.upstream().own().to_string();
    let ip = peer.ip().to_canonical().to_string();
    let log = RequestLog::tcp(since, &upstream, &ip, shared.settings.access_log);
    let admitted = match in_flight {
        Some(in_flight) => Ok(in_flight),
        None => shared.gate.admit().map(|in_flight| in_flight.into_owned(&shared.gate)),
    };
    entry.begin(b"TCP", upstream.as_bytes(), since);
    entry.set_class(Class::Tcp);
    keep_alive(client.tcp());
    let reached = match &admitted {
        Ok(_) if shared.past_in_flight() => Err(Failure::TooManyInFlight),
        Ok(_) => match app {
            Some(app) => Ok(app),
            None => reached(&mut client, &route, &entry, worker).await,
        },
        Err(_) => Err(Failure::Forced),
    };
    match (reached, admitted) {
        (Ok(app), Ok(in_flight)) => {
            let [share, ..] = RandomState::new().hash_one(0).to_ne_bytes();
            let state = TunnelState {
                kind: if route.captured.is_some() { TunnelKind::Opaque { share } } else { TunnelKind::Raw },
                app_owes: false,
                unheard: !route.local,
                in_flight: in_flight.into_tunnel(),
                log,
                totals: Totals::default(),
                moved_at: worker.ledger.now_ms(),
                entry,
                connected,
            };
            let app_buf = Buffer::default();
            Next::Tunnel(Box::new(Tunnel { client, app, app_buf, client_buf, state }))
        }
        (reached, _in_flight) => {
            let failure = reached.err().unwrap_or(Failure::Forced);
            log.write(&worker.shard, Totals::default(), failure.response(Progress::Unsent).ended);
            // The client must not mistake this for a regular end.
            client.reset_on_close();
            Next::Closed
        }
    }
}

/// Connects to the app once that is allowed. Reads nothing from the client before: its bytes stay in the kernel.
async fn reached(
    client: &mut Stream,
    route: &Route,
    entry: &LedgerEntry,
    worker: &Worker,
) -> Result<Connection, Failure> {
    let (reader, _) = client.split();
    let mut work = pin!(async {
        held_back(&worker.shared, entry, 0).await?;
        let app = reach(worker, async || route.pool.connect().await).await?;
        add(&worker.shard.connects, 1);
        Ok(app)
    });
    // A client that has only closed its sending side may still wait for a response.
    let mut gone = pin!(reader.failed());
    poll_fn(|cx| {
        entry.register(cx);
        match work.as_mut().poll(cx) {
            Poll::Ready(reached) => Poll::Ready(reached),
            Poll::Pending if worker.shared.forced() => Poll::Ready(Err(Failure::Forced)),
            Poll::Pending => gone.as_mut().poll(cx).map(|()| Err(Failure::ClientGone)),
        }
    })
    .await
}
