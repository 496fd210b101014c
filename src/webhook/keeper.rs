//! Maintains the certificate. Every few seconds it reads the files, or the Secret that the replicas share, and the API
//! server's caBundles; `certs` decides, and the keeper writes and serves.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use super::certs::{self, StoredCerts, Write, accepted, go_over, refusal};
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
/// Limit on the writes of one check: a CA, the bundles, a leaf, and repeats after conflicts with other replicas.
const MAX_WRITES: usize = 5;

/// Maintains the webhook's certificate.
pub struct Keeper {
    webhook: Arc<Webhook>,
    source: CertSource,
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
    /// Last problem that was logged.
    problem: Option<String>,
}

enum CertSource {
    /// Folder with `tls.crt` and `tls.key`.
    Files(PathBuf),
    /// Name of our own Secret.
    Secret(String),
}

/// CAs that the API server trusts, as read from its configuration.
struct Config {
    path: String,
    version: Value,
    /// Index and caBundle of each webhook entry that calls us.
    bundles: Vec<(usize, Vec<Root>)>,
}

impl Keeper {
    /// `namespace` is the pod's.
    pub fn new(
        webhook: Arc<Webhook>,
        settings: &WebhookSettings,
        api: Option<Api>,
        namespace: String,
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
            None => CertSource::Secret(settings.secret.clone()),
        };
        Self {
            webhook,
            source,
            api,
            config: settings.config.clone(),
            service: service.clone(),
            namespace,
            names: names.to_vec(),
            served: None,
            accepted: None,
            refusal: None,
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
        self.webhook.publish(believed && self.served.is_some(), problem)
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
        let wants_api = self.config.is_some() || matches!(self.source, CertSource::Secret(_));
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
        let (name, session) = match (&self.source, session) {
            (CertSource::Files(dir), _) => {
                let found = Served::read_dir(dir);
                self.serve(now, &bundles, found.as_ref().ok(), false);
                return found.map(|_| None);
            }
            (CertSource::Secret(_), None) => return Err("there is no API server".to_owned()),
            (CertSource::Secret(name), Some(session)) => (name.clone(), session),
        };
        self.keep(now, &name, session, config, &bundles).await
    }

    /// The same for our own Secret.
    async fn keep(
        &mut self,
        now: Seconds,
        name: &str,
        mut session: ApiSession,
        config: Option<Config>,
        bundles: &[Vec<Root>],
    ) -> Result<Option<String>, String> {
        let secret = self.read_secret(&mut session, name).await?;
        let kept = kept(&secret);
        self.serve(now, bundles, kept.served().ok().as_ref(), true);
        match (certs::next(now, &self.names, &kept, bundles)?, config) {
            (Some(Write::Secret(kept)), _) => {
                self.write_secret(&mut session, name, secret, &kept).await?;
                Ok(Some(format!("Secret {name}")))
            }
            (Some(Write::Bundles(pem)), Some(config)) => {
                write_bundles(&mut session, &config, &pem).await.map(Some)
            }
            (Some(Write::Bundles(_)) | None, _) => Ok(None),
        }
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
    async fn read_secret(&self, session: &mut ApiSession, name: &str) -> Result<Value, String> {
        let reply = session.get(&self.secret_path(name)).await?;
        if reply.status == StatusCode::NOT_FOUND {
            return Ok(Value::Null);
        }
        reply.object().map_err(|why| format!("Secret {}/{name}: {why}", self.namespace))
    }

    /// Writes the Secret, unless another replica wrote it since it was read.
    async fn write_secret(
        &self,
        session: &mut ApiSession,
        name: &str,
        mut secret: Value,
        kept: &StoredCerts,
    ) -> Result<(), String> {
        let missing = secret.is_null();
        if missing {
            secret = json!({
                "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
                "metadata": { "name": name, "namespace": self.namespace },
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
        let all = format!("/api/v1/namespaces/{}/secrets", self.namespace);
        let (method, path) =
            if missing { (Method::POST, all) } else { (Method::PUT, self.secret_path(name)) };
        let reply = session.send(method, &path, "application/json", &secret).await?;
        match reply.status {
            StatusCode::CONFLICT => Ok(()),
            StatusCode::FORBIDDEN if missing => Err(format!(
                "there is no Secret {}/{name}, and this service account may not create it: apply the manifest that \
                 has it, empty",
                self.namespace
            )),
            _ => {
                reply.object().map_err(|why| format!("Secret {}/{name}: {why}", self.namespace))?;
                tracing::info!(secret = name, "wrote certificates");
                Ok(())
            }
        }
    }

    fn secret_path(&self, name: &str) -> String {
        format!("/api/v1/namespaces/{}/secrets/{name}", self.namespace)
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
