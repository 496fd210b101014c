//! Kubernetes Events for pods that should have been injected but were not. They appear in `kubectl describe` of the
//! pod's controller. Sending never delays a response: the queue is bounded, and an Event is dropped when it is full.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hyper::Method;
use serde_json::{Value, json};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::kube::Api;
use super::metrics::Metrics;
use super::review::{ReviewOutcome, Reviewed};
use crate::inject::ports::NO_PORT;

/// Minimum time between two equal Events.
const REPEAT_INTERVAL: Duration = Duration::from_secs(600);
/// Number of owners whose last Event is remembered.
const MAX_REMEMBERED: usize = 1024;
/// Queue length.
const QUEUE_LEN: usize = 64;
/// Interval between two Events: at most 600 per minute.
const SEND_INTERVAL: Duration = Duration::from_millis(100);
/// Limit on a note in bytes: `events.k8s.io/v1` allows 1 KiB.
const MAX_NOTE: usize = 1000;

/// Queue of Events to send.
pub struct EventQueue {
    queue: Sender<Value>,
    said: Mutex<HashMap<String, Instant>>,
    metrics: Arc<Metrics>,
}

impl EventQueue {
    /// Creates the queue and spawns the task that sends the Events.
    pub fn start(api: Api, metrics: Arc<Metrics>) -> Self {
        let (queue, waiting) = channel(QUEUE_LEN);
        tokio::spawn(send(api, waiting, Arc::clone(&metrics)));
        Self { queue, said: Mutex::default(), metrics }
    }

    /// Queues the Events for a skipped pod, unless it is a dry run or the same was sent recently.
    pub fn tell(&self, reviewed: &Reviewed) {
        for event in events(reviewed) {
            let about = &event["regarding"];
            let key =
                format!("{}/{}/{}: {}", about["namespace"], about["kind"], about["name"], event["note"]);
            if self.is_new(key) && self.queue.try_send(event).is_err() {
                self.metrics.events_dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn is_new(&self, key: String) -> bool {
        let now = Instant::now();
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() >= MAX_REMEMBERED {
            said.retain(|_, at| now - *at < REPEAT_INTERVAL);
        }
        if said.len() >= MAX_REMEMBERED || said.get(&key).is_some_and(|at| now - *at < REPEAT_INTERVAL) {
            return false;
        }
        said.insert(key, now);
        true
    }
}

/// Events for a skipped pod. The subject is the pod's controller, or the pod itself if it has none. A ReplicaSet is
/// replaced with each rollout, so its Deployment gets an Event as well.
pub fn events(reviewed: &Reviewed) -> Vec<Value> {
    let (ReviewOutcome::Skipped(why) | ReviewOutcome::Failed(why)) = &reviewed.outcome else { return vec![] };
    let owner = reviewed.owner.as_ref();
    // A batch job serves nothing, and every run of a CronJob would say so.
    let batch = why == NO_PORT && owner.is_some_and(|owner| owner["kind"] == "Job");
    if reviewed.dry_run || reviewed.name.is_empty() || batch {
        return vec![];
    }
    let namespace = &reviewed.namespace;
    let regarding = match owner {
        Some(owner) => json!({
            "apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["name"], "uid": owner["uid"],
            "namespace": namespace,
        }),
        None => json!({ "apiVersion": "v1", "kind": "Pod", "name": reviewed.name, "namespace": namespace }),
    };
    let deployment = reviewed.deployment.as_ref().map(
        |name| json!({ "apiVersion": "apps/v1", "kind": "Deployment", "name": name, "namespace": namespace }),
    );
    deployment.into_iter().chain([regarding]).map(|about| event(&about, namespace, why)).collect()
}

fn event(regarding: &Value, namespace: &str, why: &str) -> Value {
    let mut note = format!("lameduck left a pod unchanged: {why}");
    note.truncate(note.floor_char_boundary(MAX_NOTE));
    json!({
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
    })
}

async fn send(api: Api, mut waiting: Receiver<Value>, metrics: Arc<Metrics>) {
    while let Some(event) = waiting.recv().await {
        if let Err(why) = send_one(&api, &event).await {
            metrics.events_dropped.fetch_add(1, Ordering::Relaxed);
            tracing::warn!("an Event could not be sent: {why}");
        }
        tokio::time::sleep(SEND_INTERVAL).await;
    }
}

async fn send_one(api: &Api, event: &Value) -> Result<(), String> {
    let namespace = event["metadata"]["namespace"].as_str().unwrap_or_default();
    let path = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events");
    let reply = api.session().await?.send(Method::POST, &path, "application/json", event).await?;
    reply.object().map(drop)
}
