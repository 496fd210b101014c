//! Events: a pod that should have been injected but wasn't is told to whoever makes such pods, where `kubectl describe`
//! shows it. Telling never delays an answer: it is bounded, and dropped where it would have to wait.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hyper::Method;
use serde_json::{Value, json};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::kube::Api;
use super::metrics::Metrics;
use super::review::{Outcome, Reviewed};

/// The same is not said again for so long.
const QUIET: Duration = Duration::from_secs(600);
/// What was said of late is remembered for so many owners.
const REMEMBERED: usize = 1024;
/// Events that wait to be sent.
const WAITING: usize = 64;
/// Between two Events: six hundred a minute at most.
const PACE: Duration = Duration::from_millis(100);
/// Bytes of an Event's note are limited to 1 KiB (`events.k8s.io/v1`).
const MOST_NOTE: usize = 1000;

/// Takes what is to be told.
pub struct Events {
    queue: Sender<Value>,
    said: Mutex<HashMap<String, Instant>>,
    metrics: Arc<Metrics>,
}

impl Events {
    /// Also starts the task that sends them.
    pub fn start(api: Api, metrics: Arc<Metrics>) -> Self {
        let (queue, waiting) = channel(WAITING);
        tokio::spawn(send(api, waiting, Arc::clone(&metrics)));
        Self { queue, said: Mutex::default(), metrics }
    }

    /// Tells what is worth an Event: a skip, unless nothing may happen on the side or the same was said of late.
    pub fn tell(&self, reviewed: &Reviewed) {
        let Some(event) = event(reviewed) else { return };
        let about = &event["regarding"];
        let key = format!("{}/{}/{}: {}", about["namespace"], about["kind"], about["name"], event["note"]);
        if self.is_new(key) && self.queue.try_send(event).is_err() {
            self.metrics.events_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn is_new(&self, key: String) -> bool {
        let now = Instant::now();
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() >= REMEMBERED {
            said.retain(|_, at| now - *at < QUIET);
        }
        if said.len() >= REMEMBERED || said.get(&key).is_some_and(|at| now - *at < QUIET) {
            return false;
        }
        said.insert(key, now);
        true
    }
}

/// The Event of a pod that was left as it is, about the pod's controller, or the pod itself if it has none.
fn event(reviewed: &Reviewed) -> Option<Value> {
    let (Outcome::Skipped(why) | Outcome::Failed(why)) = &reviewed.outcome else { return None };
    if reviewed.dry_run || reviewed.name.is_empty() {
        return None;
    }
    let namespace = &reviewed.namespace;
    let regarding = match &reviewed.owner {
        Some(owner) => json!({
            "apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["name"], "uid": owner["uid"],
            "namespace": namespace,
        }),
        None => json!({ "apiVersion": "v1", "kind": "Pod", "name": reviewed.name, "namespace": namespace }),
    };
    let mut note = format!("lameduck left a pod as it is: {why}");
    note.truncate(note.floor_char_boundary(MOST_NOTE));
    Some(json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": { "generateName": "lameduck-", "namespace": namespace },
        "eventTime": humantime::format_rfc3339_micros(SystemTime::now()).to_string(),
        "reportingController": "lameduck.dev/webhook",
        "reportingInstance": rustix::system::uname().nodename().to_string_lossy(),
        "action": "Inject",
        "reason": "NotInjected",
        "regarding": regarding,
        "note": note,
        "type": "Warning",
    }))
}

async fn send(api: Api, mut waiting: Receiver<Value>, metrics: Arc<Metrics>) {
    while let Some(event) = waiting.recv().await {
        if let Err(why) = send_one(&api, &event).await {
            metrics.events_dropped.fetch_add(1, Ordering::Relaxed);
            tracing::warn!("an Event could not be sent: {why}");
        }
        tokio::time::sleep(PACE).await;
    }
}

async fn send_one(api: &Api, event: &Value) -> Result<(), String> {
    let namespace = event["metadata"]["namespace"].as_str().unwrap_or_default();
    let path = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events");
    let reply = api.session().await?.send(Method::POST, &path, "application/json", event).await?;
    reply.object().map(drop)
}
