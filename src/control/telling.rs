//! Tells the app that a drain has begun, and asks it whether it still has work that lameduck can't see.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode};
use serde_json::Value;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use super::data_plane::DataPlane;
use crate::config::{AppUrl, BusyUrl};
use crate::drain::machine::Phase;
use crate::readiness;

/// Name of the file in the shared directory that is there during a drain.
const DRAINING: &str = "draining";
/// Time between two calls of the app.
const CALL_INTERVAL: Duration = Duration::from_secs(1);
/// Time limit for one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for telling the app of a drain. The drain waits for it: the app may take a lease when it hears.
const TELL_TIMEOUT: Duration = Duration::from_secs(10);
/// Limit on the response of `--busy-url`, in bytes.
const MAX_ANSWER: usize = 64 << 10;
/// The lease for a busy app needs no limit in time: it ends with the drain.
const NO_LIMIT: Duration = Duration::from_secs(365 * 24 * 3600);

/// An app that was told. It is told no more once this is dropped, and the file is removed.
pub(super) struct Telling {
    plane: Arc<dyn DataPlane>,
    task: AbortHandle,
    /// What the drain waits for: the app hears of it, and it is not busy.
    leases: [Option<u64>; 2],
}

impl Telling {
    /// Tells the app that a drain has begun.
    pub(super) fn begin(plane: &Arc<dyn DataPlane>) -> Self {
        if let Some(dir) = plane.settings().share_dir.as_deref() {
            // A link there would lead to a file of others.
            forget(Some(dir));
            if let Err(error) = File::create_new(dir.join(DRAINING)) {
                tracing::warn!(%error, "the app can't be told of the drain by a file");
            }
        }
        // Leases from the start: the drain must not end before the first responses.
        let tell = &plane.settings().tell;
        let asked = [("on-drain-url", tell.on_drain_url.is_some()), ("busy-url", tell.busy_url.is_some())];
        let leases =
            asked.map(|(name, asked)| asked.then(|| plane.leases().take(name, NO_LIMIT).ok()).flatten());
        let task = tokio::spawn(tell_app(plane.clone(), leases)).abort_handle();
        Self { plane: plane.clone(), task, leases }
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        self.task.abort();
        for lease in self.leases.into_iter().flatten() {
            self.plane.leases().give_back(lease);
        }
        forget(self.plane.settings().share_dir.as_deref());
    }
}

/// Removes the file, which a killed process may have left.
pub(super) fn forget(share_dir: Option<&Path>) {
    if let Some(dir) = share_dir {
        let _ = fs::remove_file(dir.join(DRAINING));
    }
}

async fn tell_app(plane: Arc<dyn DataPlane>, [told, idle]: [Option<u64>; 2]) {
    let tell = &plane.settings().tell;
    tokio::join!(
        async {
            if let Some(url) = &tell.on_drain_url {
                post(&*plane, url).await;
            }
            // There is none if too many are out: those hold the drain.
            if let Some(lease) = told {
                plane.leases().give_back(lease);
            }
        },
        async {
            if let (Some(busy), Some(lease)) = (&tell.busy_url, idle) {
                wait_until_idle(&*plane, busy, lease).await;
            }
        },
    );
}

async fn post(plane: &dyn DataPlane, url: &AppUrl) {
    let mut status = None;
    let heard = async {
        loop {
            let sent = call(plane, "POST", url, |answer| async move { answer.status() });
            status = timeout(CALL_TIMEOUT, sent).await.ok().flatten();
            if status.is_some_and(|status| status.is_success()) {
                return;
            }
            sleep(CALL_INTERVAL).await;
        }
    };
    let heard = timeout(TELL_TIMEOUT, heard).await.is_ok();
    let status = status.map(|status| status.as_u16());
    match heard {
        true => tracing::info!(url = url.target, status, "the app was told of the drain"),
        false => tracing::warn!(
            url = url.target,
            status,
            "the app could not be told of the drain (--on-drain-url)"
        ),
    }
}

/// Gives the lease back once the app says that it is idle and nothing else is in flight or can arrive: a request may
/// still cause work, also after the app has read its number for the response.
async fn wait_until_idle(plane: &dyn DataPlane, busy: &BusyUrl, lease: u64) {
    let mut told = None;
    let is_alone = || plane.gate().phase() >= Phase::Draining && plane.gate().in_flight() <= 1;
    loop {
        let was_alone = is_alone();
        let answer = timeout(CALL_TIMEOUT, ask(plane, busy)).await.unwrap_or(Err("it doesn't respond"));
        if answer == Ok(false) && was_alone && is_alone() {
            plane.leases().give_back(lease);
            return;
        }
        if let Err(why) = answer
            && told != Some(why)
        {
            told = Some(why);
            tracing::warn!(
                url = busy.url.target,
                "the app doesn't say whether it is busy, so it counts as busy: {why}"
            );
        }
        sleep(CALL_INTERVAL).await;
    }
}

/// Whether the app is busy.
async fn ask(plane: &dyn DataPlane, busy: &BusyUrl) -> Result<bool, &'static str> {
    let read = |answer: hyper::Response<hyper::body::Incoming>| async move {
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        (status, body.map(|body| body.to_bytes()).unwrap_or_default())
    };
    let (status, body) = call(plane, "GET", &busy.url, read).await.ok_or("it doesn't respond")?;
    if status != StatusCode::OK {
        return Err("the status is not 200");
    }
    let answer: Value = serde_json::from_slice(&body).map_err(|_| "the response is not JSON")?;
    match answer.pointer(&busy.pointer) {
        Some(Value::Number(number)) => Ok(number.as_f64() != Some(0.0)),
        Some(Value::Bool(busy)) => Ok(*busy),
        _ => Err("there is no number in the response, or not where the pointer leads"),
    }
}

async fn call<F, T>(
    plane: &dyn DataPlane,
    method: &str,
    url: &AppUrl,
    read: impl FnOnce(hyper::Response<hyper::body::Incoming>) -> F,
) -> Option<T>
where
    F: Future<Output = T>,
{
    let request = Request::builder().method(method).uri(url.target.as_str()).body(Empty::new()).ok()?;
    let at = url.at.clone().unwrap_or_else(|| plane.upstream().addr());
    readiness::ask(&at, request, read).await
}
