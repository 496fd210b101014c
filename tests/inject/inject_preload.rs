//! The preload: Node as PID 1 exits at SIGTERM like any other process, and an app's own handler keeps precedence.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use lameduck::inject::share;
use rustix::process::{Pid, Signal, kill_process};

const LIMIT: Duration = Duration::from_secs(20);
/// Long enough to see that something does *not* happen.
const MOMENT: Duration = Duration::from_millis(300);
/// Keeps the process busy as a server would.
const SERVE: &str = "setInterval(() => {}, 1000); console.log('ready');";

/// A directory with the preload in it.
fn preload_dir(test: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("lameduck-preload-{}-{test}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    share::write(&dir).unwrap();
    dir
}

/// Node as PID 1 of its own namespace.
struct Init {
    unshare: Child,
    lines: Receiver<String>,
}

impl Init {
    fn start(script: &str, preload: Option<&str>) -> Self {
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--pid", "--fork", "--mount-proc", "--kill-child", "node", "-e", script]);
        command.env_remove("NODE_OPTIONS").stdout(Stdio::piped());
        if let Some(test) = preload {
            command.env("NODE_OPTIONS", format!("--require {}/preload.js", preload_dir(test).display()));
        }
        let mut unshare = command.spawn().expect("unshare (util-linux)");
        let stdout = BufReader::new(unshare.stdout.take().unwrap());
        let (send, lines) = channel();
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        let init = Self { unshare, lines };
        assert_eq!(init.line(), "ready");
        init
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(LIMIT).expect("a line in time")
    }

    /// SIGTERM from outside, as the kubelet sends it.
    fn terminate(&self) {
        let unshare = self.unshare.id();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
        let node = Pid::from_raw(children.trim().parse().expect("one child")).unwrap();
        kill_process(node, Signal::TERM).unwrap();
    }

    /// Its exit code, if it ends within this time.
    fn ends(&mut self, within: Duration) -> Option<i32> {
        let end = Instant::now() + within;
        loop {
            if let Some(status) = self.unshare.try_wait().unwrap() {
                return Some(status.code().unwrap_or(-1));
            }
            if Instant::now() > end {
                return None;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

#[test]
fn a_plain_node_app_ends_at_sigterm_as_pid_1() {
    let mut deaf = Init::start(SERVE, None);
    deaf.terminate();
    assert_eq!(
        deaf.ends(MOMENT),
        None,
        "without the preload it must ignore SIGTERM, otherwise this test shows nothing"
    );
    let mut app = Init::start(SERVE, Some("plain"));
    app.terminate();
    assert_eq!(app.ends(LIMIT), Some(128 + 15));
}

#[test]
fn an_apps_own_handler_decides() {
    for (n, register) in ["on", "once"].iter().enumerate() {
        let own =
            format!("process.{register}('SIGTERM', () => setTimeout(() => process.exit(7), 100)); {SERVE}");
        let mut app = Init::start(&own, Some(&format!("own{n}")));
        app.terminate();
        assert_eq!(app.ends(LIMIT), Some(7), "{register}");
    }
    let mut app =
        Init::start(&format!("process.on('SIGTERM', () => console.log('no')); {SERVE}"), Some("no"));
    for _ in 0..2 {
        app.terminate();
        assert_eq!(app.line(), "no");
        assert_eq!(app.ends(MOMENT), None);
    }
}

/// As in the signal-exit package: the handler that is alone cleans up and sends the same signal again.
#[test]
fn a_handler_that_counts_the_others_finds_itself_alone() {
    let counts = format!(
        "process.on('SIGTERM', function own() {{
           if (process.listeners('SIGTERM').length !== 1) return;
           process.removeListener('SIGTERM', own);
           console.log('cleaned');
           process.kill(process.pid, 'SIGTERM');
         }}); {SERVE}"
    );
    let mut app = Init::start(&counts, Some("counts"));
    app.terminate();
    assert_eq!(app.line(), "cleaned");
    assert_eq!(app.ends(LIMIT), Some(128 + 15));
}

/// The app's children and worker threads inherit NODE_OPTIONS.
#[test]
fn it_does_nothing_in_other_processes_and_threads() {
    let inner = "console.log(process.listenerCount('SIGTERM'), /Reflect/.test(process.kill) ? 1 : 0)";
    let option = format!("--require {}/preload.js", preload_dir("inert").display());
    let run = |script: &str, preload: bool| {
        let mut command = Command::new("node");
        command.args(["-e", script]).env_remove("NODE_OPTIONS");
        if preload {
            command.env("NODE_OPTIONS", &option);
        }
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    assert_eq!(run(inner, true), run(inner, false));
    let worker = format!("{SERVE} new (require('worker_threads').Worker)(`{inner}`, {{ eval: true }})");
    let mut app = Init::start(&worker, Some("worker"));
    assert_eq!(app.line(), "0 0");
    app.terminate();
    assert_eq!(app.ends(LIMIT), Some(128 + 15));
}

#[test]
fn an_app_whose_work_is_done_still_ends_by_itself() {
    let mut app = Init::start("console.log('ready')", Some("done"));
    assert_eq!(app.ends(LIMIT), Some(0));
}

#[test]
fn the_sidecar_writes_it_for_every_user_before_it_is_live() {
    let dir = std::env::temp_dir().join(format!("lameduck-preload-{}-flag", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let mut proxy = Command::new(env!("CARGO_BIN_EXE_lameduck"))
        .args([
            "proxy",
            "--listen",
            "127.0.0.1:0",
            "--probe-listen",
            "127.0.0.1:0",
            "--upstream",
            "127.0.0.1:9",
        ])
        .args(["--control-listen", "off", "--log-format", "json"])
        .arg("--control")
        .arg(dir.join("control.sock"))
        .arg("--share-dir")
        .arg(&dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(proxy.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let file = dir.join("preload.js");
    let written = fs::metadata(&file).map(|metadata| metadata.permissions().mode() & 0o777);
    let _ = proxy.kill();
    let _ = proxy.wait();
    assert!(line.contains("listening"), "{line}");
    assert_eq!(written.unwrap(), 0o644);
    let mut text = String::new();
    fs::File::open(&file).unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("process.pid === 1"));
    let nowhere = ["proxy", "--upstream", "127.0.0.1:9", "--share-dir", "/nowhere"];
    let failed = Command::new(env!("CARGO_BIN_EXE_lameduck")).args(nowhere).output().unwrap();
    assert_eq!(failed.status.code(), Some(1));
}
