//! `lameduck webhook`: the patch of `inject` as a mutating admission webhook.
//!
//! ```text
//! API server ─► server   TLS, one request per connection, bounded   ─► review   pure: AdmissionReview in and out
//!                 │                                                      └─ inject::patch
//!                 └─ events   a skip, told to the pod's owner
//! keeper   every few seconds: the Secret or the files, and the caBundles ─► certs   pure: what to make, serve, trust
//!                 └─ kube     the API server's client                        └─ x509
//! ```

pub mod certs;
pub mod events;
pub mod keeper;
pub mod kube;
pub mod metrics;
pub mod review;
pub mod server;
pub mod x509;

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::ServerConfig;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use self::events::Events;
use self::keeper::Keeper;
use self::kube::Api;
use self::metrics::Metrics;
use self::server::{Door, serve};
use self::x509::{Seconds, Served, provider};
use crate::cli::{WebhookSettings, check_proxy};
use crate::inject;
use crate::inject::Services;
use crate::proxy::listen;

/// Bytes of a hook's token: more than anybody can guess.
const TOKEN: usize = 24;

/// What the listeners and the keeper share.
pub struct Webhook {
    settings: inject::Settings,
    tls: Arc<ServerConfig>,
    certificate: Arc<Certificate>,
    metrics: Arc<Metrics>,
    events: Option<Events>,
    /// For bodies that are being read.
    room: Semaphore,
    standing: Mutex<Standing>,
}

/// How the certificate stands.
#[derive(Default)]
struct Standing {
    valid: Option<Range<Seconds>>,
    accepted: bool,
    problem: Option<String>,
}

/// What the next client is shown.
#[derive(Debug, Default)]
struct Certificate(Mutex<Option<Arc<CertifiedKey>>>);

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        lock(&self.0).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the webhook until `shutdown`; then it serves for `--lame-duck` more, and ends what is under way.
///
/// # Errors
/// When it can't start.
pub async fn run(settings: WebhookSettings, shutdown: impl Future<Output = ()>) -> Result<(), String> {
    let bind = |flag: &str, addr: SocketAddr| {
        let bound = listen::bind(addr, false).and_then(TcpListener::from_std);
        bound.map_err(|why| format!("{flag} {addr}: {why}"))
    };
    let listener = bind("--listen", settings.listen)?;
    let probe = settings.probe_listen.map(|addr| bind("--probe-listen", addr)).transpose()?;
    let namespace = settings.cluster.as_ref().map(|cluster| {
        let path = cluster.account.join("namespace");
        let read = std::fs::read_to_string(&path);
        read.map(|name| name.trim().to_owned()).map_err(|why| format!("{}: {why}", path.display()))
    });
    // Outside a cluster nobody asks by the Service's name.
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
    let keeper = tokio::spawn(Keeper::new(Arc::clone(&webhook), &settings, api, namespace).run());
    let stopped = watch::Sender::new(false);
    let reviews = async {
        serve(listener, Door::Review, Arc::clone(&webhook), async {
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
        serve(probe, Door::Probe, Arc::clone(&webhook), async move {
            // The sender outlives this.
            let _ = stop.wait_for(|stopped| *stopped).await;
        })
        .await;
    };
    tokio::select! {
        _ = async { tokio::join!(reviews, probes) } => {
            tracing::info!("every review has its answer");
            Ok(())
        }
        // It never ends by itself, and without it the certificate would expire one day.
        ended = keeper => Err(format!("the keeper of the certificate ended: {ended:?}")),
    }
}

impl Webhook {
    fn new(settings: &WebhookSettings, api: Option<Api>) -> Result<Self, String> {
        let certificate = Arc::new(Certificate::default());
        let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.map_err(|why| why.to_string())?.with_no_client_auth();
        let mut tls = builder.with_cert_resolver(Arc::<Certificate>::clone(&certificate));
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Nobody comes back to a session: each review has a handshake of its own.
        tls.session_storage = Arc::new(NoServerSessionStorage {});
        tls.send_tls13_tickets = 0;
        let metrics = Arc::new(Metrics::default());
        Ok(Self {
            settings: inject::Settings {
                image: settings.image.clone(),
                pull_policy: settings.pull_policy.clone(),
                token: String::new(),
                services: Services::Unseen,
                check: check_proxy,
            },
            tls: Arc::new(tls),
            certificate,
            events: api.map(|api| Events::start(api, Arc::clone(&metrics))),
            metrics,
            room: server::room(),
            standing: Mutex::default(),
        })
    }

    /// Shows this certificate to whoever connects from now on.
    fn serve(&self, served: &Served) {
        *lock(&self.certificate.0) = Some(Arc::clone(&served.key));
        lock(&self.standing).valid = Some(served.valid.clone());
    }

    /// Takes over what the keeper found; returns whether the webhook is ready.
    fn publish(&self, accepted: bool, problem: Option<String>) -> bool {
        let was = self.ready();
        {
            let mut standing = lock(&self.standing);
            (standing.accepted, standing.problem) = (accepted, problem);
        }
        let now = self.ready();
        match (&was, &now) {
            (Err(_), Ok(())) => tracing::info!("ready"),
            (Ok(()), Err(why)) => tracing::warn!(why, "not ready"),
            _ => {}
        }
        now.is_ok()
    }

    /// Whether an API server that asks now would accept the answer; else why not.
    fn ready(&self) -> Result<(), String> {
        let standing = lock(&self.standing);
        let now = keeper::now();
        let problem = || standing.problem.clone().unwrap_or_else(|| "there is no certificate yet".to_owned());
        match &standing.valid {
            None => Err(problem()),
            Some(valid) if now >= valid.end => Err("the certificate has expired".to_owned()),
            Some(valid) if now < valid.start => Err("the certificate is not valid yet".to_owned()),
            Some(_) if !standing.accepted => Err(problem()),
            Some(_) => Ok(()),
        }
    }

    fn render(&self) -> String {
        let ready = self.ready().is_ok();
        let standing = lock(&self.standing);
        let expires = standing.valid.as_ref().map(|valid| valid.end);
        self.metrics.render(expires, standing.accepted, ready)
    }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if let Err(why) = provider().secure_random.fill(&mut bytes) {
        // A token that can be guessed is worse than a pod without a sidecar: the review is caught, the pod goes on.
        panic!("the kernel gives no randomness: {why:?}");
    }
    bytes
}

/// A hook's token.
fn random_token() -> String {
    use base64::Engine;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(random::<TOKEN>())
}

/// From 0 to 1.
fn random_fraction() -> f64 {
    f64::from(u16::from_le_bytes(random())) / f64::from(u16::MAX)
}
