//! lameduck and Node as child processes; each is killed by its pid when the test is over.

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

/// The token that [`Lameduck`]s are started with.
pub const TOKEN: &str = "a-test-token";

/// A child process and every line that it wrote, to stdout and stderr alike.
pub struct Process {
    name: String,
    child: Child,
    lines: Arc<(Mutex<Lines>, Condvar)>,
}

#[derive(Default)]
struct Lines {
    written: Vec<String>,
    /// How many of the process's two pipes have ended.
    ended: u8,
}

impl Process {
    /// Starts `command`; `name` is for messages.
    pub fn start(name: &str, command: &mut Command) -> Self {
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child =
            spawned.unwrap_or_else(|error| panic!("cannot start {name}: {error}; is it installed?"));
        let lines = Arc::default();
        collect(child.stdout.take().expect("piped"), &lines);
        collect(child.stderr.take().expect("piped"), &lines);
        Self { name: name.to_owned(), child, lines }
    }

    /// The first line, written already or yet to come, of which `find` makes something.
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

    /// The line of this number, if it comes in time and before the process's end.
    fn line(&self, number: usize, end: Instant) -> Option<String> {
        let (lines, changed) = &*self.lines;
        let left = end.saturating_duration_since(Instant::now());
        let lines = lines.lock().expect("not poisoned");
        let more = |lines: &mut Lines| lines.written.len() <= number && lines.ended < 2;
        let (lines, _) = changed.wait_timeout_while(lines, left, more).expect("not poisoned");
        lines.written.get(number).cloned()
    }

    /// All that it has written so far.
    pub fn output(&self) -> String {
        self.lines.0.lock().expect("not poisoned").written.join("\n")
    }

    /// Sends a signal; a process that has gone already gets none.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit code, or 128 and the signal's number, if it has gone.
    pub fn exited(&mut self) -> Option<i32> {
        let status = self.child.try_wait().expect("our child")?;
        Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
    }

    /// Waits until it is gone and what it wrote has been read; no longer than a second for what its children hold.
    pub fn wait_exit(&mut self) -> i32 {
        let code = wait_for(&format!("the end of {}", self.name.clone()), || self.exited());
        let (lines, changed) = &*self.lines;
        let lines = lines.lock().expect("not poisoned");
        drop(changed.wait_timeout_while(lines, Duration::from_secs(1), |lines| lines.ended < 2));
        code
    }

    /// SIGKILL, and waits until it is gone.
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

/// A plain Node app. Its port stays its own after its end, so another one may take its place there.
pub struct Node {
    /// The process.
    pub process: Process,
    /// Where it listens.
    pub addr: SocketAddr,
    port: Option<Port>,
}

impl Node {
    /// `examples/slow`.
    pub fn slow() -> Self {
        Self::start(&repository("examples/slow/server.js"))
    }

    /// The same on a port of the test's choice.
    pub fn slow_at(port: u16) -> Self {
        Self::start_at(&repository("examples/slow/server.js"), port)
    }

    /// `examples/chat`; its packages are installed first if they aren't yet.
    pub fn chat() -> Self {
        install(&repository("examples/chat"));
        Self::start(&repository("examples/chat/server.js"))
    }

    /// `held.js`, whose answers wait for [`Node::release`].
    pub fn held() -> Self {
        Self::start(&repository("tests/common/held.js"))
    }

    /// `held.js` on a port that the test has reserved, or that was another app's.
    pub fn held_at(port: u16) -> Self {
        Self::start_at(&repository("tests/common/held.js"), port)
    }

    /// `polling.js`, whose clients wait for news by long polls.
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

    /// Asks the app itself, past the proxy, how many requests it is working on.
    pub fn active(&self) -> u64 {
        let answer = Client::ask(self.addr, "/active-requests");
        serde_json::from_slice::<Value>(&answer.body).expect("JSON")["active"].as_u64().expect("a number")
    }

    /// Waits until the app works on so many requests.
    pub fn wait_active(&self, number: u64) {
        wait_for(&format!("{number} active requests in the app"), || (self.active() == number).then_some(()));
    }

