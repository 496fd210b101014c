//! Forwards the app's own probes to its unix socket, which the kubelet can't reach. They bypass the proxy.

use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::header::{self, HeaderName};
use hyper::{HeaderMap, Request, StatusCode};
use tokio::sync::Semaphore;

use super::{Admin, Ask, path};
use crate::answer::{Answer, answer, text, wrong_method};
use crate::readiness;

/// Prefix of the path: `/app-probe/healthz` requests `/healthz` from the app.
pub(super) const PREFIX: &str = "/app-probe/";
/// Time limit for a probe: longer than any reasonable timeoutSeconds, after which the kubelet closes the connection.
const PROBE_TIMEOUT: Duration = Duration::from_secs(60);
/// Limit on concurrent probes of the app. The kubelet sends one of each kind at a time; a slow app must not use up the
/// connections for `/readyz` and the hooks.
const MAX_PROBES: usize = 32;
static PERMITS: Semaphore = Semaphore::const_new(MAX_PROBES);
/// Limit on a response body in bytes: the kubelet reads no more (`maxRespBodyLength` in its HTTP prober).
const MAX_BODY: usize = 10 << 10;
/// Fields that belong to one connection (RFC 9110 §7.6.1) or describe a body.
const NOT_PASSED_ON: [HeaderName; 7] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::EXPECT,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

impl Admin {
    /// Returns the app's status and the beginning of its body; 404 for a path that is not a probe of the app, 502 if
    /// the app does not respond, 503 if too many probes wait for it, 504 if it takes too long.
    pub(super) async fn app_probe(&self, ask: &Ask) -> Answer {
        if ask.method() != "GET" && ask.method() != "HEAD" {
            return wrong_method("GET, HEAD");
        }
        let settings = self.control.settings();
        let path = &path(ask)[PREFIX.len() - 1..];
        let target = ask.uri().query().map_or(path.to_owned(), |query| format!("{path}?{query}"));
        if !settings.app_probes.iter().any(|probe| probe.0 == target) {
            return text(StatusCode::NOT_FOUND, "not a probe of the app (--app-probe)");
        }
        let mut request = Request::builder().method(ask.method()).uri(target);
        if let Some(headers) = request.headers_mut() {
            *headers = passed_on(ask.headers());
        }
        let Ok(request) = request.body(Empty::new()) else {
            return text(StatusCode::BAD_REQUEST, "not a target");
        };
        let Ok(_place) = PERMITS.try_acquire() else {
            return text(StatusCode::SERVICE_UNAVAILABLE, "too many probes are waiting for the app");
        };
        let upstream = self.control.upstream();
        let asked = readiness::ask(&upstream, request, |from_app| async {
            let (head, mut body) = from_app.into_parts();
            let mut read = Vec::new();
            while read.len() < MAX_BODY
                && let Some(Ok(frame)) = body.frame().await
            {
                read.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
            }
            read.truncate(MAX_BODY);
            (head.status, head.headers.get(header::CONTENT_TYPE).cloned(), read)
        });
        match tokio::time::timeout(PROBE_TIMEOUT, asked).await {
            Ok(Some((status, kind, body))) => {
                let mut answer = answer(status, "application/octet-stream", body.into());
                if let Some(kind) = kind {
                    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
                }
                answer
            }
            Ok(None) => text(StatusCode::BAD_GATEWAY, "the app does not answer"),
            Err(_) => text(StatusCode::GATEWAY_TIMEOUT, "the app did not answer in time"),
        }
    }
}

fn passed_on(headers: &HeaderMap) -> HeaderMap {
    let mut headers = headers.clone();
    for name in NOT_PASSED_ON {
        headers.remove(name);
    }
    headers
}
