//! The app's own probes for an app that the kubelet can't reach: passed on to its unix socket, past the proxy.

use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::header::{self, HeaderName};
use hyper::{HeaderMap, Request, StatusCode};
use tokio::sync::Semaphore;

use super::{Admin, Ask, path};
use crate::answer::{Answer, answer, text, wrong_method};
use crate::readiness;

/// `/app-probe/healthz` asks the app for `/healthz`.
pub(super) const PREFIX: &str = "/app-probe/";
/// Longer than any probe's timeoutSeconds that makes sense; the kubelet hangs up by itself.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Probes that wait for the app. The kubelet asks one of each kind at a time; an app that is slow to answer must not
/// take the places of `/readyz` and of the hooks.
const MOST: usize = 32;
static PLACES: Semaphore = Semaphore::const_new(MOST);
/// Bytes of an answer's body: as many as the kubelet reads (`maxRespBodyLength` in its http prober).
const BODY: usize = 10 << 10;
/// Fields that belong to one connection (RFC 9110 §7.6.1), or to a body.
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
    /// The app's status and the begin of its body; 404 for what isn't a probe of the app's, 502 when the app does not
    /// answer, 503 when too many probes wait for it and 504 when it takes too long.
    pub(super) async fn app_probe(&self, ask: &Ask) -> Answer {
        if ask.method() != "GET" && ask.method() != "HEAD" {
            return wrong_method("GET, HEAD");
        }
        let settings = self.control.settings();
        let path = &path(ask)[PREFIX.len() - 1..];
        let target = ask.uri().query().map_or(path.to_owned(), |query| format!("{path}?{query}"));
        if !settings.app_probes.iter().any(|probe| probe.0 == target) {
            return text(StatusCode::NOT_FOUND, "no probe of the app's (--app-probe)");
        }
        let mut request = Request::builder().method(ask.method()).uri(target);
        if let Some(headers) = request.headers_mut() {
            *headers = passed_on(ask.headers());
        }
        let Ok(request) = request.body(Empty::new()) else {
            return text(StatusCode::BAD_REQUEST, "not a target");
        };
        let Ok(_place) = PLACES.try_acquire() else {
            return text(StatusCode::SERVICE_UNAVAILABLE, "too many probes wait for the app");
        };
        let upstream = self.control.upstream();
        let asked = readiness::ask(&upstream, request, |from_app| async {
            let (head, mut body) = from_app.into_parts();
            let mut read = Vec::new();
            while read.len() < BODY
                && let Some(Ok(frame)) = body.frame().await
            {
                read.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
            }
            read.truncate(BODY);
            (head.status, head.headers.get(header::CONTENT_TYPE).cloned(), read)
        });
        match tokio::time::timeout(TIMEOUT, asked).await {
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
