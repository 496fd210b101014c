//! gRPC calls are forwarded completely in both directions, and those that the proxy ends get a gRPC status.

use crate::common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::grpc::{App, Call};
use common::http::Client;
use common::port::Port;
use common::process::{Lameduck, Node};
use common::wait_for;
use serde_json::Value;

/// Sets the deadline to two seconds after SIGTERM.
const SOON: [&str; 4] = ["--grace", "3s", "--reserve", "1s"];
/// With one thread, all calls share one connection to the app while it works.
const ONE: [&str; 2] = ["--threads", "1"];

fn status(fields: &Value) -> &str {
    fields["grpc-status"].as_str().unwrap_or_else(|| panic!("no grpc-status in {fields}"))
}

#[test]
fn a_unary_call_passes_with_its_fields_and_trailers() {
    let app = App::start();
    let proxy = Lameduck::proxy(app.addr, &["--access-log"]);
    let call = Call::begin(proxy.listen, "/t.T/Unary", &["hello"]);
    let head = call.json("head");
    assert_eq!((&head[":status"], &head["content-type"]), (&200.into(), &"application/grpc+proto".into()));
    let seen: Value = serde_json::from_str(head["x-seen"].as_str().expect("text")).expect("JSON");
    for (name, value) in [
        (":authority", proxy.listen.to_string().as_str()),
        ("te", "trailers"),
        ("grpc-timeout", "1H"),
        ("content-type", "application/grpc"),
        ("x-forwarded-for", "127.0.0.1"),
    ] {
        assert_eq!(seen[name], value, "{name} of {seen}");
    }
    assert_eq!(call.json("data"), "hello");
    let trailers = call.json("trailers");
    assert_eq!((status(&trailers), &trailers["x-last"]), ("0", &"word".into()));
    assert_eq!(call.wait("end"), "0");
    proxy.wait_in_flight(0);
    let line = proxy.process.wait_line("the access line", |line| {
        serde_json::from_str::<Value>(line).ok().filter(|line| line["target"] == "access")
    });
    assert_eq!((&line["path"], &line["ended"]), (&"/t.T/Unary".into(), &"complete".into()));
}

#[test]
fn messages_pass_while_both_sides_are_open_and_the_ledger_names_the_stream() {
    let app = App::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let call = Call::begin(proxy.listen, "/t.T/Watch", &[]);
    assert_eq!(call.json("data"), "first");
    let row = wait_for("the stream", || {
        let rows = Client::unix(&proxy.control)?.try_ask("/ledger", &[])?;
        let rows: Value = serde_json::from_slice(&rows.body).ok()?;
        Some(rows[0].clone()).filter(|row| row["class"] == "grpc-stream")
    });
    assert_eq!(row["path"], "/t.T/Watch");
    let chat = Call::begin(proxy.listen, "/t.T/Chat", &["to and fro"]);
    assert_eq!(chat.json("data"), "to and fro");
    assert_eq!(status(&chat.json("trailers")), "0");
}

#[test]
fn an_app_that_is_down_is_unavailable_once_the_wait_is_over() {
    let nobody = Port::reserve();
    let proxy = Lameduck::proxy(nobody.addr, &["--upstream-wait", "200ms"]);
    let began = Instant::now();
    let answer = Call::begin(proxy.listen, "/t.T/Unary", &["hello"]).json("trailers-only");
    assert_eq!((status(&answer), &answer[":status"]), ("14", &200.into()));
    assert_eq!(answer["content-type"], "application/grpc");
    assert_eq!(answer["grpc-message"], "the app does not accept connections");
    assert!(began.elapsed() >= Duration::from_millis(150), "{:?}", began.elapsed());
}

#[test]
fn a_call_waits_for_an_app_that_is_not_there_yet() {
    let port = Port::reserve();
    let proxy = Lameduck::proxy(port.addr, &[]);
    let call = Call::begin(proxy.listen, "/t.T/Unary", &["hello"]);
    proxy.wait_in_flight(1);
    let _app = App::start_with(port, "100");
    assert_eq!(status(&call.json("trailers")), "0");
}

#[test]
fn a_call_is_held_like_any_request() {
    let app = App::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    assert!(proxy.command_output(&["hold"]).status.success());
    let call = Call::begin(proxy.listen, "/t.T/Unary", &["hello"]);
    proxy.wait_status("a held call", |status| status["held"] == 1);
    assert!(proxy.command_output(&["resume"]).status.success());
    assert_eq!(status(&call.json("trailers")), "0");
}

#[test]
fn an_app_that_speaks_only_http_1_1_is_reported() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let answer = Call::begin(proxy.listen, "/t.T/Unary", &["hello"]).json("trailers-only");
    assert_eq!((status(&answer), &answer["grpc-message"]), ("14", &"the app does not speak HTTP/2".into()));
    let proxy = Lameduck::proxy(app.addr, &["--upstream-protocol", "http1"]);
    let answer = Call::begin(proxy.listen, "/t.T/Unary", &["hello"]).json("trailers-only");
    assert_eq!(status(&answer), "12");
}

