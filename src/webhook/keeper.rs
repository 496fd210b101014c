//! Maintains the certificate. Every few seconds it reads the files, or the Secret that the replicas share, and the API
//! server's caBundles; `certs` decides, and the keeper writes and serves. The same Secret says who is the newest replica.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use super::certs::{self, StoredCerts, Write, accepted, go_over, refusal};
use super::handover::{self, Newer, Replica};
use super::kube::{Api, ApiSession};
use super::state::{Webhook, random_fraction};
use super::x509::{Root, Seconds, Served, now, roots};
use crate::cli::WebhookSettings;

/// Interval between two checks, plus or minus a fifth, once everything is in order.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// The same until then.
const CHECK_INTERVAL_AT_START: Duration = Duration::from_secs(1);
/// A change of the caBundles counts only after this time: API servers learn of it one by one.
const ACCEPTED_DELAY: Duration = Duration::from_secs(2);
/// Time after which every replica of another version has seen that this one is the newest: their interval between two
/// checks, and two seconds for the check.
const KNOWN_DELAY: Duration = Duration::from_secs(8);
/// Limit on the writes of one check: a CA, the bundles, a leaf, and repeats after conflicts with other replicas.
const MAX_WRITES: usize = 5;

/// Maintains the webhook's certificate.
pub struct Keeper {
    webhook: Arc<Webhook>,
    source: CertSource,
    /// Name of the Secret that all replicas share.
    secret: String,
    /// Port of the review listener.
    port: u16,
    api: Option<Api>,
    config: Option<String>,
    service: String,
    namespace: String,
    names: Vec<String>,
    served: Option<Served>,
    /// Time since which every caBundle verifies the served certificate.
    accepted: Option<Instant>,
    /// Why a caBundle does not.
    refusal: Option<String>,
    /// Time from which every other replica knows of this one.
    known: Option<Instant>,
    /// Last problem that was logged.
    problem: Option<String>,
}

enum CertSource {
    /// Folder with `tls.crt` and `tls.key`.
    Files(PathBuf),
    /// The Secret.
    Secret,
}

/// CAs that the API server trusts, as read from its configuration.
struct Config {
    path: String,
    version: Value,
    /// Index and caBundle of each webhook entry that calls us.
    bundles: Vec<(usize, Vec<Root>)>,
}

impl Keeper {
    /// `namespace` is the pod's, `port` that of the review listener.
    pub fn new(
        webhook: Arc<Webhook>,
        settings: &WebhookSettings,
        api: Option<Api>,
        namespace: String,
        port: u16,
    ) -> Self {
        let service = &settings.service;
        let names = [
            format!("{service}.{namespace}.svc"),
            format!("{service}.{namespace}.svc.cluster.local"),
            format!("{service}.{namespace}"),
            service.clone(),
        ];
        let source = match &settings.tls_dir {
            Some(dir) => CertSource::Files(dir.clone()),
            None => CertSource::Secret,
        };
        Self {
            webhook,
            source,
            secret: settings.secret.clone(),
            port,
            api,
            config: settings.config.clone(),
            service: service.clone(),
            namespace,
            names: names.to_vec(),
            served: None,
            accepted: None,
            refusal: None,
            known: None,
            problem: None,
        }
    }

    /// Runs for the lifetime of the process.
    pub async fn run(mut self) {
        loop {
            let problem = self.look().await.err().or_else(|| self.refusal.clone());
            if problem != self.problem {
                match &problem {
                    Some(problem) => tracing::warn!("certificate: {problem}"),
                    None => tracing::info!("certificate: the problem is resolved"),
                }
            }
            self.problem = problem;
            let ready = self.publish();
            let pause =
                if ready && self.problem.is_none() { CHECK_INTERVAL } else { CHECK_INTERVAL_AT_START };
            tokio::time::sleep(pause.mul_f64(0.8 + 0.4 * random_fraction())).await;
        }
    }

