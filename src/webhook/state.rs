//! State that the webhook's listeners and the certificate's keeper share.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::ServerConfig;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::Semaphore;

use super::events::EventQueue;
use super::handover::Newer;
use super::kube::Api;
use super::metrics::Metrics;
use super::x509::{Seconds, Served, now, provider};
use crate::cli::{WebhookSettings, annotated_flags, check_proxy};
use crate::inject::{self, Services};

/// Limit on the total bytes of all large bodies that are being read; further ones wait.
const MAX_BODIES: usize = 16 << 20;
/// Length of a hook's token in bytes.
const TOKEN_LEN: usize = 24;

/// State that the listeners and the keeper share.
pub struct Webhook {
    /// Settings of the patch.
    pub settings: inject::PatchSettings,
    /// TLS configuration of the review listener.
    pub tls: Arc<ServerConfig>,
    certificate: Arc<Certificate>,
    /// Counters of reviews.
    pub metrics: Arc<Metrics>,
    /// Queue of Events about skipped pods.
    pub events: Option<EventQueue>,
    /// One permit per byte of a large body that is being read.
    pub body_room: Semaphore,
    /// Replica of a newer version, which answers the reviews.
    newer: Mutex<Option<Arc<Newer>>>,
    standing: Mutex<Standing>,
}

/// State of the certificate.
#[derive(Default)]
struct Standing {
    valid: Option<Range<Seconds>>,
    accepted: bool,
    /// Whether replicas of another version have had time to learn of this one.
    known: bool,
    problem: Option<String>,
}

/// Certificate for new connections.
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

impl Webhook {
    /// Starts without a certificate.
    ///
    /// # Errors
    /// TLS can't be set up.
    pub fn new(settings: &WebhookSettings, api: Option<Api>) -> Result<Self, String> {
        let certificate = Arc::new(Certificate::default());
        let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.map_err(|why| why.to_string())?.with_no_client_auth();
        let mut tls = builder.with_cert_resolver(Arc::<Certificate>::clone(&certificate));
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        // No session resumption: every review makes a full handshake.
        tls.session_storage = Arc::new(NoServerSessionStorage {});
        tls.send_tls13_tickets = 0;
        let metrics = Arc::new(Metrics::default());
        Ok(Self {
            settings: inject::PatchSettings {
                image: settings.image.clone(),
                pull_policy: settings.pull_policy.clone(),
                resources: settings.resources.clone(),
                token: String::new(),
                service_ports: vec![],
                services: Services::Unseen,
                check: check_proxy,
                flags: annotated_flags,
            },
            tls: Arc::new(tls),
            certificate,
            events: api.map(|api| EventQueue::start(api, Arc::clone(&metrics))),
            metrics,
            body_room: Semaphore::new(MAX_BODIES),
            newer: Mutex::default(),
            standing: Mutex::default(),
        })
    }

    /// Serves this certificate on new connections.
    pub fn serve(&self, served: &Served) {
        *lock(&self.certificate.0) = Some(Arc::clone(&served.key));
        lock(&self.standing).valid = Some(served.valid.clone());
    }

    /// The replica that answers reviews in our place, if there is one.
    pub fn newer(&self) -> Option<Arc<Newer>> {
        lock(&self.newer).clone()
    }

    /// Sets that replica.
    pub fn follow(&self, newer: Option<Arc<Newer>>) {
        *lock(&self.newer) = newer;
    }

    /// Takes over the keeper's findings; returns whether the webhook is ready.
    pub fn publish(&self, accepted: bool, known: bool, problem: Option<String>) -> bool {
        let was = self.ready();
        {
            let mut standing = lock(&self.standing);
            (standing.accepted, standing.known, standing.problem) = (accepted, known, problem);
        }
        let now = self.ready();
        match (&was, &now) {
            (Err(_), Ok(())) => tracing::info!("ready"),
            (Ok(()), Err(why)) => tracing::warn!(why, "not ready"),
            _ => {}
        }
        now.is_ok()
    }

    /// Whether an API server would accept our certificate now.
    ///
    /// # Errors
    /// Says why not.
    pub fn ready(&self) -> Result<(), String> {
        let standing = lock(&self.standing);
        let now = now();
        let problem = || standing.problem.clone().unwrap_or_else(|| "there is no certificate yet".to_owned());
        match &standing.valid {
            None => Err(problem()),
            Some(valid) if now >= valid.end => Err("the certificate has expired".to_owned()),
            Some(valid) if now < valid.start => Err("the certificate is not valid yet".to_owned()),
            Some(_) if !standing.accepted || !standing.known => Err(problem()),
            Some(_) => Ok(()),
        }
    }

    /// The metrics in Prometheus text format.
    pub fn render(&self) -> String {
        let ready = self.ready().is_ok();
        let standing = lock(&self.standing);
        let expires = standing.valid.as_ref().map(|valid| valid.end);
        self.metrics.render(expires, standing.accepted, ready)
    }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if let Err(why) = provider().secure_random.fill(&mut bytes) {
        // A pod without a sidecar is better than a guessable token: the panic is caught, and the pod is allowed
        // unchanged.
        panic!("the kernel provides no randomness: {why:?}");
    }
    bytes
}

/// Returns a random token for a pod's hooks.
pub fn random_token() -> String {
    use base64::Engine;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(random::<TOKEN_LEN>())
}

/// Returns a random number from 0 to 1.
pub fn random_fraction() -> f64 {
    f64::from(u16::from_le_bytes(random())) / f64::from(u16::MAX)
}
