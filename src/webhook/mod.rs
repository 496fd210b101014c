//! `lameduck webhook`: the patch of `inject` as a mutating admission webhook.
//!
//! ```text
//! API server ─► server   TLS, one request per connection, bounded   ─► review   pure: AdmissionReview in and out
//!                 │                                                      └─ inject::patch
//!                 ├─ events   a skip, reported to the pod's owner
//!                 └─ handover   a newer replica answers instead
//! keeper   every few seconds: the Secret or the files, and the caBundles ─► certs   pure: what to create, serve, trust
//!                 ├─ handover   who is the newest replica
//!                 └─ kube     client of the API server                       └─ x509
//! ```

pub mod certs;
pub mod events;
pub mod handover;
pub mod keeper;
pub mod kube;
pub mod metrics;
pub mod review;
pub mod server;
pub mod state;
pub mod x509;

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::watch;

use self::keeper::Keeper;
use self::kube::Api;
use self::server::{WebhookListener, serve};
use self::state::Webhook;
use crate::cli::WebhookSettings;
use crate::proxy::accept::listener;

/// Runs the webhook until `shutdown`, serves for `--lame-duck` longer, and then finishes the requests in progress.
///
/// # Errors
/// The webhook can't start.
pub async fn run(settings: WebhookSettings, shutdown: impl Future<Output = ()>) -> Result<(), String> {
    let bind = |flag: &str, addr: SocketAddr| {
        let bound = listener::bind(addr, false).and_then(TcpListener::from_std);
        bound.map_err(|why| format!("{flag} {addr}: {why}"))
    };
    let listener = bind("--listen", settings.listen)?;
    let probe = settings.probe_listen.map(|addr| bind("--probe-listen", addr)).transpose()?;
    let namespace = settings.cluster.as_ref().map(|cluster| {
        let path = cluster.account.join("namespace");
        let read = std::fs::read_to_string(&path);
        read.map(|name| name.trim().to_owned()).map_err(|why| format!("{}: {why}", path.display()))
    });
    // Outside a cluster, no client uses the Service's name.
    let namespace = namespace.transpose()?.unwrap_or_default();
    let api = settings.cluster.as_ref().map(Api::new);
    let webhook = Arc::new(Webhook::new(&settings, api.clone())?);
    let addr =
        |listener: &TcpListener| listener.local_addr().map(|addr| addr.to_string()).unwrap_or_default();
    tracing::info!(
        listen = addr(&listener),
        probe = probe.as_ref().map(addr),
        image = settings.image,
        version = env!("CARGO_PKG_VERSION"),
        "listening"
    );
    let port = listener.local_addr().map(|addr| addr.port()).unwrap_or_default();
    let keeper = tokio::spawn(Keeper::new(Arc::clone(&webhook), &settings, api, namespace, port).run());
    let stopped = watch::Sender::new(false);
    let reviews = async {
        serve(listener, WebhookListener::Review, Arc::clone(&webhook), async {
            shutdown.await;
            tokio::time::sleep(settings.lame_duck).await;
            tracing::info!("new connections are refused");
        })
        .await;
        stopped.send_replace(true);
    };
    let probes = async {
        let Some(probe) = probe else { return };
        let mut stop = stopped.subscribe();
        serve(probe, WebhookListener::Probe, Arc::clone(&webhook), async move {
            // The sender outlives this task.
            let _ = stop.wait_for(|stopped| *stopped).await;
        })
        .await;
    };
    tokio::select! {
        _ = async { tokio::join!(reviews, probes) } => {
            tracing::info!("every review was answered");
            Ok(())
        }
        // The keeper never ends by itself; without it the certificate would expire.
        ended = keeper => Err(format!("the keeper of the certificate ended: {ended:?}")),
    }
}