    /// Lets everything that waits in `held.js` go on.
    pub fn release(&self) {
        Client::ask(self.addr, "/release");
    }
}

/// The port in an app's `… listens on port N`.
fn listens_on(line: &str) -> Option<u16> {
    line.split_once("listens on port ")?.1.parse().ok()
}

/// The ids of a process's children, dead ones too until they are reaped (proc_pid_task(5)).
pub fn children(pid: u32) -> Vec<u32> {
    let of_thread = |task: fs::DirEntry| fs::read_to_string(task.path().join("children")).ok();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(of_thread)
        .flat_map(|ids| ids.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// `npm ci`, once for all tests that run side by side.
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

/// A running lameduck. Each `127.0.0.1:0` in its arguments is a [`Port`] of its own, so that nobody else is met where it
/// has closed its listener.
pub struct Lameduck {
    /// The process.
    pub process: Process,
    /// The data address, the first if there are several.
    pub listen: SocketAddr,
    /// All data addresses.
    pub listens: Vec<SocketAddr>,
    /// The probe address.
    pub probe: SocketAddr,
    /// The control socket.
    pub control: PathBuf,
    /// A directory of its own, gone in the end.
    pub dir: PathBuf,
    _ports: Vec<Port>,
}

impl Lameduck {
    /// `lameduck proxy` in front of `upstream`, ready to take connections. `args` come on top of the tests' defaults,
    /// or replace them.
    pub fn proxy(upstream: SocketAddr, args: &[&str]) -> Self {
        Self::proxy_to(&upstream.to_string(), args)
    }

    /// The same by the upstream's address as it is typed.
    pub fn proxy_to(upstream: &str, args: &[&str]) -> Self {
        Self::start(&["proxy", "--upstream", upstream], args, &[])
    }

    /// `lameduck run -- command`, ready to take connections.
    pub fn run(args: &[&str], command: &[&str]) -> Self {
        Self::start(&["run"], args, command)
    }

    fn start(mode: &[&str], args: &[&str], command: &[&str]) -> Self {
        Self::start_as(lameduck(), mode, args, command)
    }

    /// Whatever the mode; `program` is [`lameduck`] with variables of its own, or what starts it in its turn.
    pub fn start_as(program: Command, mode: &[&str], args: &[&str], command: &[&str]) -> Self {
        let dir = temporary_directory();
        let control = dir.join("control.sock");
        let (process, ports) = spawn(program, &control, mode, args, command);
        let listening = process.wait_line("the proxy's addresses", |line| message(line, "listening"));
        let addrs = |field: &str| -> Vec<SocketAddr> {
            let text = listening[field].as_str().unwrap_or_else(|| panic!("no {field} in {listening}"));
            let addr = |text: &str| text.parse().unwrap_or_else(|_| panic!("no address in {listening}"));
            text.split(',').map(addr).collect()
        };
        let listens = addrs("listen");
        Self { listen: listens[0], listens, probe: addrs("probe")[0], process, control, dir, _ports: ports }
    }

    /// `lameduck run` that is expected to end without ever serving: its exit code and all that it wrote.
    pub fn run_to_its_end(args: &[&str], command: &[&str]) -> (i32, String) {
        let dir = temporary_directory();
        let (mut process, _ports) = spawn(lameduck(), &dir.join("control.sock"), &["run"], args, command);
        let code = process.wait_exit();
        let _ = fs::remove_dir_all(dir);
        (code, process.output())
    }

    /// SIGTERM, as the kubelet sends it.
    pub fn terminate(&self) {
        self.process.signal(Signal::TERM);
    }

    /// Stops the process where it is, until [`Self::unpause`].
    pub fn pause(&self) {
        self.process.signal(Signal::STOP);
        let stat = format!("/proc/{}/stat", self.process.child.id());
        let stopped = || fs::read_to_string(&stat).ok()?.contains(") T ").then_some(());
        wait_for("the process to stop", stopped);
    }

    /// Lets it go on.
    pub fn unpause(&self) {
        self.process.signal(Signal::CONT);
    }

    /// The log entry with this message, written already or yet to come.
    pub fn wait_log(&self, text: &str) -> Value {
        self.process.wait_line(&format!("\"{text}\""), |line| message(line, text))
    }

    /// `GET /status` on the control socket; none once the process is gone.
    pub fn status(&self) -> Option<Value> {
        let answer = Client::unix(&self.control)?.try_ask("/status", &[])?;
        serde_json::from_slice(&answer.body).ok()
    }

    /// Waits until the status is as wanted.
    pub fn wait_status(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_for(what, || self.status().filter(&wanted))
    }

    /// Waits until the drain has come to this phase.
    pub fn wait_phase(&self, phase: &str) -> Value {
        self.wait_status(&format!("phase {phase}"), |status| status["phase"] == phase)
    }

    /// Waits until so many requests are in flight.
    pub fn wait_in_flight(&self, number: u64) {
        self.wait_status(&format!("{number} in flight"), |status| status["in_flight"] == number);
    }

    /// A metric's value now.
    pub fn metric(&self, name: &str) -> f64 {
        let text = Client::ask(self.probe, "/metrics").text();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {text}"))
    }

    /// The most memory that the process has had resident so far, in KiB.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.child.id())).expect("alive");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
        peak.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// The address of the `--tcp` with this number.
    pub fn tcp(&self, number: usize) -> SocketAddr {
        let listening = self.wait_log("listening");
        let routes = listening["tcp"].as_str().unwrap_or_else(|| panic!("no --tcp in {listening}"));
        let route = routes.split(',').nth(number).and_then(|route| route.split('=').next());
        route.expect("as many").parse().expect("an address")
    }

    /// How many sockets the proxy has parked, by the kernel's own word: those of which an epoll set reports one event
    /// (proc_pid_fdinfo(5): EPOLLONESHOT, EPOLLIN, EPOLLRDHUP, and the two that always are); the runtime asks for all.
    pub fn parked(&self) -> usize {
        let files = fs::read_dir(format!("/proc/{}/fdinfo", self.process.pid())).expect("alive").flatten();
        let texts: Vec<_> = files.filter_map(|file| fs::read_to_string(file.path()).ok()).collect();
        let socket = |line: &str| {
            let (socket, events) = line.strip_prefix("tfd:")?.split_once("events:")?;
            events.trim().starts_with("40002019 ").then(|| socket.trim().to_owned())
        };
        // A set with two file descriptors is listed twice.
        texts.iter().flat_map(|text| text.lines()).filter_map(socket).collect::<BTreeSet<_>>().len()
    }

    /// A connection to the data address.
    pub fn client(&self) -> Client {
        Client::connect(self.listen)
    }

    /// Calls the hook on the probe port; the answer is still to be read.
    pub fn hook(&self, target: &str, token: Option<&str>) -> Client {
        let mut client = Client::connect(self.probe);
        let token = token.map(|token| format!("Lameduck-Token: {token}"));
        client.request("GET", target, &token.iter().map(String::as_str).collect::<Vec<_>>());
        client
    }

    /// `/readyz`: the status and the reasons.
    pub fn ready(&self) -> Answer {
        Client::ask(self.probe, "/readyz")
    }

    /// `lameduck drain`, `resume` or `status` as a process of its own.
    pub fn command(&self, args: &[&str]) -> Process {
        Process::start("lameduck", lameduck().args(args).arg("--control").arg(&self.control))
    }

    /// The same, to its end.
    pub fn command_output(&self, args: &[&str]) -> Output {
        lameduck().args(args).arg("--control").arg(&self.control).output().expect("lameduck starts")
    }

    /// Waits for the end, which must be a clean drain's: the verdict `clean` and exit code 0.
    pub fn expect_clean_exit(&mut self) {
        let code = self.process.wait_exit();
        assert_eq!(self.wait_log("drained")["verdict"], "clean");
        assert_eq!(code, 0);
    }
}

impl Drop for Lameduck {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
        // Killed, `run` would leave its app behind, which leads a process group.
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
        // `run` without --listen takes the inherited PORT.
        let inherits = flag == "--listen" && set.iter().any(|name| name == "PORT");
        inherits || args.contains(&flag) || set.iter().any(|name| *name == *variable)
    };
    let mut ports = Vec::new();
    lameduck.args(mode).arg("--control").arg(control);
    let defaults = defaults.iter().filter(|default| !is_set(default[0])).flatten();
    lameduck.args(defaults.chain(args).map(|arg| Port::reserve_in(arg, &mut ports)));
    if !command.is_empty() {
        lameduck.arg("--").args(command);
    }
    (Process::start("lameduck", &mut lameduck), ports)
}

/// The built program, with no settings from the environment of whoever runs the tests.
pub fn lameduck() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lameduck"));
    command.env_remove("PORT");
    let ours = |name: &OsStr| name.to_string_lossy().starts_with("LAMEDUCK_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| ours(name)) {
        command.env_remove(name);
    }
    command
}

/// The line as a log entry, if that is its message.
fn message(line: &str, text: &str) -> Option<Value> {
    serde_json::from_str::<Value>(line).ok().filter(|entry| entry["message"] == text)
}

/// A directory of its own.
pub fn temporary_directory() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("lameduck-test-{}-{number}", std::process::id()));
    fs::create_dir_all(&dir).expect("a temporary directory");
    dir
}