    /// Publishes the state to the probes; returns whether the webhook is ready.
    fn publish(&mut self) -> bool {
        let believed =
            self.config.is_none() || self.accepted.is_some_and(|since| since.elapsed() >= ACCEPTED_DELAY);
        let problem = self.problem.clone().or_else(|| {
            (!believed).then(|| "the caBundles have only just begun to verify the certificate".to_owned())
        });
        let known = self.config.is_none() || self.known.is_some_and(|known| known <= Instant::now());
        let problem = problem.or_else(|| {
            (!known).then(|| "replicas of another version have yet to learn of this one".to_owned())
        });
        self.webhook.publish(believed && self.served.is_some(), known, problem)
    }

    async fn look(&mut self) -> Result<(), String> {
        let mut done = String::new();
        for _ in 0..=MAX_WRITES {
            match self.step().await? {
                Some(step) => done = step,
                None => return Ok(()),
            }
        }
        Err(format!("the certificates keep changing: {done}"))
    }

    /// One check with at most one write. Returns what was written if another check should follow. The configuration is
    /// read before the Secret and written only if unchanged since, so no bundle loses a CA that another replica added.
    async fn step(&mut self) -> Result<Option<String>, String> {
        let wants_api = self.config.is_some() || matches!(self.source, CertSource::Secret);
        let mut session = match &self.api {
            Some(api) if wants_api => Some(api.session().await?),
            _ => None,
        };
        let config = match (&mut session, &self.config) {
            (Some(session), Some(name)) => Some(self.read_config(session, name).await?),
            _ => None,
        };
        let bundles: Vec<_> =
            config.iter().flat_map(|config| &config.bundles).map(|(_, bundle)| bundle.clone()).collect();
        let now = now();
        match (&self.source, session) {
            (CertSource::Files(dir), session) => {
                let found = Served::read_dir(dir);
                self.serve(now, &bundles, found.as_ref().ok(), false);
                found?;
                match session {
                    Some(mut session) => self.share_files(&mut session, &bundles).await,
                    None => Ok(None),
                }
            }
            (CertSource::Secret, None) => Err("there is no API server".to_owned()),
            (CertSource::Secret, Some(session)) => self.keep(now, session, config, &bundles).await,
        }
    }

    /// The same for our own Secret.
    async fn keep(
        &mut self,
        now: Seconds,
        mut session: ApiSession,
        config: Option<Config>,
        bundles: &[Vec<Root>],
    ) -> Result<Option<String>, String> {
        let secret = self.read_secret(&mut session).await?;
        let kept = kept(&secret);
        self.serve(now, bundles, kept.served().ok().as_ref(), true);
        match (certs::next(now, &self.names, &kept, bundles)?, config) {
            (Some(Write::Secret(kept)), _) => {
                self.write_certs(&mut session, secret, &kept).await?;
                Ok(Some(format!("Secret {}", self.secret)))
            }
            (Some(Write::Bundles(pem)), Some(config)) => {
                write_bundles(&mut session, &config, &pem).await.map(Some)
            }
            (Some(Write::Bundles(_)) | None, _) => self.hand_over(&mut session, secret, bundles).await,
        }
    }

    /// With certificates from files only the newest replica is in the Secret, and the webhook works without it.
    async fn share_files(
        &mut self,
        session: &mut ApiSession,
        bundles: &[Vec<Root>],
    ) -> Result<Option<String>, String> {
        let shared = match self.read_secret(session).await {
            Ok(Value::Null) => Err(format!("there is no Secret {}/{}", self.namespace, self.secret)),
            Ok(secret) => self.hand_over(session, secret, bundles).await,
            Err(why) => Err(why),
        };
        shared.or_else(|why| {
            if self.known.replace(Instant::now()).is_none() {
                tracing::info!("replicas of another version go on adding their own sidecar: {why}");
            }
            Ok(None)
        })
    }

