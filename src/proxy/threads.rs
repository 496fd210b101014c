//! The data plane's threads: each serves its connections, and starts the next step of each.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::LocalRuntime;
use tokio::sync::mpsc;
use tokio::task::spawn_local;

use super::accept::first_speaker::{FirstSpeaker, first_speaker};
use super::accept::listener::{Acceptor, Given, NewListener, Switch};
use super::accept::prepare::{Accepted, Service, welcome};
use super::buffer::Buffer;
use super::close::shut;
use super::connection::{Http2, Idle, Next, Opaque, Tunnel};
use super::downstream::http1;
use super::downstream::http2;
use super::parking::Unparked;
use super::route::Route;
use super::shared::Shared;
use super::stream::Stream;
use super::tunnel::relay;
use super::tunnel::tcp;
use super::worker::Worker;
use crate::allocator;
use crate::drain::gate::Connected;
use crate::drain::machine::Phase;
use crate::repeated::Repeated;

/// How often deadlines are checked.
const SWEEP_INTERVAL: Duration = Duration::from_millis(250);

/// Starts the data plane's threads, which serve the `listeners` as they come. `on_closed` is called when a listening socket has closed.
///
/// # Errors
/// If a thread can't be started.
pub fn start(
    shared: &Arc<Shared>,
    mut listeners: mpsc::UnboundedReceiver<NewListener>,
    switch: Switch,
    on_closed: impl Fn() + Send + Clone + 'static,
) -> io::Result<()> {
    let mut others = Vec::new();
    for number in 1..shared.ledgers.len() {
        let (sender, receiver) = mpsc::unbounded_channel();
        others.push(sender);
        spawn_thread(shared, number, |worker| serve_given(worker, receiver))?;
    }
    let acceptors_plane = shared.clone();
    spawn_thread(shared, 0, move |worker| async move {
        let acceptor = Rc::new(Acceptor::new(acceptors_plane, others, switch));
        while let Some(new) = listeners.recv().await {
            let worker = worker.clone();
            let serve = move |accepted| drop(spawn_local(serve_accepted(accepted, worker.clone())));
            spawn_local(acceptor.clone().run(new, serve, on_closed.clone()));
        }
        std::future::pending::<()>().await;
    })
}

/// Starts a thread with its own runtime, which lives as long as the process.
fn spawn_thread<F: Future<Output = ()>>(
    shared: &Arc<Shared>,
    number: usize,
    work: impl FnOnce(Rc<Worker>) -> F + Send + 'static,
) -> io::Result<()> {
    let shared = shared.clone();
    let run =
        move || match LocalRuntime::new().and_then(|runtime| Ok((runtime, Worker::new(shared, number)?))) {
            Ok((runtime, worker)) => runtime.block_on(async move {
                allocator::keep_at_hand();
                let worker = Rc::new(worker);
                spawn_local(sweep(worker.clone()));
                spawn_local(watch_parked(worker.clone()));
                work(worker).await;
            }),
            Err(error) => {
                tracing::error!(%error, "a data-plane thread could not start");
                std::process::exit(1);
            }
        };
    std::thread::Builder::new().name(format!("data-{number}")).spawn(run).map(drop)
}

/// Serves the connections that the accepting thread gives to this one.
async fn serve_given(worker: Rc<Worker>, mut given: mpsc::UnboundedReceiver<Given>) {
    while let Some(Given { accepted, assigned }) = given.recv().await {
        match accepted.with(tokio::net::TcpStream::from_std) {
            Ok(accepted) => {
                assigned.arrived();
                drop(spawn_local(serve_accepted(accepted, worker.clone())));
            }
            Err(error) => {
                static FAILED: Repeated = Repeated::new();
                if let Some(times) = FAILED.due() {
                    tracing::warn!(%error, times, "an accepted connection could not be served");
                }
            }
        }
    }
}

/// Checks all deadlines once per tick, instead of one timer per connection.
async fn sweep(worker: Rc<Worker>) {
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        ticks.tick().await;
        let (shared, parking) = (&worker.shared, &worker.parking);
        worker.ledger.sweep();
        allocator::give_back();
        shared.share_files();
        parking.expire(shared);
        parking.expire_tunnels(shared, &worker.ledger, |unparked| resume(unparked, &worker));
        worker.close_idle(shared.phase() == Phase::Drained);
    }
}

