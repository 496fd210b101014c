//! Hands reviews over to the newest replica while another version of the webhook takes the place of this one. The API
//! server calls an old replica until it has learned of its end, and pods would still get the old sidecar.
//!
//! The newest replica writes its address into an annotation of the Secret that all replicas share. A replica that finds
//! another sidecar there passes its reviews on. No order of versions is needed, so that going back to an old one is the
//! same, and the answer is the newest version's as a whole, not its image in an old patch.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::{Method, Request, StatusCode, header};
use serde_json::{Value, json};

use super::kube::dial;
use super::x509::Root;
use crate::inject::PatchSettings;

/// Route for reviews that a replica passes on: these are answered, never passed on again.
pub const HANDED_OVER: &str = "/mutate/handed-over";
/// Annotation of the Secret with the newest replica.
const NEWEST: &str = "lameduck.dev/newest-replica";
/// Time limit for another replica's response. The API server gives us 5 s, and afterwards we answer ourselves.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(2);
/// Limit on another replica's response in bytes.
const MAX_RESPONSE: usize = 8 << 20;

/// A replica as the Secret names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Address of its review listener.
    pub addr: SocketAddr,
    /// Version and settings of the sidecar that it adds.
    pub sidecar: String,
}

impl Replica {
    /// The newest replica; none if the Secret names none.
    pub fn newest(secret: &Value) -> Option<Self> {
        let text = secret["metadata"]["annotations"][NEWEST].as_str()?;
        let written: Value = serde_json::from_str(text).ok()?;
        let sidecar = written["sidecar"].as_str()?.to_owned();
        Some(Self { addr: written["address"].as_str()?.parse().ok()?, sidecar })
    }

    /// Writes it into the Secret.
    pub fn write(&self, secret: &mut Value) {
        let text = json!({ "address": self.addr.to_string(), "sidecar": self.sidecar }).to_string();
        if !secret["metadata"]["annotations"].is_object() {
            secret["metadata"]["annotations"] = json!({});
        }
        secret["metadata"]["annotations"][NEWEST] = json!(text);
    }
}

/// Version and settings of the sidecar that this program adds, as text to compare.
pub fn sidecar(settings: &PatchSettings) -> String {
    let PatchSettings { image, pull_policy, resources, .. } = settings;
    json!([env!("CARGO_PKG_VERSION"), image, pull_policy, resources]).to_string()
}

/// A replica that answers our reviews.
pub struct Newer {
    /// Who it is.
    pub replica: Replica,
    /// DNS name in its certificate.
    name: String,
    trusted: Vec<Root>,
    /// Whether it failed to answer. It is left alone until it could be reached again.
    lost: AtomicBool,
}

impl Newer {
    /// A replica whose certificate one of the API server's caBundles verifies.
    pub fn new(replica: Replica, name: &str, bundles: &[Vec<Root>]) -> Self {
        Self { replica, name: name.to_owned(), trusted: bundles.concat(), lost: AtomicBool::new(false) }
    }

    /// The response to an AdmissionReview, as bytes; none if it was refused or did not come in time.
    pub async fn review(&self, body: &Bytes) -> Option<Bytes> {
        if self.lost.load(Ordering::Relaxed) {
            return None;
        }
        let answered = tokio::time::timeout(HANDOVER_TIMEOUT, self.ask(body.clone())).await;
        match answered.map_err(|_| "no response in time".to_owned()).flatten() {
            Ok(response) => {
                tracing::debug!(newer = %self.replica.addr, "passed on a review");
                response
            }
            Err(why) => {
                self.lost.store(true, Ordering::Relaxed);
                tracing::warn!(newer = %self.replica.addr, "the newer replica did not answer a review: {why}");
                None
            }
        }
    }

    /// Whether it is still there: tried only after it failed to answer.
    pub async fn is_there(&self) -> bool {
        if !self.lost.load(Ordering::Relaxed) {
            return true;
        }
        let there =
            tokio::time::timeout(HANDOVER_TIMEOUT, self.dial()).await.is_ok_and(|dialed| dialed.is_ok());
        self.lost.store(!there, Ordering::Relaxed);
        there
    }

    async fn dial(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        let trusted = self.trusted.iter().map(|root| root.der.clone());
        let addr = self.replica.addr;
        let (send, _) = dial(&addr.ip().to_string(), addr.port(), &self.name, trusted).await?;
        Ok(send)
    }

    /// None if it refuses the review: anybody can send one that it must refuse, which says nothing of the replica.
    async fn ask(&self, body: Bytes) -> Result<Option<Bytes>, String> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(HANDED_OVER)
            .header(header::HOST, &self.name)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|why| why.to_string())?;
        let response = self.dial().await?.send_request(request).await.map_err(|why| why.to_string())?;
        if response.status() != StatusCode::OK {
            return Ok(None);
        }
        let body = Limited::new(response.into_body(), MAX_RESPONSE).collect().await;
        Ok(Some(body.map_err(|why| why.to_string())?.to_bytes()))
    }
}