    /// Writes into the Secret, once, that this is the newest replica, and follows one that does so later. Returns what
    /// was written.
    async fn hand_over(
        &mut self,
        session: &mut ApiSession,
        mut secret: Value,
        bundles: &[Vec<Root>],
    ) -> Result<Option<String>, String> {
        if self.accepted.is_none() || bundles.is_empty() {
            return Ok(None);
        }
        let addr = SocketAddr::new(session.local, self.port);
        let own = Replica { addr, sidecar: handover::sidecar(&self.webhook.settings) };
        let newest = Replica::newest(&secret);
        let other = newest.clone().filter(|newest| newest.sidecar != own.sidecar);
        let before = self.webhook.newer();
        let lost = match (&before, &other) {
            (Some(newer), Some(other)) if newer.replica == *other => !newer.is_there().await,
            _ => false,
        };
        if self.known.is_none() || lost {
            own.write(&mut secret);
            if self.put_secret(session, &secret).await? {
                let wait = if other.is_some() && !lost { KNOWN_DELAY } else { Duration::ZERO };
                self.known.get_or_insert(Instant::now() + wait);
                self.webhook.follow(None);
            }
            return Ok(Some(format!("Secret {}", self.secret)));
        }
        if before.as_ref().map(|newer| &newer.replica) != other.as_ref() {
            match &other {
                Some(newer) => tracing::info!(newer = %newer.addr, "a newer replica answers the reviews"),
                None => tracing::info!("this replica answers its reviews itself"),
            }
            self.webhook.follow(other.map(|other| Arc::new(Newer::new(other, &self.names[0], bundles))));
        }
        Ok(None)
    }

    /// Switches to `candidate` if it is time, and records whether the API server accepts the served certificate.
    fn serve(&mut self, now: Seconds, bundles: &[Vec<Root>], candidate: Option<&Served>, ours: bool) {
        let name = &self.names[0];
        if let Some(candidate) = candidate
            && self.served.as_ref().is_none_or(|served| served.key.cert != candidate.key.cert)
            && go_over(now, name, bundles, self.served.as_ref(), candidate, ours)
        {
            let expires = UNIX_EPOCH + Duration::from_secs(candidate.valid.end);
            tracing::info!(expires = %humantime::format_rfc3339_seconds(expires), "serving a new certificate");
            self.webhook.serve(candidate);
            self.served = Some(candidate.clone());
        }
        let good = self.served.as_ref().is_some_and(|served| accepted(now, name, bundles, served));
        self.accepted = good.then(|| self.accepted.unwrap_or_else(Instant::now));
        let why = self.served.as_ref().and_then(|served| refusal(now, name, bundles, served));
        let config = self.config.as_deref().unwrap_or_default();
        self.refusal = why.map(|why| {
            format!("a caBundle of the webhook configuration {config} doesn't verify the certificate: {why}")
        });
    }

    async fn read_config(&self, session: &mut ApiSession, name: &str) -> Result<Config, String> {
        let path = format!("/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/{name}");
        let explain = |why| format!("MutatingWebhookConfiguration {name}: {why}");
        let object = session.get(&path).await.and_then(super::kube::ApiReply::object).map_err(explain)?;
        let webhooks = object["webhooks"].as_array().into_iter().flatten().enumerate();
        let bundles: Vec<_> = webhooks
            .filter(|(_, webhook)| {
                let service = &webhook["clientConfig"]["service"];
                service["name"] == *self.service && service["namespace"] == *self.namespace
            })
            .map(|(n, webhook)| {
                let bundle = webhook["clientConfig"]["caBundle"].as_str().unwrap_or_default();
                (n, roots(&STANDARD.decode(bundle).unwrap_or_default()))
            })
            .collect();
        if bundles.is_empty() {
            return Err(explain(format!("no webhook in it leads to {}/{}", self.namespace, self.service)));
        }
        Ok(Config { path, version: object["metadata"]["resourceVersion"].clone(), bundles })
    }

