//! `lameduck swap`: a command replaces the app while its clients wait.

use crate::common;

use common::MOMENT;
use common::http::Client;
use common::process::{Lameduck, Node, Process};
use rustix::process::Signal;

/// `lameduck swap -- sh -c SCRIPT`.
fn swap(proxy: &Lameduck, options: &[&str], script: &str) -> Process {
    let mut args = vec!["swap", "--control", proxy.control.to_str().expect("UTF-8")];
    args.extend(options);
    args.extend(["--", "sh", "-c", script]);
    Process::start("swap", common::process::lameduck().args(args))
}

/// A command that ends when the old app is gone and before the new one is up, as `docker compose up -d` may.
fn end(pid: u32) -> String {
    // The port closes when the last thread exits, which may be later than the main thread.
    format!(
        "kill -9 {pid}; until grep -q '^State:.Z' /proc/{pid}/status && [ $(ls /proc/{pid}/task | wc -l) = 1 ]; do :; done"
    )
}

#[test]
fn the_app_is_replaced_while_new_requests_wait() {
    let app = Node::held();
    let (port, pid) = (app.addr.port(), app.process.pid());
    let proxy = Lameduck::proxy(app.addr, &[]);
    let (mut running, mut held) = (proxy.client(), proxy.client());
    running.get("/wait");
    app.wait_active(1);

    // The command ends when the old app is gone and before the new one is up, as `docker compose up -d` does.
    let gone = format!("{}; echo replaced", end(pid));
    let mut swap = swap(&proxy, &[], &gone);
    swap.wait_line("its progress", |line| {
        line.contains("waiting for running requests: 1 running").then_some(())
    });
    // The first status may be from before the hold.
    proxy.wait_status("a hold", |status| !status["hold"].is_null());
    held.get("/");
    proxy.wait_status("held", |status| status["held"] == 1);
    assert!(!swap.output().lines().any(|line| line == "replaced"), "the command ran while a request ran");
    app.release();
    assert_eq!(running.answer().text(), "released\n");
    swap.wait_line("the command's output", |line| (line == "replaced").then_some(()));
    let app = Node::held_at(port);
    assert_eq!(held.answer().text(), Client::ask(app.addr, "/").text());
    assert_eq!(swap.wait_exit(), 0, "{}", swap.output());
    assert!(swap.output().contains("swapped in "), "{}", swap.output());
}

#[test]
fn a_failed_command_or_a_missing_app_releases_the_requests() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let (mut running, mut held) = (proxy.client(), proxy.client());
    running.get("/wait");
    app.wait_active(1);
    let mut failing = swap(&proxy, &[], "exit 7");
    proxy.wait_status("a hold", |status| !status["hold"].is_null());
    held.get("/");
    proxy.wait_status("held", |status| status["held"] == 1);
    app.release();
    running.answer();
    assert_eq!(held.answer().head.status, 200);
    assert_eq!(failing.wait_exit(), 1);
    assert!(failing.output().contains("failed (exit status: 7)"), "{}", failing.output());

    let pid = app.process.pid();
    let mut late = swap(&proxy, &["--timeout", "300ms"], &end(pid));
    assert_eq!(late.wait_exit(), 1);
    assert!(late.output().contains("did not answer within 300ms (--timeout)"), "{}", late.output());
    assert!(proxy.status().expect("a status")["hold"].is_null());
}

#[test]
fn a_drain_that_begins_meanwhile_goes_on() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut running = proxy.client();
    running.get("/wait");
    app.wait_active(1);
    let mut swap = swap(&proxy, &[], "true");
    proxy.wait_status("a hold", |status| !status["hold"].is_null());
    proxy.terminate();
    assert_eq!(swap.wait_exit(), 1, "{}", swap.output());
    assert_eq!(proxy.wait_phase("draining")["in_flight"], 1);
    app.release();
    assert_eq!(running.answer().text(), "released\n");
    proxy.expect_clean_exit();
}

#[test]
fn ctrl_c_releases_the_requests() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let (mut running, mut held) = (proxy.client(), proxy.client());
    running.get("/wait");
    app.wait_active(1);
    let mut swap = swap(&proxy, &[], "true");
    proxy.wait_status("a hold", |status| !status["hold"].is_null());
    held.get("/");
    proxy.wait_status("held", |status| status["held"] == 1);
    assert!(held.is_quiet_for(MOMENT));
    swap.signal(Signal::INT);
    assert_eq!(swap.wait_exit(), 130);
    assert_eq!(held.answer().head.status, 200);
    app.release();
    running.answer();
}
