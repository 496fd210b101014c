//! Work of the app that is no request counts as in flight by a lease: a drain waits for it, accepts none that is new, and
//! cuts it at the deadline.

use std::process::Command;

use crate::common;

use common::http::Client;
use common::process::{Lameduck, Node, Process, lameduck};
use rustix::process::Signal;
use serde_json::Value;

/// Status and body of a POST to the control socket.
fn post(proxy: &Lameduck, target: &str) -> (u16, Value) {
    let mut client = Client::unix(&proxy.control).expect("the control socket");
    client.send(format!("POST {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
    let answer = client.answer();
    (answer.head.status, serde_json::from_slice(&answer.body).unwrap_or_default())
}

/// Takes a lease and returns its id.
fn take(proxy: &Lameduck, ttl: &str) -> String {
    let (status, lease) = post(proxy, &format!("/leases?name=orders/3&ttl={ttl}"));
    assert_eq!(status, 201, "{lease}");
    lease["id"].as_str().expect("an id").to_owned()
}

/// `lameduck lease -- sh -c SCRIPT`.
fn lease(proxy: &Lameduck, script: &str) -> Process {
    let mut command: Command = lameduck();
    command.env("LAMEDUCK_CONTROL", &proxy.control).args(["lease", "--name", "import", "sh", "-c", script]);
    Process::start("lameduck lease", &mut command)
}

#[test]
fn a_drain_waits_for_a_lease_and_accepts_no_other() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--lame-duck", "700ms"]);
    let (first, shown) = (take(&proxy, "30s"), proxy.command_output(&["status"]).stdout);
    let shown = String::from_utf8(shown).expect("text");
    assert!(shown.contains("1 running") && shown.contains("LEASE orders/3"), "{shown}");
    assert_eq!(proxy.metric("lameduck_leases"), 1.0);
    proxy.terminate();
    proxy.wait_phase("lame-duck");
    let second = take(&proxy, "30s");
    proxy.wait_phase("draining");
    assert_eq!(post(&proxy, "/leases?name=x").0, 409);
    proxy.wait_in_flight(2);
    assert_eq!(post(&proxy, &format!("/leases/renew?id={first}&ttl=1m")).1["ttl_ms"], 60_000);
    for (id, status) in [(&first, 200), (&first, 404), (&second, 200)] {
        assert_eq!(post(&proxy, &format!("/leases/return?id={id}")).0, status);
    }
    proxy.expect_clean_exit();
}

#[test]
fn a_lease_that_is_not_renewed_ends_by_itself() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let id = take(&proxy, "100ms");
    let over = proxy.wait_log("a lease was neither renewed nor given back in time");
    assert_eq!(over["name"], "orders/3");
    assert_eq!(post(&proxy, &format!("/leases/renew?id={id}")).0, 404);
    take(&proxy, "1s");
    proxy.terminate();
    proxy.wait_phase("draining");
    proxy.wait_in_flight(1);
    proxy.expect_clean_exit();
}

#[test]
fn a_lease_is_cut_at_the_deadline_and_the_verdict_says_so() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "4s", "--reserve", "2s"]);
    take(&proxy, "1h");
    proxy.terminate();
    proxy.wait_log("a lease was still out at the deadline");
    assert_eq!(proxy.wait_log("drained")["verdict"], "1 cut");
    proxy.process.wait_exit();
}

#[test]
fn what_is_no_lease_is_refused() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let long = "x".repeat(129);
    for target in [
        "/leases",
        "/leases?name=",
        "/leases?name=a%20b",
        &format!("/leases?name={long}"),
        "/leases?name=a&ttl=0s",
        "/leases?name=a&ttl=soon",
        "/leases?title=a",
    ] {
        assert_eq!(post(&proxy, target).0, 400, "{target}");
    }
    for target in ["/leases/renew?id=zz", "/leases/renew?id=1", "/leases/return"] {
        assert_eq!(post(&proxy, target).0, 404, "{target}");
    }
    proxy.wait_in_flight(0);
}

#[test]
fn a_command_is_waited_for_and_its_exit_code_is_kept() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut command = lease(&proxy, "trap 'exit 7' TERM; echo runs; while :; do sleep 0.1; done");
    command.wait_line("its start", |line| line.contains("runs").then_some(()));
    proxy.wait_status("its lease", |status| status["in_flight"] == 1);
    proxy.terminate();
    proxy.wait_phase("draining");
    assert_eq!(command.exited(), None);
    // SIGTERM is passed on, as by an init.
    command.signal(Signal::TERM);
    assert_eq!(command.wait_exit(), 7);
    proxy.expect_clean_exit();
    let mut late = lease(&proxy, "true");
    assert_eq!(late.wait_exit(), 1, "there is no proxy any more");
}

#[test]
fn a_command_is_not_run_once_a_drain_accepts_no_new_work() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    take(&proxy, "1h");
    proxy.terminate();
    proxy.wait_phase("draining");
    let mut late = lease(&proxy, "echo it runs");
    assert_eq!(late.wait_exit(), 75);
    let said = late.output();
    assert!(said.contains("don't begin new work") && !said.contains("it runs"), "{said}");
    let mut missing = lameduck();
    let missing = missing.env("LAMEDUCK_CONTROL", &proxy.control).args(["lease", "/no/such/program"]);
    assert_eq!(missing.status().expect("lameduck starts").code(), Some(75));
}
