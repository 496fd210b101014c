//! An app that outlives its SIGTERM is reported in the log, with the usual cause.

use crate::common;

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use common::MOMENT;
use common::process::{Lameduck, Node, Process, TOKEN, temporary_directory};

const LIVES_ON: &str = "the app still takes connections after its SIGTERM: as PID 1";
const KILLED: &str = "the app outlived its SIGTERM until the grace was used up: as PID 1";

/// A proxy that has drained for a pod's deletion: both hooks have returned.
fn drained(app: &Node, args: &[&str]) -> Lameduck {
    let proxy = Lameduck::proxy(app.addr, &[&["--sidecar", "native"], args].concat());
    let mut hooks = ["app", "sidecar"].map(|whose| proxy.hook(&format!("/drain?hook={whose}"), Some(TOKEN)));
    for hook in &mut hooks {
        assert!(hook.answer().text().contains("clean"));
    }
    proxy
}

fn warns(proxy: &Lameduck, text: &str) -> bool {
    proxy.process.output().lines().any(|line| line.contains("WARN") && line.contains(text))
}

#[test]
fn an_app_that_ignores_its_sigterm_is_reported() {
    let app = Node::held();
    let mut proxy = drained(&app, &["--grace", "3s", "--reserve", "1s"]);
    proxy.process.wait_line("the warning", |line| line.contains(LIVES_ON).then_some(()));
    // The kubelet kills the app when the grace period is over, and then sends SIGTERM to the sidecar.
    std::thread::sleep(Duration::from_secs(3));
    proxy.terminate();
    assert_eq!(proxy.process.wait_exit(), 0);
    assert!(warns(&proxy, KILLED), "{}", proxy.process.output());
}

#[test]
fn an_app_that_exits_in_time_is_not_reported() {
    let mut app = Node::held();
    let mut proxy = drained(&app, &["--reserve", "400ms"]);
    app.process.kill();
    std::thread::sleep(MOMENT * 2);
    proxy.terminate();
    assert_eq!(proxy.process.wait_exit(), 0);
    assert!(!warns(&proxy, LIVES_ON) && !warns(&proxy, KILLED), "{}", proxy.process.output());
}

/// The kubelet sends SIGTERM only after the app's own hook has ended, however long that takes.
#[test]
fn the_apps_own_exec_is_not_its_sigterm() {
    let app = Node::held();
    let shared = temporary_directory();
    let (dir, go) = (shared.display().to_string(), shared.join("go"));
    let args = ["--sidecar", "native", "--reserve", "200ms", "--share-dir", &dir];
    let proxy = Lameduck::proxy(app.addr, &[&args[..], &["--control-listen", "127.0.0.1:0"]].concat());
    let listening = proxy.wait_log("listening");
    let control = format!("--control={}", listening["control_tcp"].as_str().expect("by TCP"));
    let own = format!("echo begun; while [ ! -e {} ]; do sleep 0.05; done", go.display());
    let mut program = Command::new(shared.join("lameduck"));
    program.args(["drain", "--app-hook", &control, "--", "sh", "-c", &own]);
    let mut hook = Process::start("hook", &mut program);
    proxy.hook("/drain?hook=sidecar", Some(TOKEN)).answer();
    hook.wait_line("the own hook", |line| (line == "begun").then_some(()));
    std::thread::sleep(MOMENT * 3);
    assert!(!warns(&proxy, LIVES_ON), "the app has no SIGTERM yet: {}", proxy.process.output());
    fs::write(go, "").expect("ours");
    assert_eq!(hook.wait_exit(), 0);
    proxy.process.wait_line("the warning", |line| line.contains(LIVES_ON).then_some(()));
    let _ = fs::remove_dir_all(shared);
}

#[test]
fn an_app_that_got_no_sigterm_is_not_reported() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--sidecar", "native", "--reserve", "400ms"]);
    assert!(proxy.command_output(&["drain"]).status.success());
    std::thread::sleep(MOMENT * 2);
    proxy.terminate();
    proxy.process.wait_exit();
    assert!(!warns(&proxy, LIVES_ON) && !warns(&proxy, KILLED), "{}", proxy.process.output());
}

/// The restarted app accepts connections before it is ready.
#[test]
fn an_app_that_restarts_slowly_has_not_outlived_its_sigterm() {
    let mut app = Node::held();
    let args = ["--sidecar", "native", "--reserve", "3s", "--ready-check", "/events-yet-to-come"];
    let proxy = Lameduck::proxy(app.addr, &args);
    let hook = proxy.hook("/drain?hook=app", Some(TOKEN)).answer();
    assert!(hook.text().contains("app-may-stop"));
    let port = app.addr.port();
    app.process.kill();
    let _again = Node::slow_at(port);
    // lameduck checks the port half the reserve after the hook returned.
    std::thread::sleep(Duration::from_millis(2000));
    assert!(!warns(&proxy, LIVES_ON), "{}", proxy.process.output());
    assert!(proxy.ready().text().contains("requests are held"), "{}", proxy.ready().text());
}

/// A hold that a drain ends does not start a new round, so the time of the first hook is kept.
#[test]
fn a_hold_before_the_drain_keeps_the_time_of_the_first_hook() {
    let app = Node::held();
    let args = ["--sidecar", "native", "--grace", "4s", "--reserve", "2s"];
    let mut proxy = Lameduck::proxy(app.addr, &args);
    assert!(proxy.command_output(&["hold"]).status.success());
    let began = Instant::now();
    let mut hooks = ["app", "sidecar"].map(|whose| proxy.hook(&format!("/drain?hook={whose}"), Some(TOKEN)));
    for hook in &mut hooks {
        assert!(hook.answer().text().contains("clean"));
    }
    std::thread::sleep(Duration::from_secs(4).saturating_sub(began.elapsed()));
    proxy.terminate();
    assert_eq!(proxy.process.wait_exit(), 0);
    assert!(warns(&proxy, KILLED), "{}", proxy.process.output());
}
