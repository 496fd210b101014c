//! `lameduck drain`, `resume` and `status`: their output and exit codes, and settings from the environment.

use crate::common;

use std::process::Output;

use common::process::{Lameduck, Node, Process, TOKEN, lameduck};
use common::wait_for;
use serde_json::Value;

/// A proxy with one request waiting in the app.
fn busy(args: &[&str]) -> (Node, Lameduck, common::http::Client) {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, args);
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);
    (app, proxy, client)
}

/// A command's exit code and complete output.
fn end(mut client: Process) -> (i32, String) {
    (client.wait_exit(), client.output())
}

fn told(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn drain_exits_with_0_when_clean() {
    let (app, proxy, _client) = busy(&[]);
    let mut drain = proxy.command(&["drain"]);
    proxy.wait_phase("draining");
    assert_eq!(drain.exited(), None, "it waits");
    app.release();
    assert_eq!(end(drain), (0, "drained: clean".to_owned()));
    let again = proxy.command_output(&["drain"]);
    assert_eq!(told(&again), (Some(0), "drained: clean\n".to_owned()));
}

#[test]
fn drain_exits_with_3_when_something_was_cut() {
    let (_app, proxy, mut client) = busy(&[]);
    let drain = proxy.command(&["drain", "--timeout", "1500ms"]);
    assert_eq!(client.answer().head.status, 504);
    assert_eq!(end(drain), (3, "drained: 1 unanswered".to_owned()));
}

#[test]
fn drain_exits_with_1_when_the_proxy_was_resumed() {
    let (_app, proxy, _client) = busy(&[]);
    let drain = proxy.command(&["drain"]);
    proxy.wait_phase("draining");
    assert_eq!(told(&proxy.command_output(&["resume"])), (Some(0), "resumed\n".to_owned()));
    let (code, output) = end(drain);
    assert!(code == 1 && output.contains("resumed meanwhile"), "{code} {output}");
}

#[test]
fn drain_that_meets_a_restart_of_the_app_is_a_drain() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--sidecar", "ordinary"]);
    let mut hook = proxy.hook("/drain?hook=app", Some(TOKEN));
    assert!(hook.answer().text().contains("app-may-stop"));
    let (code, output) = told(&proxy.command_output(&["drain"]));
    assert_eq!((code, output.as_str()), (Some(0), "drained: clean\n"));
}

#[test]
fn drain_without_waiting_returns_at_once() {
    let (_app, proxy, _client) = busy(&[]);
    assert_eq!(told(&proxy.command_output(&["drain", "--no-wait"])), (Some(0), String::new()));
    proxy.wait_status("a drain", |status| status["trigger"] == "operator");
}

#[test]
fn status_shows_what_runs_and_by_its_code_whether_it_is_ready() {
    let (_app, proxy, _client) = busy(&[]);
    wait_for("ready", || proxy.command_output(&["status", "--ready"]).status.success().then_some(()));
    let (code, table) = told(&proxy.command_output(&["status"]));
    assert_eq!(code, Some(0));
    for part in ["phase        serving\n", "ready        yes\n", "(1 running, 0 held)", "GET /wait\n"] {
        assert!(table.contains(part), "{table}");
    }
    let (_, json) = told(&proxy.command_output(&["status", "--json"]));
    let json: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((&json["phase"], &json["ledger"][0]["path"]), (&"serving".into(), &"/wait".into()));

    proxy.command_output(&["drain", "--no-wait"]);
    let output = proxy.command_output(&["status", "--ready"]);
    assert_eq!((told(&output), output.stderr), ((Some(1), String::new()), Vec::new()));
    let (code, table) = told(&proxy.command_output(&["status"]));
    assert!(code == Some(0) && table.contains("an operator began a drain"), "{table}");
}

#[test]
fn status_watches_until_the_proxy_is_gone() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let watch = proxy.command(&["status", "--watch"]);
    let seen = |count| move |output: String| (output.matches("phase ").count() >= count).then_some(());
    wait_for("two looks", || seen(2)(watch.output()));
    proxy.terminate();
    proxy.expect_clean_exit();
    let (code, output) = end(watch);
    assert!(code == 1 && output.contains("no lameduck answers on"), "{output}");
    assert!(!output.contains('\x1b'), "escapes outside a terminal");
}

#[test]
fn without_a_proxy_every_client_fails_and_says_why() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    proxy.terminate();
    proxy.expect_clean_exit();
    for args in [["drain"], ["resume"], ["status"]] {
        let output = proxy.command_output(&args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let why = String::from_utf8_lossy(&output.stderr);
        assert!(why.contains("is it running? give its --control path"), "{why}");
    }
}

#[test]
fn every_setting_may_come_from_the_environment_and_a_flag_wins() {
    let app = Node::held();
    let upstream = app.addr.to_string();
    let mut program = lameduck();
    for (name, value) in [
        ("LAMEDUCK_UPSTREAM", upstream.as_str()),
        ("LAMEDUCK_LISTEN", "127.0.0.1:0"),
        ("LAMEDUCK_PROBE_LISTEN", "127.0.0.1:0"),
        ("LAMEDUCK_TOKEN", "from-the-environment"),
        ("LAMEDUCK_LAME_DUCK", "0s"),
        ("LAMEDUCK_GRACE", "77s"),
        ("LAMEDUCK_RESERVE", "7s"),
        ("LAMEDUCK_LOG_FORMAT", "json"),
        ("LAMEDUCK_SIDECAR", "ordinary"),
    ] {
        program.env(name, value);
    }
    let proxy = Lameduck::start_as(program, &["proxy"], &["--reserve", "17s"], &[]);
    assert_eq!(proxy.hook("/drain", Some(TOKEN)).answer().head.status, 403);
    assert_eq!(proxy.hook("/drain?hook=sidecar", Some("from-the-environment")).answer().head.status, 200);
    let deadline = proxy.wait_log("drain began")["deadline_s"].as_f64().expect("seconds");
    assert!((59.5..=60.0).contains(&deadline), "{deadline}");
}

#[test]
fn a_wrong_setting_from_the_environment_is_reported_by_its_flag() {
    let mut program = lameduck();
    let output =
        program.args(["proxy", "--upstream", ":1"]).env("LAMEDUCK_GRACE", "5").output().expect("started");
    let why = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(why.contains("--grace") && why.contains("'5' has no unit"), "{why}");
}
