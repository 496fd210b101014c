//! The engine, `kubectl`, and namespaces of a real cluster.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::images::{self, scratch};
use super::load::Load;
use super::pods::Pods;

/// Cases share the cluster, except those that remove a node or the webhook.
static CLUSTER: RwLock<()> = RwLock::new(());

enum Turn {
    Shared { _held: RwLockReadGuard<'static, ()> },
    Alone { _held: RwLockWriteGuard<'static, ()> },
}

/// A namespace that enforces `restricted`, deleted on drop.
pub struct Namespace {
    pub name: &'static str,
    pub pods: Pods,
    began: Instant,
    _turn: Turn,
}

/// `$LAMEDUCK_CLUSTER`, or the engine beside the repository; none if there is no engine, which is printed.
pub fn engine() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/cluster/cluster");
    let engine = std::env::var_os("LAMEDUCK_CLUSTER").map_or(beside, PathBuf::from);
    if engine.is_file() {
        return Some(engine);
    }
    eprintln!("LEFT OUT: no cluster at {} (set LAMEDUCK_CLUSTER): NOTHING WAS TESTED", engine.display());
    None
}

/// Starts the cluster and loads the images; returns false if there is no engine.
fn ready() -> bool {
    static READY: OnceLock<bool> = OnceLock::new();
    *READY.get_or_init(|| {
        let Some(engine) = engine() else { return false };
        run(Command::new(&engine).args(["up", "2"]));
        images::put(&engine);
        true
    })
}

/// A command inside the cluster's network, with `KUBECONFIG` set.
pub fn inside(command: &str) -> Command {
    let mut run = Command::new(engine().expect("an engine"));
    run.args(["run", command]);
    run
}

impl Namespace {
    /// Creates a namespace on the running cluster; none if there is no engine.
    pub fn new(name: &'static str) -> Option<Self> {
        let shared = || Turn::Shared { _held: CLUSTER.read().unwrap_or_else(PoisonError::into_inner) };
        ready().then(|| Self::create(name, shared()))
    }

    /// The same, while no other case runs.
    pub fn alone(name: &'static str) -> Option<Self> {
        let alone = || Turn::Alone { _held: CLUSTER.write().unwrap_or_else(PoisonError::into_inner) };
        ready().then(|| Self::create(name, alone()))
    }

    fn create(name: &'static str, turn: Turn) -> Self {
        kubectl(&["delete", "namespace", name, "--ignore-not-found", "--timeout=120s"]);
        kubectl(&["create", "namespace", name]);
        let [enforce, warn] =
            ["enforce", "warn"].map(|mode| format!("pod-security.kubernetes.io/{mode}=restricted"));
        kubectl(&["label", "namespace", name, &enforce, &warn]);
        Self { name, pods: Pods::watch(name), began: Instant::now(), _turn: turn }
    }

    /// `kubectl` in this namespace.
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        kubectl(&[&["-n", self.name], arguments].concat())
    }

    /// Applies this text.
    pub fn apply(&self, yaml: &str) {
        let applied = kubectl_with(yaml, &["-n", self.name, "apply", "-f", "-"]);
        assert!(applied.status.success(), "apply: {}", String::from_utf8_lossy(&applied.stderr));
    }

    /// Waits until every Deployment is rolled out.
    pub fn rolled_out(&self) {
        self.kubectl(&["rollout", "status", "deployment", "--timeout=180s"]);
    }

    /// Restarts these Deployments once and waits for the rollout; prints how long it took.
    pub fn restart(&self, deployments: &[&str]) {
        let began = Instant::now();
        self.kubectl(&[&["rollout", "restart", "deployment"], deployments].concat());
        self.rolled_out();
        println!("{}: rollout took {:.1?}", self.name, began.elapsed());
    }

    /// Address and port of a Service.
    pub fn address(&self, service: &str) -> String {
        let both = "jsonpath={.spec.clusterIP} {.spec.ports[0].port}";
        let both = self.kubectl(&["get", "service", service, "-o", both]);
        let (ip, port) = both.split_once(' ').expect("an address and a port");
        if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
    }

    /// Starts load on a Service.
    pub fn load(&self, service: &str, arguments: &[&str]) -> Load {
        let addr = format!("--addr={}", self.address(service));
        Load::start(&format!("{}/{service}", self.name), &[&[addr.as_str()], arguments].concat())
    }

    /// Names of the pods that are not being deleted.
    pub fn living(&self) -> Vec<String> {
        let pods: Value =
            serde_json::from_str(&self.kubectl(&["get", "pods", "-o", "json"])).expect("a list of pods");
        let living = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
        let name = |pod: &Value| pod["metadata"]["name"].as_str().expect("a name").to_owned();
        pods["items"].as_array().expect("a list").iter().filter(living).map(name).collect()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let took: Duration = self.began.elapsed();
        let failed = std::thread::panicking();
        println!("{}: {} after {took:.0?}", self.name, if failed { "FAILED" } else { "done" });
        // A failed case keeps its namespace until it runs again; of pods that are gone, only the logs are left.
        if failed {
            let file = scratch(&format!("{}.log", self.name));
            let written = std::fs::write(&file, format!("{:#?}", self.pods.all()));
            println!("{}: the pods' logs are in {}: {written:?}", self.name, file.display());
        } else {
            let _ = inside("kubectl").args(["delete", "namespace", self.name, "--wait=false"]).output();
        }
    }
}

/// Runs `kubectl` and returns its output.
///
/// # Panics
/// If it fails.
pub fn kubectl(arguments: &[&str]) -> String {
    let output = inside("kubectl").args(arguments).output().expect("kubectl");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "kubectl {}: {error}", arguments.join(" "));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs `kubectl` with this text on its standard input; the caller checks whether it succeeded.
pub fn kubectl_with(input: &str, arguments: &[&str]) -> Output {
    with_input(inside("kubectl").args(arguments), input)
}

/// Runs a command with this text on its standard input.
pub fn with_input(command: &mut Command, input: &str) -> Output {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().expect("it starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_owned();
    let written = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().expect("it ends");
    let _ = written.join();
    output
}

/// Runs a command that must succeed, and prints its errors.
pub fn run(command: &mut Command) {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    assert!(status.as_ref().is_ok_and(|status| status.success()), "{command:?}: {status:?}");
}