#[test]
fn a_drain_tells_by_goaway_and_ends_a_stream_at_the_deadline_with_trailers() {
    let app = App::start();
    let mut proxy = Lameduck::proxy(app.addr, &SOON);
    let call = Call::begin(proxy.listen, "/t.T/Watch", &["one"]);
    assert_eq!(call.json("data"), "first");
    let began = Instant::now();
    proxy.terminate();
    assert_eq!(call.wait("goaway"), "0 2147483647");
    let trailers = call.json("trailers");
    assert_eq!((status(&trailers), &trailers["grpc-message"]), ("14", &"shutting down".into()));
    assert!(began.elapsed() >= Duration::from_millis(1900), "{:?}", began.elapsed());
    assert_eq!(call.wait("end"), "0");
    app.wait("end /t.T/Watch 8");
    proxy.process.wait_exit();
    assert_eq!(proxy.wait_log("drained")["cut"], 1);
}

#[test]
fn a_call_that_the_app_has_not_answered_at_the_deadline_is_unavailable() {
    let app = App::start();
    let mut proxy = Lameduck::proxy(app.addr, &SOON);
    let call = Call::begin(proxy.listen, "/t.T/Hang", &["one"]);
    app.wait("call /t.T/Hang");
    proxy.terminate();
    assert_eq!(status(&call.json("trailers-only")), "14");
    proxy.process.wait_exit();
    assert_eq!(proxy.wait_log("drained")["unanswered"], 1);
}

#[test]
fn a_drain_waits_for_a_call_and_is_clean() {
    let app = App::start();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let call = Call::begin(proxy.listen, "/t.T/Watch", &[]);
    assert_eq!(call.json("data"), "first");
    proxy.terminate();
    call.wait("goaway");
    proxy.wait_phase("draining");
    call.cancel();
    proxy.expect_clean_exit();
}

#[test]
fn a_cancel_and_its_code_reach_the_other_side() {
    let app = App::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    for path in ["/t.T/Watch", "/t.T/Hang"] {
        let call = Call::begin(proxy.listen, path, &[]);
        app.wait(&format!("call {path}"));
        call.cancel();
        app.wait(&format!("end {path} 8"));
    }
    let reset = Call::begin(proxy.listen, "/t.T/Reset", &["x"]);
    assert_eq!(reset.wait("end"), "11", "ENHANCE_YOUR_CALM");
    proxy.wait_in_flight(0);
}

#[test]
fn calls_that_the_app_did_not_process_are_sent_again() {
    for path in ["/t.T/Away", "/t.T/Refuse"] {
        let app = App::start();
        let proxy = Lameduck::proxy(app.addr, &ONE);
        // The first stream of a connection can't be above a GOAWAY's last stream, so it must be the second.
        assert_eq!(Call::begin(proxy.listen, "/t.T/Unary", &["first"]).json("data"), "first");
        let call = Call::begin(proxy.listen, path, &["again"]);
        assert_eq!(call.json("data"), "again");
        assert_eq!(status(&call.json("trailers")), "0");
        assert_eq!(proxy.metric("lameduck_upstream_retries_total"), 1.0, "{path}");
    }
}

#[test]
fn an_app_that_dies_under_a_stream_ends_it_with_trailers() {
    let mut app = App::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let call = Call::begin(proxy.listen, "/t.T/Watch", &[]);
    assert_eq!(call.json("data"), "first");
    app.process.kill();
    assert_eq!(status(&call.json("trailers")), "14");
}

#[test]
fn another_connection_is_opened_when_the_apps_streams_are_used_up() {
    let app = App::start_with(Port::reserve(), "1");
    let proxy = Lameduck::proxy(app.addr, &ONE);
    let calls: Vec<_> = (0..3).map(|_| Call::begin(proxy.listen, "/t.T/Watch", &[])).collect();
    for call in &calls {
        assert_eq!(call.json("data"), "first");
    }
}

#[test]
fn a_switch_waits_for_the_streams_of_the_app_that_it_left() {
    let (blue, green) = (App::start(), App::start());
    let proxy = Lameduck::proxy(blue.addr, &ONE);
    let old = Call::begin(proxy.listen, "/t.T/Watch", &[]);
    assert_eq!(old.json("data"), "first");
    let mut switch = proxy.command(&["switch", &green.addr.to_string()]);
    proxy.wait_status("the switch", |status| status["switched"] == true);
    assert_eq!(Call::begin(proxy.listen, "/t.T/Unary", &["to green"]).json("data"), "to green");
    green.wait("call /t.T/Unary");
    assert!(switch.exited().is_none(), "it returned while a stream ran");
    old.cancel();
    assert_eq!(switch.wait_exit(), 0);
}

#[test]
fn the_protocol_is_one_of_three() {
    let help =
        Command::new(env!("CARGO_BIN_EXE_lameduck")).args(["proxy", "--help"]).output().expect("it runs");
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for word in ["--upstream-protocol", "auto", "http1", "http2"] {
        assert!(help.contains(word), "{word} in {help}");
    }
}
