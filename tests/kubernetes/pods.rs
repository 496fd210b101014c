//! Observes the pods of a namespace: a watch, and lameduck's complete log.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use super::cluster::inside;

/// Time limit from the end of a pod's drain to the end of its app, which depends on lameduck. The end of the pod also
/// depends on the kubelet, which checks its containers once a second and needs two checks for a native sidecar: the
/// fastest pod of a case must meet the same limit, and every pod three times that. [`slack`] raises the limits on a
/// busy machine.
pub const GONE_WITHIN: Duration = Duration::from_secs(2);

/// Load average per core that two concurrent cases and the control plane cause by themselves.
const OWN_LOAD: f64 = 3.0;

/// Time limit of every wait.
const LIMIT: Duration = Duration::from_secs(180);

/// One pod.
#[derive(Clone, Debug, Default)]
pub struct Pod {
    /// Lameduck's log.
    pub log: Vec<Value>,
    /// Whether the whole log has been read.
    log_ended: bool,
    /// When the API server reported it as deleted.
    gone: Option<SystemTime>,
    /// Restarts by container.
    pub restarts: BTreeMap<String, u64>,
    /// `Pending`, `Running`, `Succeeded`, `Failed`.
    pub phase: String,
    followed: bool,
}

type Shared = Arc<Mutex<BTreeMap<String, Pod>>>;

/// All pods seen since the watch began.
pub struct Pods {
    pods: Shared,
    watch: Child,
}

impl Pods {
    /// Watches a namespace.
    pub fn watch(namespace: &'static str) -> Self {
        let mut watch = inside("kubectl")
            .args(["-n", namespace, "get", "pods", "--watch", "--output-watch-events", "-o", "json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("kubectl");
        let events = BufReader::new(watch.stdout.take().expect("a pipe"));
        let pods = Shared::default();
        let seen = pods.clone();
        thread::spawn(move || {
            for event in serde_json::Deserializer::from_reader(events).into_iter::<Value>() {
                let Ok(event) = event else { return };
                note(namespace, &seen, &event);
            }
        });
        Self { pods, watch }
    }

    /// The current state of all pods.
    pub fn all(&self) -> BTreeMap<String, Pod> {
        lock(&self.pods).clone()
    }

    /// Waits until `holds` returns true for the state of all pods.
    ///
    /// # Panics
    /// After [`LIMIT`].
    pub fn wait(&self, what: &str, holds: impl Fn(&BTreeMap<String, Pod>) -> bool) {
        let end = Instant::now() + LIMIT;
        while !holds(&lock(&self.pods)) {
            assert!(Instant::now() < end, "{what}: not within {LIMIT:?}: {:#?}", self.all());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until this number of pods is gone.
    pub fn wait_gone(&self, count: usize) {
        self.wait(&format!("{count} pods gone"), |pods| {
            pods.values().filter(|pod| pod.gone.is_some() && pod.log_ended).count() >= count
        });
    }

    /// Checks that at least this number of pods is gone, that each drained cleanly, and that they met the time limits
    /// described at [`GONE_WITHIN`].
    pub fn expect_clean_drains(&self, at_least: usize, within: Duration) {
        self.wait_gone(at_least);
        let within = within.mul_f64(slack());
        let mut all = Vec::new();
        for (name, pod) in self.all().iter().filter(|(_, pod)| pod.gone.is_some()) {
            let drained =
                pod.line("drained").unwrap_or_else(|| panic!("{name} never drained: {:#?}", pod.log));
            let kept = pod.gone.and_then(|gone| gone.duration_since(at(drained)).ok()).unwrap_or_default();
            // The sidecar gets SIGTERM when the app has ended.
            let end =
                pod.line("shutdown requested").and_then(|line| at(line).duration_since(at(drained)).ok());
            let (verdict, seconds) = (&drained["verdict"], &drained["seconds"]);
            println!(
                "{name}: {verdict} in {seconds} s, then the app after {end:.2?}, the pod after {kept:.2?}"
            );
            assert_eq!(drained["verdict"], "clean", "{name}: {:#?}", pod.log);
            assert!(end.is_none_or(|end| end <= within), "{name}: its app was kept longer than {within:?}");
            all.push(kept);
        }
        all.sort();
        println!("time from the drain's end to the pod's: {all:.2?}, limit for the first: {within:.2?}");
        assert!(all[0] <= within, "every pod was kept longer than {within:?}: {all:.2?}");
        assert!(
            all[all.len() - 1] <= within * 3,
            "a pod was kept longer than three times {within:?}: {all:.2?}"
        );
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        let _ = self.watch.kill();
        let _ = self.watch.wait();
    }
}

impl Pod {
    /// The last log line with this message.
    pub fn line(&self, message: &str) -> Option<&Value> {
        self.log.iter().rev().find(|line| line["message"] == message)
    }
}

/// Factor for time limits: the machine's load relative to [`OWN_LOAD`], at least 1.
fn slack() -> f64 {
    let average = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let average: f64 =
        average.split(' ').next().and_then(|last_minute| last_minute.parse().ok()).unwrap_or_default();
    let cores = thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
    (average / cores / OWN_LOAD).max(1.0)
}

/// When a log line was written.
pub fn at(line: &Value) -> SystemTime {
    let time = line["timestamp"].as_str().expect("a timestamp");
    humantime::parse_rfc3339(time).expect("RFC 3339")
}

fn note(namespace: &'static str, pods: &Shared, event: &Value) {
    let (object, status) = (&event["object"], &event["object"]["status"]);
    let Some(name) = object["metadata"]["name"].as_str() else { return };
    let mut all = lock(pods);
    let pod = all.entry(name.to_owned()).or_default();
    pod.phase = status["phase"].as_str().unwrap_or_default().to_owned();
    if event["type"] == "DELETED" {
        pod.gone = Some(SystemTime::now());
    }
    let lists = ["initContainerStatuses", "containerStatuses"];
    let containers = lists.iter().flat_map(|list| status[*list].as_array().into_iter().flatten());
    for container in containers.clone() {
        let name = container["name"].as_str().unwrap_or_default().to_owned();
        pod.restarts.insert(name, container["restartCount"].as_u64().unwrap_or_default());
    }
    // With `lameduck run`, the app's container writes lameduck's log.
    let speaks = containers.clone().find(|container| container["name"] == "lameduck");
    let Some(speaks) = speaks.or(containers.clone().next()) else { return };
    if !speaks["state"]["running"].is_null() && !pod.followed {
        pod.followed = true;
        let container = speaks["name"].as_str().unwrap_or_default().to_owned();
        let (pods, pod) = (pods.clone(), name.to_owned());
        thread::spawn(move || follow(namespace, &pods, &pod, &container));
    }
}

fn follow(namespace: &str, pods: &Shared, name: &str, container: &str) {
    let mut logs = inside("kubectl")
        .args(["-n", namespace, "logs", "--follow", name, "-c", container])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("kubectl");
    for line in BufReader::new(logs.stdout.take().expect("a pipe")).lines().map_while(Result::ok) {
        if let Ok(line) = serde_json::from_str(&line) {
            lock(pods).entry(name.to_owned()).or_default().log.push(line);
        }
    }
    let _ = logs.wait();
    lock(pods).entry(name.to_owned()).or_default().log_ended = true;
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
