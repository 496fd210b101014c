//! lameduck and Node as child processes; each is killed by its pid at the end of the test.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;

use super::http::{Answer, Client};
use super::port::Port;
use super::{LIMIT, wait_for};

/// In the place of an argument of `run`: no `--listen`, so the app is served on its own ports.
pub const OWN_PORTS: &str = "no --listen";

/// Token of every [`Lameduck`].
pub const TOKEN: &str = "a-test-token";

/// A child process and all lines that it wrote to stdout and stderr.
pub struct Process {
    name: String,
    child: Child,
    lines: Arc<(Mutex<Lines>, Condvar)>,
}

#[derive(Default)]
struct Lines {
    written: Vec<String>,
    /// Number of its two pipes that have ended.
    ended: u8,
}

impl Process {
    /// Starts `command`; `name` is used in messages.
    pub fn start(name: &str, command: &mut Command) -> Self {
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child =
            spawned.unwrap_or_else(|error| panic!("cannot start {name}: {error}; is it installed?"));
        let lines = Arc::default();
        collect(child.stdout.take().expect("piped"), &lines);
        collect(child.stderr.take().expect("piped"), &lines);
        Self { name: name.to_owned(), child, lines }
    }

    /// Waits for the first line, including those already written, for which `find` returns a value.
    pub fn wait_line<T>(&self, what: &str, mut find: impl FnMut(&str) -> Option<T>) -> T {
        let end = Instant::now() + LIMIT;
        let mut seen = 0;
        while let Some(line) = self.line(seen, end) {
            if let Some(found) = find(&line) {
                return found;
            }
            seen += 1;
        }
        panic!("{}: no line for {what}; it wrote:\n{}", self.name, self.output());
    }

    /// Waits for the line with this index; none if it doesn't come before `end` or the process's end.
    fn line(&self, number: usize, end: Instant) -> Option<String> {
        let (lines, changed) = &*self.lines;
        let left = end.saturating_duration_since(Instant::now());
        let lines = lines.lock().expect("not poisoned");
        let more = |lines: &mut Lines| lines.written.len() <= number && lines.ended < 2;
        let (lines, _) = changed.wait_timeout_while(lines, left, more).expect("not poisoned");
        lines.written.get(number).cloned()
    }

    /// All output so far.
    pub fn output(&self) -> String {
        self.lines.0.lock().expect("not poisoned").written.join("\n")
    }

    /// Sends a signal; does nothing if the process has exited.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Exit code, or 128 + the signal; none while it runs.
    pub fn exited(&mut self) -> Option<i32> {
        let status = self.child.try_wait().expect("our child")?;
        Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
    }

    /// Waits until the process has exited and its output is read; at most a second for output that its children keep
    /// open.
    pub fn wait_exit(&mut self) -> i32 {
        let code = wait_for(&format!("the end of {}", self.name.clone()), || self.exited());
        let (lines, changed) = &*self.lines;
        let lines = lines.lock().expect("not poisoned");
        drop(changed.wait_timeout_while(lines, Duration::from_secs(1), |lines| lines.ended < 2));
        code
    }

    /// Sends SIGKILL and waits for the exit.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("--- {} wrote:\n{}\n---", self.name, self.output());
        }
    }
}

fn collect(from: impl Read + Send + 'static, into: &Arc<(Mutex<Lines>, Condvar)>) {
    let into = Arc::clone(into);
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            into.0.lock().expect("not poisoned").written.push(line);
            into.1.notify_all();
        }
        into.0.lock().expect("not poisoned").ended += 1;
        into.1.notify_all();
    });
}

/// A plain Node app. Its port stays reserved after its end, so that another app can take its place.
pub struct Node {
    /// The process.
    pub process: Process,
    /// Address on which it listens.
    pub addr: SocketAddr,
    port: Option<Port>,
}

impl Node {
    /// `examples/slow`.
    pub fn slow() -> Self {
        Self::start(&repository("examples/slow/server.js"))
    }

    /// `examples/slow` on this port.
    pub fn slow_at(port: u16) -> Self {
        Self::start_at(&repository("examples/slow/server.js"), port)
    }

    /// `examples/chat`; installs its packages if needed.
    pub fn chat() -> Self {
        install(&repository("examples/chat"));
        Self::start(&repository("examples/chat/server.js"))
    }

    /// `held.js`, whose responses wait for [`Node::release`].
    pub fn held() -> Self {
        Self::start(&repository("tests/common/held.js"))
    }

