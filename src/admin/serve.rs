//! Accepts and serves connections. One request per connection: without keep-alive, every limit is simple.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::geteuid;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};

use super::control_socket::ControlSocket;
use super::{Admin, AdminListener, Bound};
use crate::descriptors::Shares;
use crate::repeated::Repeated;

/// Time limit for a request head, after accept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for writing a response.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Limit on a request head in bytes.
const MAX_HEAD: usize = 16 << 10;
/// Time limit after `shutdown` for responses in progress: the hook's callers are waiting for theirs.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(500);
/// Pause after a failed accept (no free file descriptor).
const BACK_OFF: Duration = Duration::from_millis(50);

impl Bound {
    /// Serves until `shutdown`, then for at most half a second more until the responses in progress are written, and
    /// removes the control socket. Clients beyond their share of open connections wait in the accept queue. Requires a
    /// runtime with I/O and time.
    ///
    /// # Errors
    /// The runtime can't register the sockets.
    pub async fn serve(
        self,
        admin: Admin,
        shares: Shares,
        shutdown: impl Future<Output = ()>,
    ) -> io::Result<()> {
        let Self { probe, control, control_tcp, token } = self;
        let ControlSocket { listener: control, file, .. } = control;
        let admin = Arc::new(admin);
        let stop = watch::Sender::new(false);
        let tcp = async |listener: Option<std::net::TcpListener>, limit, which| {
            let Some(listener) = listener else { return Ok(()) };
            let listener = TcpListener::from_std(listener)?;
            let accept = async move || listener.accept().await.map(|(stream, _)| stream);
            serve_all(accept, limit, which, Arc::clone(&admin), stop.subscribe()).await;
            Ok(())
        };
        let anybody_connects = file.is_none();
        let unix = async |listener| {
            let listener = UnixListener::from_std(listener)?;
            let accept = async move || loop {
                let stream = listener.accept().await?.0;
                if !anybody_connects || is_ours(&stream) {
                    return Ok(stream);
                }
            };
            let (admin, stop) = (Arc::clone(&admin), stop.subscribe());
            serve_all(accept, shares.control, AdminListener::ControlSocket, admin, stop).await;
            Ok(())
        };
        let end = async {
            shutdown.await;
            stop.send_replace(true);
            Ok::<_, io::Error>(())
        };
        let served = tokio::try_join!(
            tcp(probe, shares.probe, AdminListener::Probe { token }),
            tcp(control_tcp, shares.control, AdminListener::ControlTcp),
            unix(control),
            end,
        );
        drop(file);
        served.map(|_| ())
    }
}

/// Whether the peer is this user or root. Without a file there is no mode that keeps other users out.
fn is_ours(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == geteuid().as_raw())
}

async fn serve_all<S>(
    accept: impl AsyncFn() -> io::Result<S>,
    limit: u32,
    which: AdminListener,
    admin: Arc<Admin>,
    mut stop: watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let places = Arc::new(Semaphore::new(limit as usize));
    let connection_stop = stop.clone();
    let accept_all = async {
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            match accept().await {
                Ok(stream) => {
                    let (which, admin, stop) = (which.clone(), Arc::clone(&admin), connection_stop.clone());
                    tokio::spawn(serve_one(stream, which, admin, stop, place));
                }
                Err(error) => {
                    static FAILED: Repeated = Repeated::new();
                    if let Some(times) = FAILED.due() {
                        tracing::warn!(%error, times, "accept failed on a probe or control listener");
                    }
                    tokio::time::sleep(BACK_OFF).await;
                }
            }
        }
    };
    tokio::select! {
        () = accept_all => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
    drop(accept);
    // All permits are free when all connections have ended.
    let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, places.acquire_many(limit)).await;
}

async fn serve_one<S>(
    stream: S,
    which: AdminListener,
    admin: Arc<Admin>,
    mut stop: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let answered = Notify::new();
    let service = service_fn(async |ask| {
        let answer = admin.answer(&which, &ask).await;
        answered.notify_one();
        Ok::<_, Infallible>(answer)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .keep_alive(false)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let mut unread = pin!(async {
        answered.notified().await;
        tokio::time::sleep(WRITE_TIMEOUT).await;
    });
    let mut stopping = false;
    loop {
        tokio::select! {
            _ = connection.as_mut() => return,
            () = unread.as_mut() => return,
            _ = stop.wait_for(|stop| *stop), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}
