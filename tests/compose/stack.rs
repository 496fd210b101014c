//! The engine, its images, and a stack of `examples/compose` on it.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::load::Load;

/// Only one case runs at a time, because each needs the whole machine.
static TURN: Mutex<()> = Mutex::new(());
/// Time limit for each operation of the engine.
const LIMIT: Duration = Duration::from_secs(120);

/// A running stack, removed on drop.
pub struct Stack {
    files: Vec<String>,
    port: u16,
    /// The folder of the control socket.
    run: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

/// `$LAMEDUCK_DOCKER`, or the engine beside the repository; none if there is no engine, which is printed.
fn engine() -> Option<PathBuf> {
    let beside = root().join("../shared/docker/engine");
    let engine = std::env::var_os("LAMEDUCK_DOCKER").map_or(beside, PathBuf::from);
    if engine.is_file() {
        return Some(engine);
    }
    eprintln!("LEFT OUT: no engine at {} (set LAMEDUCK_DOCKER): NOTHING WAS TESTED", engine.display());
    None
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

impl Stack {
    /// Starts the example with WebSockets and these of its files, and waits until the front door is ready; none without
    /// an engine.
    pub fn up(files: &[&str]) -> Option<Self> {
        let engine = engine()?;
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        static READY: OnceLock<()> = OnceLock::new();
        READY.get_or_init(|| set_up(&engine));
        let run = temporary("run");
        let _ = std::fs::remove_dir_all(&run);
        std::fs::create_dir_all(&run).expect("a folder");
        // Root may connect to any user's socket.
        if user().is_none() {
            std::os::unix::fs::chown(&run, Some(65532), Some(65532)).expect("the image's own user owns it");
        }
        let free = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = free.local_addr().expect("its address").port();
        drop(free);
        let file = |name: &&str| root().join(name).display().to_string();
        let files = [&["examples/compose/compose.yaml", "tests/compose/compose.yaml"], files].concat();
        let stack = Self { files: files.iter().map(file).collect(), port, run, _turn: turn };
        stack.compose(&["down", "-v", "-t", "1"]);
        stack.compose(&["up", "-d"]);
        stack.wait("the front door is ready", || stack.lameduck(&["status", "--ready"]).status.success());
        Some(stack)
    }

    /// `docker compose` in this stack, as a command for `lameduck swap` to run.
    pub fn compose_command(&self, arguments: &[&str]) -> Vec<String> {
        let mut command: Vec<String> =
            vec!["docker".into(), "compose".into(), "-p".into(), "lameduck-test".into()];
        for file in &self.files {
            command.extend(["-f".into(), file.clone()]);
        }
        command.extend(arguments.iter().map(ToString::to_string));
        command
    }

    /// Runs `docker compose` in this stack and returns its output.
    ///
    /// # Panics
    /// If it fails.
    pub fn compose(&self, arguments: &[&str]) -> String {
        let command = self.compose_command(arguments);
        let output = self.environment(Command::new(&command[0]).args(&command[1..])).output();
        said(&output.expect("docker"), &command.join(" "))
    }

    /// Runs this build of `lameduck` against the stack's front door, over the control socket in the bind mount.
    pub fn lameduck(&self, arguments: &[&str]) -> Output {
        let (subcommand, rest) = arguments.split_first().expect("a subcommand");
        let mut command = Command::new(env!("CARGO_BIN_EXE_lameduck"));
        command.arg(subcommand).arg("--control").arg(self.run.join("control.sock")).args(rest);
        self.environment(&mut command).output().expect("lameduck")
    }

    /// The same; prints and returns its output.
    ///
    /// # Panics
    /// If it fails.
    pub fn must(&self, arguments: &[&str]) -> String {
        let output = self.lameduck(arguments);
        let text = said(&output, &arguments.join(" "));
        println!("{}{text}", String::from_utf8_lossy(&output.stderr));
        text
    }

    fn environment<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command.env("LAMEDUCK_RUN", &self.run).env("PORT", self.port.to_string());
        command.env("TLS_DIR", temporary("tls")).env("TLS_PORT", "0");
        command.env("LAMEDUCK_IMAGE", LAMEDUCK).env("ATTACH", temporary("attach"));
        command.envs(user().map(|user| ("LAMEDUCK_USER", user))).stdin(Stdio::null());
        // Debian's engine has only the classic builder.
        command.env("DOCKER_BUILDKIT", "0").env("COMPOSE_BAKE", "false")
    }

    /// 60 clients with these kinds of requests, through the published port.
    pub fn load(&self, kinds: &str) -> Load {
        Load::start(self.port, kinds)
    }

    /// Waits until `ask` returns true.
    ///
    /// # Panics
    /// After [`LIMIT`].
    pub fn wait(&self, what: &str, ask: impl Fn() -> bool) {
        let end = Instant::now() + LIMIT;
        while !ask() {
            assert!(Instant::now() < end, "{what}: not within {LIMIT:?}:\n{}", self.compose(&["logs"]));
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Time from the start of a service's newest container until the app in it listened.
    pub fn boot(&self, service: &str) -> Duration {
        let id = self.compose(&["ps", "-q", service]).lines().last().expect("a container").to_owned();
        let time = |text: &str| humantime::parse_rfc3339(text).expect("a time");
        let started = time(docker(&["inspect", "-f", "{{.State.StartedAt}}", &id]).trim());
        let listens = || -> Option<SystemTime> {
            let log = docker(&["logs", "-t", &id]);
            let line = log.lines().find(|line| line.contains("listens on port"))?;
            Some(time(line.split(' ').next()?))
        };
        self.wait("the app listens", || listens().is_some());
        listens().and_then(|at| at.duration_since(started).ok()).unwrap_or_default()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.compose(&["logs", "-t"]));
        }
        self.compose(&["down", "-v", "-t", "1"]);
    }
}

/// User and group id of this process, which must own the control socket; none for root.
fn user() -> Option<String> {
    use rustix::process::{getgid, getuid};
    (!getuid().is_root()).then(|| format!("{}:{}", getuid().as_raw(), getgid().as_raw()))
}

/// The image of lameduck under test.
const LAMEDUCK: &str = "lameduck:test";

/// Builds the image from the Dockerfile. If `$LAMEDUCK_BIN` names a static binary, it replaces the build stage.
fn build_lameduck() {
    let Some(built) = std::env::var_os("LAMEDUCK_BIN") else {
        return build_whole(&[], LAMEDUCK);
    };
    let context = temporary("image");
    let _ = std::fs::remove_dir_all(&context);
    for folder in ["out/bin", "out/run/lameduck"] {
        std::fs::create_dir_all(context.join(folder)).expect("a folder");
    }
    std::fs::copy(built, context.join("out/bin/lameduck")).expect("$LAMEDUCK_BIN");
    let whole = std::fs::read_to_string(root().join("Dockerfile")).expect("a Dockerfile");
    let image = whole.find("FROM scratch\n").expect("the image's own stage");
    let text = format!("FROM scratch AS build\nCOPY out /out\n{}", &whole[image..]);
    std::fs::write(context.join("Dockerfile"), text).expect("written");
    run(Command::new("docker").args(["build", "-t", LAMEDUCK, "."]).current_dir(&context));
}

/// Runs `docker` and returns its output.
///
/// # Panics
/// If it fails.
pub fn docker(arguments: &[&str]) -> String {
    said(&Command::new("docker").args(arguments).output().expect("docker"), &arguments.join(" "))
}

fn said(output: &Output, what: &str) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {error}{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Builds the image from the whole Dockerfile, on a stand-in for its base image.
fn build_whole(how: &[&str], name: &str) {
    run(Command::new(root().join("tests/compose/base-image.sh")).args(how));
    run(Command::new("docker").args(["build", "-t", name, "."]).current_dir(root()));
}

/// Builds the whole Dockerfile without optimisation and runs the image with `--version`. Does nothing if there is no
/// engine.
///
/// # Panics
/// If the build or the program fails.
pub fn dockerfile() {
    let Some(engine) = engine() else { return };
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    run(Command::new(engine).arg("up"));
    build_whole(&["--quick"], "lameduck:quick");
    let version = docker(&["run", "--rm", "--read-only", "lameduck:quick", "--version"]);
    assert_eq!(version.trim(), concat!("lameduck ", env!("CARGO_PKG_VERSION")));
}

/// Starts the engine unless it is running; builds the load client and the images.
fn set_up(engine: &Path) {
    run(Command::new(engine).arg("up"));
    run(Command::new(env!("CARGO")).args(["build", "--locked", "--example", "load"]).current_dir(root()));
    build_lameduck();
    // An image of Node, made from this machine's Node.
    let node = Command::new("node").args(["-p", "process.execPath"]).output().expect("node");
    let node = format!("{}:/usr/local/bin/node", String::from_utf8_lossy(&node.stdout).trim());
    let image = temporary("node.tar");
    let make = engine.with_file_name("../cluster/image");
    run(Command::new(make).arg("node:24-alpine").arg(&image).args(["--program", &node]));
    run(Command::new("docker").arg("load").arg("-i").arg(&image));
    let attach = temporary("attach");
    std::fs::create_dir_all(&attach).expect("a folder");
    for file in ["examples/chat/package.json", "examples/chat/package-lock.json", "tests/compose/attach.js"] {
        let name = Path::new(file).file_name().expect("a name");
        std::fs::copy(root().join(file), attach.join(name)).expect("copied");
    }
    run(Command::new("npm").args(["ci", "--silent", "--no-audit", "--no-fund"]).current_dir(&attach));
    let build = ["compose", "-f", "examples/compose/compose.yaml", "build", "app"];
    let mut build_app = Command::new("docker");
    build_app.args(build).current_dir(root()).env("LAMEDUCK_IMAGE", LAMEDUCK);
    run(&mut build_app);
}

fn run(command: &mut Command) {
    // Debian's engine has only the classic builder.
    command.env("DOCKER_BUILDKIT", "0").env("COMPOSE_BAKE", "false");
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    assert!(status.as_ref().is_ok_and(|status| status.success()), "{command:?}: {status:?}");
}

/// Creates a certificate for localhost where the stack expects it, and returns its path.
pub fn certificate() -> PathBuf {
    let dir = temporary("tls");
    std::fs::create_dir_all(&dir).expect("a folder");
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    std::fs::write(dir.join("tls.key"), made.signing_key.serialize_pem()).expect("a file");
    std::fs::write(dir.join("tls.crt"), made.cert.pem()).expect("a file");
    dir.join("tls.crt")
}