    /// `held.js` on a port that the test reserved, or that belonged to another app.
    pub fn held_at(port: u16) -> Self {
        Self::start_at(&repository("tests/common/held.js"), port)
    }

    /// `polling.js`, for clients that use long polling.
    pub fn polling() -> Self {
        Self::start(&repository("tests/common/polling.js"))
    }

    fn start(script: &Path) -> Self {
        let port = Port::reserve();
        let mut node = Self::start_at(script, port.number());
        node.port = Some(port);
        node
    }

    fn start_at(script: &Path, port: u16) -> Self {
        let process = Process::start("node", Command::new("node").arg(script).env("PORT", port.to_string()));
        let port = process.wait_line("the app's port", listens_on);
        Self { process, addr: ([127, 0, 0, 1], port).into(), port: None }
    }

    /// Number of requests that the app is working on; asks the app directly, not through the proxy.
    pub fn active(&self) -> u64 {
        let answer = Client::ask(self.addr, "/active-requests");
        serde_json::from_slice::<Value>(&answer.body).expect("JSON")["active"].as_u64().expect("a number")
    }

    /// Waits until the app is working on this number of requests.
    pub fn wait_active(&self, number: u64) {
        wait_for(&format!("{number} active requests in the app"), || (self.active() == number).then_some(()));
    }

    /// Releases all waiting responses of `held.js`.
    pub fn release(&self) {
        Client::ask(self.addr, "/release");
    }
}

/// Port in an app's line `… listens on port N`.
fn listens_on(line: &str) -> Option<u16> {
    line.split_once("listens on port ")?.1.parse().ok()
}