async fn watch_parked(worker: Rc<Worker>) {
    let watched =
        worker.parking.watch_all(&worker.shared, &worker.ledger, |unparked| resume(unparked, &worker)).await;
    if let Err(error) = watched {
        tracing::error!(%error, "can't watch the parked connections");
    }
}

/// Serves a newly accepted connection.
async fn serve_accepted(accepted: Accepted<tokio::net::TcpStream>, worker: Rc<Worker>) {
    let since = Instant::now();
    let Some(Accepted { stream, peer, service, connected }) = welcome(accepted, &worker).await else {
        return;
    };
    let accepted = if service == Service::Https { Instant::now() } else { since };
    let route = match service {
        Service::Http | Service::Https => worker.app.clone(),
        Service::Tcp(number) => worker.tcp[number].clone(),
        Service::Captured { port, local } => match worker.shared.captured.get(port) {
            Some(port) => worker.captured(&port, local),
            None => return,
        },
    };
    let speaker = match service {
        Service::Http | Service::Https => FirstSpeaker::Client,
        Service::Tcp(_) => FirstSpeaker::App(None),
        Service::Captured { .. } => Box::pin(first_speaker(&stream, peer, &route, &worker)).await,
    };
    let next = match speaker {
        FirstSpeaker::Client => http1::serve(stream, peer, connected, route, Some(accepted), &worker).await,
        FirstSpeaker::App(app) => {
            let client_buf = Buffer::default();
            let opaque = Opaque { client: stream, peer, client_buf, app, in_flight: None, connected, route };
            Next::Opaque(Box::new(opaque))
        }
        FirstSpeaker::Nobody => Next::Close(stream, connected),
    };
    go_on(next, &worker).await;
}

async fn serve_idle(
    stream: Stream,
    peer: SocketAddr,
    connected: Connected,
    route: Rc<Route>,
    accepted: Option<Instant>,
    worker: Rc<Worker>,
) {
    let next = http1::serve(stream, peer, connected, route, accepted, &worker).await;
    go_on(next, &worker).await;
}

async fn serve_http2(connection: Http2, worker: Rc<Worker>) {
    let next = http2::serve(connection, &worker).await;
    go_on(next, &worker).await;
}

async fn serve_opaque(opaque: Box<Opaque>, worker: Rc<Worker>) {
    match tcp::serve(opaque, &worker).await {
        // Already in a task of its own.
        Next::Tunnel(tunnel) => serve_tunnel(tunnel, worker).await,
        other => go_on(other, &worker).await,
    }
}

async fn serve_tunnel(tunnel: Box<Tunnel>, worker: Rc<Worker>) {
    let next = relay::run(tunnel, &worker).await;
    go_on(next, &worker).await;
}

/// Starts the next step of a connection, in a task of its own that is as large as that step needs.
async fn go_on(next: Next, worker: &Rc<Worker>) {
    match next {
        Next::Closed => {}
        Next::Close(stream, connected) => shut(stream, connected, &worker.shared).await,
        // If the kernel has no memory for one more event, the connection is dropped.
        Next::Park(idle) => drop(worker.parking.park(idle)),
        Next::Http2(connection) => {
            let entry = connection.entry.hand_over();
            drop(spawn_local(serve_http2(Http2 { entry, ..connection }, worker.clone())));
        }
        // A separate task, a fraction of the size of one that serves requests.
        Next::Opaque(opaque) => drop(spawn_local(serve_opaque(opaque, worker.clone()))),
        Next::Tunnel(mut tunnel) => {
            tunnel.state.entry = tunnel.state.entry.hand_over();
            drop(spawn_local(serve_tunnel(tunnel, worker.clone())));
        }
        Next::ParkTunnel(mut tunnel) => {
            tunnel.state.entry = tunnel.state.entry.hand_over();
            if let Some(tunnel) = worker.parking.park_tunnel(tunnel) {
                resume(Unparked::Tunnel(tunnel), worker);
            }
        }
    }
}

/// Gives a task to a connection that was parked.
fn resume(unparked: Unparked, worker: &Rc<Worker>) {
    match unparked {
        Unparked::Idle(Idle { stream, peer, connected, route, accepted }) => {
            if let Ok(stream) = stream.go_on() {
                worker.ledger.assign();
                drop(spawn_local(serve_idle(stream, peer, connected, route, accepted, worker.clone())));
            }
        }
        Unparked::Tunnel(parked) => {
            if let Some(tunnel) = relay::unpark(parked, worker) {
                drop(spawn_local(serve_tunnel(tunnel, worker.clone())));
            }
        }
    }
}
