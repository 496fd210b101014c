//! The engine, images, and namespaces of a real cluster.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::load::Load;
use super::pods::Pods;

/// The example that is tested, with all that a reader of it would apply.
pub const SLOW: &str = include_str!("../../manifests/sidecar/slow.yaml");

/// One case at a time: each wants the machine for itself.
static TURN: Mutex<()> = Mutex::new(());

/// A namespace that enforces `restricted`, gone again at the end.
pub struct Namespace {
    pub name: &'static str,
    pub pods: Pods,
    _turn: MutexGuard<'static, ()>,
}

/// `$LAMEDUCK_CLUSTER`, or the engine beside the repository. None, loudly, if there is none.
fn engine() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/cluster/cluster");
    let engine = std::env::var_os("LAMEDUCK_CLUSTER").map_or(beside, PathBuf::from);
    if engine.is_file() {
        return Some(engine);
    }
    eprintln!("LEFT OUT: no cluster at {} (set LAMEDUCK_CLUSTER): NOTHING WAS TESTED", engine.display());
    None
}

/// A command inside the cluster's network, with `KUBECONFIG` set.
pub fn inside(command: &str) -> Command {
    let mut run = Command::new(engine().expect("an engine"));
    run.args(["run", command]);
    run
}

impl Namespace {
    /// A new namespace on the running cluster; none if there is no engine.
    pub fn new(name: &'static str) -> Option<Self> {
        let engine = engine()?;
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        static READY: OnceLock<()> = OnceLock::new();
        READY.get_or_init(|| set_up(&engine));
        kubectl(&["delete", "namespace", name, "--ignore-not-found", "--timeout=120s"]);
        kubectl(&["create", "namespace", name]);
        kubectl(&["label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted"]);
        Some(Self { name, pods: Pods::watch(name), _turn: turn })
    }

    /// `kubectl` in this namespace.
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        kubectl(&[&["-n", self.name], arguments].concat())
    }

    /// Applies this text.
    pub fn apply(&self, yaml: &str) {
        let mut child = inside("kubectl")
            .args(["-n", self.name, "apply", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("kubectl");
        child.stdin.take().expect("a pipe").write_all(yaml.as_bytes()).expect("applied");
        assert!(child.wait().expect("kubectl").success(), "apply failed");
    }

    /// Applies the example, changed by `(from, to)`, and waits until all replicas are ready.
    pub fn deploy(&self, changes: &[(&str, &str)]) {
        let yaml = changes.iter().fold(SLOW.to_owned(), |yaml, (from, to)| {
            assert!(yaml.contains(from), "the example has no {from:?}");
            yaml.replace(from, to)
        });
        self.apply(&yaml);
        self.rolled_out();
    }

    /// Waits until the Deployment is as it should be.
    pub fn rolled_out(&self) {
        self.kubectl(&["rollout", "status", "deployment", "--timeout=180s"]);
    }

    /// One rolling restart; returns how long it took until the last new pod was ready.
    pub fn restart(&self, deployment: &str) -> Duration {
        let began = Instant::now();
        self.kubectl(&["rollout", "restart", deployment]);
        self.rolled_out();
        began.elapsed()
    }

    /// Load on the Service's cluster address.
    pub fn load(&self, service: &str, arguments: &[&str]) -> Load {
        let ip = self.kubectl(&["get", "service", service, "-o", "jsonpath={.spec.clusterIP}"]);
        Load::start(&[&["--addr", &format!("{ip}:80")], arguments].concat())
    }

    /// The names of pods that aren't being deleted.
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
        // After a failure it stays for a look, until the case runs again.
        if !std::thread::panicking() {
            let _ = inside("kubectl").args(["delete", "namespace", self.name, "--wait=false"]).output();
        }
    }
}

/// Runs `kubectl` and returns what it said.
///
/// # Panics
/// When it fails.
pub fn kubectl(arguments: &[&str]) -> String {
    let output = inside("kubectl").args(arguments).output().expect("kubectl");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "kubectl {}: {error}", arguments.join(" "));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Starts the cluster if it isn't up, builds lameduck and the load client, and puts the images on the nodes.
fn set_up(engine: &Path) {
    run(Command::new(engine).args(["up", "2"]));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    run(cargo().args(["build", "--example", "load"]));
    let lameduck = std::env::var_os("LAMEDUCK_BIN").map_or_else(
        || {
            let target = "x86_64-unknown-linux-musl";
            run(cargo().args(["build", "--release", "--bin", "lameduck", "--target", target]));
            target_dir().join(target).join("release/lameduck")
        },
        PathBuf::from,
    );
    let path = |path: &Path| path.to_str().expect("a path in UTF-8").to_owned();
    let binary = format!("{}:/usr/local/bin/lameduck", path(&lameduck));
    image(engine, "lameduck:0.1.0", &["--file", &binary, "--entrypoint", r#"["lameduck"]"#]);

    let node = Command::new("node").args(["-p", "process.execPath"]).output().expect("node");
    let node = format!("{}:/usr/local/bin/node", String::from_utf8_lossy(&node.stdout).trim());
    let chat = Path::new(env!("CARGO_TARGET_TMPDIR")).join("chat");
    run(Command::new("cp").arg("-rT").arg(root.join("examples/chat")).arg(&chat));
    run(Command::new("npm").args(["ci", "--silent", "--no-audit", "--no-fund"]).current_dir(&chat));
    for (name, folder) in [("slow:1.0.0", root.join("examples/slow")), ("chat:1.0.0", chat)] {
        let app = format!("{}:/app", path(&folder));
        let start = r#"["node", "server.js"]"#;
        image(
            engine,
            name,
            &["--program", &node, "--file", &app, "--workdir", "/app", "--entrypoint", start],
        );
    }
}

fn image(engine: &Path, name: &str, arguments: &[&str]) {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("image.tar");
    run(Command::new(engine.with_file_name("image")).arg(name).arg(&file).args(arguments));
    run(Command::new(engine).arg("load").arg(&file));
}

fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo
}

/// Where cargo builds to: two folders above this test's own program.
pub fn target_dir() -> PathBuf {
    let me = std::env::current_exe().expect("a path");
    me.ancestors().nth(3).expect("target/debug/deps/me").to_owned()
}

fn run(command: &mut Command) {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    assert!(status.as_ref().is_ok_and(|status| status.success()), "{command:?}: {status:?}");
}