    /// The Secret; null if it doesn't exist.
    async fn read_secret(&self, session: &mut ApiSession) -> Result<Value, String> {
        let reply = session.get(&format!("{}/{}", self.secrets(), self.secret)).await?;
        if reply.status == StatusCode::NOT_FOUND {
            return Ok(Value::Null);
        }
        reply.object().map_err(|why| format!("Secret {}/{}: {why}", self.namespace, self.secret))
    }

    /// Writes the certificates into the Secret.
    async fn write_certs(
        &self,
        session: &mut ApiSession,
        mut secret: Value,
        kept: &StoredCerts,
    ) -> Result<(), String> {
        if secret.is_null() {
            secret = json!({
                "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
                "metadata": { "name": self.secret, "namespace": self.namespace },
            });
        }
        let StoredCerts { ca_crt, ca_key, tls_crt, tls_key } = kept;
        if !secret["data"].is_object() {
            secret["data"] = json!({});
        }
        for (key, text) in
            [("ca.crt", ca_crt), ("ca.key", ca_key), ("tls.crt", tls_crt), ("tls.key", tls_key)]
        {
            secret["data"][key] = json!(STANDARD.encode(text));
        }
        if self.put_secret(session, &secret).await? {
            tracing::info!(secret = self.secret, "wrote certificates");
        }
        Ok(())
    }

    /// Writes the Secret, unless another replica wrote it since it was read. Returns whether it did.
    async fn put_secret(&self, session: &mut ApiSession, secret: &Value) -> Result<bool, String> {
        let missing = secret["metadata"]["resourceVersion"].is_null();
        let (method, path) = match missing {
            true => (Method::POST, self.secrets()),
            false => (Method::PUT, format!("{}/{}", self.secrets(), self.secret)),
        };
        let reply = session.send(method, &path, "application/json", secret).await?;
        let (namespace, name) = (&self.namespace, &self.secret);
        match reply.status {
            StatusCode::CONFLICT => Ok(false),
            StatusCode::FORBIDDEN if missing => Err(format!(
                "there is no Secret {namespace}/{name}, and this service account may not create it: apply the manifest \
                 that has it, empty"
            )),
            _ => reply.object().map(|_| true).map_err(|why| format!("Secret {namespace}/{name}: {why}")),
        }
    }

    /// Path of all Secrets in our namespace.
    fn secrets(&self) -> String {
        format!("/api/v1/namespaces/{}/secrets", self.namespace)
    }
}

/// Parses the Secret.
fn kept(secret: &Value) -> StoredCerts {
    let text = |key: &str| {
        let bytes = STANDARD.decode(secret["data"][key].as_str().unwrap_or_default()).unwrap_or_default();
        String::from_utf8(bytes).unwrap_or_default()
    };
    StoredCerts {
        ca_crt: text("ca.crt"),
        ca_key: text("ca.key"),
        tls_crt: text("tls.crt"),
        tls_key: text("tls.key"),
    }
}

/// Writes all of our caBundles, unless the configuration changed since it was read. Returns what was done.
async fn write_bundles(session: &mut ApiSession, config: &Config, pem: &str) -> Result<String, String> {
    let mut ops = vec![json!({ "op": "test", "path": "/metadata/resourceVersion", "value": config.version })];
    for (n, _) in &config.bundles {
        let path = format!("/webhooks/{n}/clientConfig/caBundle");
        ops.push(json!({ "op": "add", "path": path, "value": STANDARD.encode(pem) }));
    }
    let kind = "application/json-patch+json";
    let reply = session.send(Method::PATCH, &config.path, kind, &json!(ops)).await?;
    // A 422 can also mean that the API server will never accept it.
    let may_have_changed = [StatusCode::CONFLICT, StatusCode::UNPROCESSABLE_ENTITY].contains(&reply.status);
    match reply.object().map_err(|why| format!("PATCH {}: {why}", config.path)) {
        Ok(_) => {
            tracing::info!("wrote the caBundles");
            Ok("caBundles".to_owned())
        }
        Err(why) if may_have_changed => Ok(why),
        Err(why) => Err(why),
    }
}
