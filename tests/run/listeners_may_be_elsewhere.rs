//! If the probe port or the control socket is unavailable, `run` still starts its app: it uses another one and logs
//! that once, and `lameduck status` finds it.

use std::fs;
use std::net::TcpListener;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::common::http::Client;
use crate::common::process::{Process, temporary_directory};
use crate::common::users::ForAll;
use crate::common::wait_for;
use rustix::process::Signal;
use serde_json::Value;

const APP: &str = "require('http').createServer((q, s) => s.end('hi')).listen(process.env.PORT)";

/// lameduck as a user without access to the default paths that proxies on this machine may use.
fn lameduck(runtime_dir: &Path, program: &ForAll) -> Command {
    let root = rustix::process::geteuid().is_root();
    let mut command = program.command(root.then(|| 1_500_000 + std::process::id()));
    command.env("XDG_RUNTIME_DIR", runtime_dir);
    command
}

/// A `lameduck run` that is stopped on drop together with its app.
struct Run(Process);

impl Deref for Run {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.0
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.signal(Signal::TERM);
        wait_for("the end of run", || self.0.exited());
    }
}

fn run(runtime_dir: &Path, program: &ForAll, args: &[&str]) -> Run {
    let mut program = lameduck(runtime_dir, program);
    program.args(["run", "--listen", "127.0.0.1:0", "--log-format", "json"]).current_dir("/");
    Run(Process::start("lameduck", program.args(args).args(["--", "node", "-e", APP])))
}

fn listening(run: &Process) -> Value {
    run.wait_line("the addresses", |line| {
        serde_json::from_str::<Value>(line).ok().filter(|entry| entry["message"] == "listening")
    })
}

fn serves(run: &Process) -> bool {
    let addr = listening(run)["listen"].as_str().and_then(|addr| addr.parse().ok());
    Client::ask(addr.expect("an address"), "/").text() == "hi"
}

fn warnings(run: &Process, text: &str) -> usize {
    run.output().lines().filter(|line| line.contains("WARN") && line.contains(text)).count()
}

fn status(runtime_dir: &Path, program: &ForAll, args: &[&str]) -> Output {
    lameduck(runtime_dir, program).arg("status").args(args).output().expect("lameduck starts")
}

fn open_to_all() -> std::path::PathBuf {
    let dir = temporary_directory();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o1777)).expect("ours");
    dir
}

#[test]
fn a_second_run_on_a_host_takes_other_ports_and_another_socket() {
    let (dir, program) = (open_to_all(), ForAll::lameduck());
    let taken = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
    let [probe, control] = taken.each_ref().map(|taken| taken.local_addr().expect("its address").to_string());
    let first = run(&dir, &program, &["--probe-listen", "127.0.0.1:0"]);
    let at = listening(&first)["control"].as_str().expect("a socket").to_owned();
    assert!(serves(&first) && warnings(&first, "") == 0, "{}", first.output());

    let second = run(&dir, &program, &["--probe-listen", &probe, "--control-listen", &control]);
    let addrs = listening(&second);
    assert!(serves(&second), "{}", second.output());
    for (name, flag) in [("probe", "--probe-listen"), ("control_tcp", "--control-listen")] {
        let addr = addrs[name].as_str().expect("an address");
        assert!(addr != probe && addr != control, "{addrs}");
        assert_eq!(warnings(&second, flag), 1, "{}", second.output());
        Client::connect(addr.parse().expect("an address"));
    }
    let other = at.replace("control.sock", "control-2.sock");
    assert_eq!(addrs["control"], other);
    assert_eq!(warnings(&second, "another lameduck uses this control socket"), 1);

    let shown = status(&dir, &program, &["--json"]);
    let told = String::from_utf8_lossy(&shown.stderr);
    assert!(
        shown.status.success() && told.contains(&format!("another one is running: --control {other}")),
        "{told}"
    );
    drop(first);
    let shown = status(&dir, &program, &[]);
    let table = String::from_utf8_lossy(&shown.stdout);
    let probe = addrs["probe"].as_str().expect("an address");
    assert!(table.contains(&format!("probe        {probe}")), "{table}{shown:?}");
    assert_eq!(Client::ask(probe.parse().expect("an address"), "/livez").head.status, 200);
    let _ = fs::remove_dir_all(dir);
}

/// For example on a read-only file system.
#[test]
fn a_control_socket_that_cannot_be_created_is_replaced_by_another() {
    let (dir, program) = (open_to_all(), ForAll::lameduck());
    let run =
        run(&dir, &program, &["--probe-listen", "127.0.0.1:0", "--control", "/proc/lameduck/control.sock"]);
    assert!(serves(&run), "{}", run.output());
    assert_eq!(warnings(&run, "using another control socket: --control /proc/lameduck/control.sock"), 1);
    assert!(status(&dir, &program, &["--json"]).status.success());
    let _ = fs::remove_dir_all(dir);
}

/// Other programs were configured with the addresses of a proxy, so it must not choose different ones.
#[test]
fn a_proxy_listens_at_the_given_addresses_or_does_not_start() {
    let (dir, program) = (open_to_all(), ForAll::lameduck());
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let probe = taken.local_addr().expect("its address").to_string();
    for args in [["--probe-listen", &probe], ["--control", "/proc/lameduck/control.sock"]] {
        let mut program = lameduck(&dir, &program);
        program.args(["proxy", "--listen", "127.0.0.1:0", "--upstream", ":1"]);
        let mut proxy = Process::start("lameduck", program.args(args));
        assert_eq!(proxy.wait_exit(), 1);
        assert!(proxy.output().contains(args[0]), "{}", proxy.output());
    }
    let _ = fs::remove_dir_all(dir);
}
