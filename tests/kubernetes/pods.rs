//! Observes the pods of a namespace: a watch, and lameduck's complete log.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use super::cluster::inside;

/// How long a pod may be kept once its last request and the lame duck are over. Every app is held to it, which is our part.
/// The rest is the kubelet's, which looks at its containers once a second, twice for a pod with a native sidecar: of a
/// case's pods the first is held to it, and each to three times as much. On a machine with more to do than these tests
/// it is later still, see [`slack`].
pub const GONE_WITHIN: Duration = Duration::from_secs(2);

/// How much of the load average the cases themselves make, by core, with the control plane and two at a time.
const OWN_LOAD: f64 = 3.0;

/// The longest that anything is waited for.
const LIMIT: Duration = Duration::from_secs(180);

/// One pod.
#[derive(Clone, Debug, Default)]
pub struct Pod {
    /// Lameduck's log.
    pub log: Vec<Value>,
    /// The log is at its end.
    log_ended: bool,
    /// When the API server let it go.
    gone: Option<SystemTime>,
    /// Restarts by container.
    pub restarts: BTreeMap<String, u64>,
    /// `Pending`, `Running`, `Succeeded`, `Failed`.
    pub phase: String,
    followed: bool,
}

type Shared = Arc<Mutex<BTreeMap<String, Pod>>>;

/// All pods that were ever seen.
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

    /// What is known of all pods now.
    pub fn all(&self) -> BTreeMap<String, Pod> {
        lock(&self.pods).clone()
    }

    /// Waits until this holds for what is known of all pods.
    ///
    /// # Panics
    /// When it doesn't within three minutes.
    pub fn wait(&self, what: &str, holds: impl Fn(&BTreeMap<String, Pod>) -> bool) {
        let end = Instant::now() + LIMIT;
        while !holds(&lock(&self.pods)) {
            assert!(Instant::now() < end, "{what}: not within {LIMIT:?}: {:#?}", self.all());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until so many pods have gone.
    pub fn wait_gone(&self, count: usize) {
        self.wait(&format!("{count} pods gone"), |pods| {
            pods.values().filter(|pod| pod.gone.is_some() && pod.log_ended).count() >= count
        });
    }

    /// Every pod that has gone had a clean drain and was gone `within` this time, as [`GONE_WITHIN`] has it; at least so
    /// many have.
    pub fn expect_clean_drains(&self, at_least: usize, within: Duration) {
        self.wait_gone(at_least);
        let within = within.mul_f64(slack());
        let mut all = Vec::new();
        for (name, pod) in self.all().iter().filter(|(_, pod)| pod.gone.is_some()) {
            let drained =
                pod.line("drained").unwrap_or_else(|| panic!("{name} never drained: {:#?}", pod.log));
            let kept = pod.gone.and_then(|gone| gone.duration_since(at(drained)).ok()).unwrap_or_default();
            // The sidecar is asked to go when the app has ended.
            let end = pod.line("asked to go").and_then(|line| at(line).duration_since(at(drained)).ok());
            let (verdict, seconds) = (&drained["verdict"], &drained["seconds"]);
            println!("{name}: {verdict} in {seconds} s, the app ended {end:.2?} later, the pod {kept:.2?}");
            assert_eq!(drained["verdict"], "clean", "{name}: {:#?}", pod.log);
            assert!(end.is_none_or(|end| end <= within), "{name}: its app was kept longer than {within:?}");
            all.push(kept);
        }
        all.sort();
        println!("pods were gone so long after their drain: {all:.2?}, the first to be within {within:.2?}");
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
    /// The log's last line with this message.
    pub fn line(&self, message: &str) -> Option<&Value> {
        self.log.iter().rev().find(|line| line["message"] == message)
    }
}

/// By how much to stretch a limit of time: 1, or as many times as the machine is busier than these tests make it.
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
    // Under `lameduck run` the app's own container speaks for both.
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