/// Ids of the process's children, including zombies (proc_pid_task(5)).
pub fn children(pid: u32) -> Vec<u32> {
    let of_thread = |task: fs::DirEntry| fs::read_to_string(task.path().join("children")).ok();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(of_thread)
        .flat_map(|ids| ids.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// `npm ci`, only once for all concurrent tests.
fn install(app: &Path) {
    let lock = File::create(Path::new(env!("CARGO_TARGET_TMPDIR")).join("npm.lock")).expect("a lock file");
    lock.lock().expect("locked");
    let modified = |path: &str| fs::metadata(app.join(path)).and_then(|file| file.modified()).ok();
    if modified("node_modules/.package-lock.json") >= modified("package-lock.json") {
        return;
    }
    let npm = Command::new("npm").arg("ci").current_dir(app).output();
    let npm =
        npm.unwrap_or_else(|error| panic!("cannot start npm: {error}; install Node 18 or newer with npm"));
    assert!(npm.status.success(), "npm ci in {}:\n{}", app.display(), String::from_utf8_lossy(&npm.stderr));
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A running lameduck. Each `127.0.0.1:0` in its arguments becomes a reserved [`Port`], so that no other process
/// listens there after lameduck has closed its listener.
pub struct Lameduck {
    /// The process.
    pub process: Process,
    /// Data address, the first if there are several.
    pub listen: SocketAddr,
    /// All data addresses.
    pub listens: Vec<SocketAddr>,
    /// Probe address.
    pub probe: SocketAddr,
    /// Path of the control socket.
    pub control: PathBuf,
    /// Temporary directory, removed on drop.
    pub dir: PathBuf,
    _ports: Vec<Port>,
}

impl Lameduck {
    /// Starts `lameduck proxy` in front of `upstream`, and waits until it accepts connections. `args` extend or replace
    /// the tests' defaults.
    pub fn proxy(upstream: SocketAddr, args: &[&str]) -> Self {
        Self::proxy_to(&upstream.to_string(), args)
    }

    /// The same with the upstream's address as text.
    pub fn proxy_to(upstream: &str, args: &[&str]) -> Self {
        Self::start_as(lameduck(), &["proxy", "--upstream", upstream], args, &[])
    }

    /// Starts `lameduck run -- command`, and waits until it accepts connections.
    pub fn run(args: &[&str], command: &[&str]) -> Self {
        Self::start_as(lameduck(), &["run"], args, command)
    }

    /// Starts `lameduck run -- command` without `--listen`, and waits until it serves the app at the app's own address.
    pub fn run_at(program: Command, at: SocketAddr, args: &[&str], command: &[&str]) -> Self {
        let mut run = Self::start_as(program, &["run"], &[&[OWN_PORTS], args].concat(), command);
        (run.listen, run.listens) = (at, vec![at]);
        run.wait_log("the app listens");
        run
    }

    /// Starts any mode; `program` is [`lameduck`] with more variables, or a program that starts it.
    pub fn start_as(program: Command, mode: &[&str], args: &[&str], command: &[&str]) -> Self {
        let dir = temporary_directory();
        let control = dir.join("control.sock");
        let (process, ports) = spawn(program, &control, mode, args, command);
        let listening = process.wait_line("the proxy's addresses", |line| message(line, "listening"));
        let addrs = |field: &str| -> Vec<SocketAddr> {
            let addr = |text: &str| text.parse().unwrap_or_else(|_| panic!("no address in {listening}"));
            listening[field].as_str().map_or_else(Vec::new, |text| text.split(',').map(addr).collect())
        };
        let (listens, probe) = (addrs("listen"), addrs("probe")[0]);
        let listen = listens.first().copied().unwrap_or(probe);
        Self { listen, listens, probe, process, control, dir, _ports: ports }
    }

    /// Runs a `lameduck run` that is expected to exit without ever serving; returns its exit code and output.
    pub fn run_to_its_end(args: &[&str], command: &[&str]) -> (i32, String) {
        let dir = temporary_directory();
        let (mut process, _ports) = spawn(lameduck(), &dir.join("control.sock"), &["run"], args, command);
        let code = process.wait_exit();
        let _ = fs::remove_dir_all(dir);
        (code, process.output())
    }

    /// Sends SIGTERM, as the kubelet does.
    pub fn terminate(&self) {
        self.process.signal(Signal::TERM);
    }

    /// Stops the process (SIGSTOP) until [`Self::unpause`].
    pub fn pause(&self) {
        self.process.signal(Signal::STOP);
        let stat = format!("/proc/{}/stat", self.process.child.id());
        let stopped = || fs::read_to_string(&stat).ok()?.contains(") T ").then_some(());
        wait_for("the process to stop", stopped);
    }

    /// Continues the process.
    pub fn unpause(&self) {
        self.process.signal(Signal::CONT);
    }

    /// Waits for the log entry with this message, which may already be written.
    pub fn wait_log(&self, text: &str) -> Value {
        self.process.wait_line(&format!("\"{text}\""), |line| message(line, text))
    }

    /// `GET /status` on the control socket; none once the process has exited.
    pub fn status(&self) -> Option<Value> {
        let answer = Client::unix(&self.control)?.try_ask("/status", &[])?;
        serde_json::from_slice(&answer.body).ok()
    }

    /// Waits until `wanted` accepts the status.
    pub fn wait_status(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_for(what, || self.status().filter(&wanted))
    }

    /// Waits until the drain has reached this phase.
    pub fn wait_phase(&self, phase: &str) -> Value {
        self.wait_status(&format!("phase {phase}"), |status| status["phase"] == phase)
    }

    /// Waits until this number of requests is in flight.
    pub fn wait_in_flight(&self, number: u64) {
        self.wait_status(&format!("{number} in flight"), |status| status["in_flight"] == number);
    }

    /// Current value of a metric.
    pub fn metric(&self, name: &str) -> f64 {
        let text = Client::ask(self.probe, "/metrics").text();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {text}"))
    }

    /// Peak resident memory of the process, in KiB.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.child.id())).expect("alive");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
        peak.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// Address of the `--tcp` with this index.
    pub fn tcp(&self, number: usize) -> SocketAddr {
        let listening = self.wait_log("listening");
        let routes = listening["tcp"].as_str().unwrap_or_else(|| panic!("no --tcp in {listening}"));
        let route = routes.split(',').nth(number).and_then(|route| route.split('=').next());
        route.expect("as many").parse().expect("an address")
    }

    /// Number of sockets that the proxy has parked, as reported by the kernel: those registered in an epoll set for one
    /// event (proc_pid_fdinfo(5): EPOLLONESHOT, EPOLLIN, EPOLLRDHUP, and the two that are always set). The runtime
    /// registers its sockets for all events.
    pub fn parked(&self) -> usize {
        let files = fs::read_dir(format!("/proc/{}/fdinfo", self.process.pid())).expect("alive").flatten();
        let texts: Vec<_> = files.filter_map(|file| fs::read_to_string(file.path()).ok()).collect();
        let socket = |line: &str| {
            let (socket, events) = line.strip_prefix("tfd:")?.split_once("events:")?;
            events.trim().starts_with("40002019 ").then(|| socket.trim().to_owned())
        };
        // An epoll set with two file descriptors is listed twice.
        texts.iter().flat_map(|text| text.lines()).filter_map(socket).collect::<BTreeSet<_>>().len()
    }

    /// Connects to the data address.
    pub fn client(&self) -> Client {
        Client::connect(self.listen)
    }

    /// Calls the hook on the probe port, without reading the response.
    pub fn hook(&self, target: &str, token: Option<&str>) -> Client {
        let mut client = Client::connect(self.probe);
        let token = token.map(|token| format!("Lameduck-Token: {token}"));
        client.request("GET", target, &token.iter().map(String::as_str).collect::<Vec<_>>());
        client
    }

    /// `/readyz`: status and reasons.
    pub fn ready(&self) -> Answer {
        Client::ask(self.probe, "/readyz")
    }

    /// Starts `lameduck drain`, `resume` or `status`.
    pub fn command(&self, args: &[&str]) -> Process {
        Process::start("lameduck", lameduck().args(args).arg("--control").arg(&self.control))
    }

    /// The same, and waits for its end.
    pub fn command_output(&self, args: &[&str]) -> Output {
        lameduck().args(args).arg("--control").arg(&self.control).output().expect("lameduck starts")
    }

    /// Waits for the exit, which must be that of a clean drain: verdict `clean` and exit code 0.
    pub fn expect_clean_exit(&mut self) {
        let code = self.process.wait_exit();
        assert_eq!(self.wait_log("drained")["verdict"], "clean");
        assert_eq!(code, 0);
    }
}

impl Drop for Lameduck {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
        // SIGKILL would leave the app of `run` behind, because the app has its own process group.
        let apps = if self.process.exited().is_none() { children(self.process.pid()) } else { vec![] };
        self.process.kill();
        for app in apps.into_iter().filter_map(|app| Pid::from_raw(app.try_into().ok()?)) {
            let _ = kill_process_group(app, Signal::KILL);
        }
    }
}

fn spawn(
    mut lameduck: Command,
    control: &Path,
    mode: &[&str],
    args: &[&str],
    command: &[&str],
) -> (Process, Vec<Port>) {
    let defaults = [
        ["--listen", "127.0.0.1:0"],
        ["--probe-listen", "127.0.0.1:0"],
        ["--token", TOKEN],
        ["--lame-duck", "200ms"],
        ["--stream-spread", "0s"],
        ["--log-format", "json"],
    ];
    let set: Vec<_> =
        lameduck.get_envs().filter(|(_, value)| value.is_some()).map(|(name, _)| name.to_owned()).collect();
    let is_set = |flag: &str| {
        let variable = flag.to_uppercase().replace("--", "LAMEDUCK_").replace('-', "_");
        // `run` without --listen uses the inherited PORT.
        let inherits = set.iter().any(|name| name == "PORT") || args.contains(&OWN_PORTS);
        let set = set.iter().any(|name| *name == *variable);
        set || args.contains(&flag) || flag == "--listen" && inherits
    };
    let mut ports = Vec::new();
    if !set.iter().any(|name| name == "TMPDIR") {
        // What a killed lameduck leaves behind is removed with it.
        lameduck.env("TMPDIR", control.parent().expect("a folder"));
    }
    lameduck.args(mode).arg("--control").arg(control);
    let defaults = defaults.iter().filter(|default| !is_set(default[0])).flatten();
    let all = defaults.chain(args).filter(|arg| **arg != OWN_PORTS);
    lameduck.args(all.map(|arg| Port::reserve_in(arg, &mut ports)));
    if !command.is_empty() {
        lameduck.arg("--").args(command);
    }
    (Process::start("lameduck", &mut lameduck), ports)
}

/// The built program, without settings from the environment of the test run.
pub fn lameduck() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lameduck"));
    command.env_remove("PORT");
    let ours = |name: &OsStr| name.to_string_lossy().starts_with("LAMEDUCK_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| ours(name)) {
        command.env_remove(name);
    }
    command
}

/// Parses the line as a log entry with this message.
fn message(line: &str, text: &str) -> Option<Value> {
    serde_json::from_str::<Value>(line).ok().filter(|entry| entry["message"] == text)
}

/// Creates a unique temporary directory.
pub fn temporary_directory() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("lameduck-test-{}-{number}", std::process::id()));
    fs::create_dir_all(&dir).expect("a temporary directory");
    dir
}
