//! The app is told of a drain at its start, by a POST and by a file, and a drain waits until the app says that it is not
//! busy any more.

use std::fs;

use crate::common;

use common::app::RawApp;
use common::http::Client;
use common::process::{Lameduck, temporary_directory};
use common::{MOMENT, wait_for};

const IDLE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n0";

fn busy(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn proxy(app: &RawApp, args: &[&str]) -> Lameduck {
    Lameduck::proxy(app.addr, args)
}

#[test]
fn a_post_is_repeated_until_the_app_has_heard_it() {
    let (app, hook) = (RawApp::start(), RawApp::start());
    let url = format!("http://{}/stop-fetching?x", hook.addr);
    let mut proxy = proxy(&app, &["--on-drain-url", &url]);
    proxy.terminate();
    for answer in [Some("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"), None, Some(IDLE)] {
        let mut asked = hook.asked();
        assert!(asked.has_line("POST /stop-fetching?x HTTP/1.1"), "{}", asked.head);
        match answer {
            Some(answer) => asked.send(answer),
            None => asked.close(),
        }
    }
    proxy.wait_log("the app was told of the drain");
    proxy.process.wait_exit();
}

#[test]
fn a_drain_waits_until_the_app_is_not_busy() {
    let (app, health) = (RawApp::start(), RawApp::start());
    let url = format!("http://{}/health#/active/requests", health.addr);
    let mut proxy = proxy(&app, &["--busy-url", &url, "--grace", "60s"]);
    proxy.terminate();
    for body in
        [r#"{"active":{"requests":2}}"#, "not JSON", r#"{"active":0}"#, r#"{"active":{"requests":1}}"#]
    {
        let mut asked = health.asked();
        assert!(asked.has_line("GET /health HTTP/1.1"), "{}", asked.head);
        proxy.wait_in_flight(1);
        asked.send(busy(body));
    }
    proxy.wait_log("the app doesn't say whether it is busy, so it counts as busy: the response is not JSON");
    health.asked().close();
    proxy.wait_phase("draining");
    health.asked().send(busy(r#"{"active":{"requests":0}}"#));
    proxy.expect_clean_exit();
}

#[test]
fn an_app_that_stays_busy_is_cut_at_the_deadline() {
    let (app, health) = (RawApp::start(), RawApp::start());
    let url = format!("http://{}/", health.addr);
    let health = health.answer_all("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ntrue");
    let mut proxy = proxy(&app, &["--busy-url", &url, "--grace", "4s", "--reserve", "2s"]);
    proxy.terminate();
    assert_eq!(proxy.wait_log("drained")["verdict"], "1 cut");
    assert!(health.seen().contains("GET / HTTP/1.1"));
    proxy.process.wait_exit();
}

/// The app need not be asked again for work that only a running request can cause.
#[test]
fn an_idle_app_is_asked_again_while_a_request_runs() {
    let (app, health) = (RawApp::start(), RawApp::start());
    let url = format!("http://{}/", health.addr);
    let mut proxy = proxy(&app, &["--busy-url", &url]);
    let mut client = proxy.client();
    client.get("/");
    let mut running = app.asked();
    proxy.terminate();
    proxy.wait_phase("draining");
    for _ in 0..2 {
        health.asked().send(IDLE);
    }
    proxy.wait_in_flight(2);
    running.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.answer().text(), "ok");
    health.asked().send(IDLE);
    proxy.expect_clean_exit();
}

/// A request that ends meanwhile may have caused work that the response does not know of.
#[test]
fn what_the_app_said_before_its_last_request_ended_does_not_count() {
    let (app, health) = (RawApp::start(), RawApp::start());
    let url = format!("http://{}/", health.addr);
    let mut proxy = proxy(&app, &["--busy-url", &url]);
    let mut client = proxy.client();
    client.get("/");
    let mut running = app.asked();
    proxy.terminate();
    proxy.wait_phase("draining");
    // The one before may have been sent in the phase before.
    health.asked().send(IDLE);
    let mut early = health.asked();
    running.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.answer().text(), "ok");
    proxy.wait_in_flight(1);
    early.send(IDLE);
    health.asked().send(busy("1"));
    health.asked().send(IDLE);
    proxy.expect_clean_exit();
}

/// The limit is for the app's own leases.
#[test]
fn the_app_is_told_however_many_leases_are_out() {
    let (app, hook) = (RawApp::start(), RawApp::start());
    let url = format!("http://{}/", hook.addr);
    let proxy = proxy(&app, &["--on-drain-url", &url]);
    let lease = || {
        let mut client = Client::unix(&proxy.control).expect("the control socket");
        client.send("POST /leases?name=x&ttl=1h HTTP/1.1\r\nHost: localhost\r\n\r\n");
        client.answer().head.status
    };
    while lease() == 201 {}
    assert_eq!(lease(), 429);
    proxy.terminate();
    hook.asked().send(IDLE);
    proxy.wait_log("the app was told of the drain");
}

#[test]
fn a_file_is_there_during_a_drain_and_not_before_or_after() {
    let (app, dir) = (RawApp::start(), temporary_directory());
    let (file, others) = (dir.join("draining"), dir.join("others"));
    fs::write(&file, "left by a killed process").expect("writable");
    fs::write(&others, "theirs").expect("writable");
    let proxy = proxy(&app, &["--share-dir", dir.to_str().expect("UTF-8")]);
    wait_for("no file", || (!file.exists()).then_some(()));
    std::os::unix::fs::symlink(&others, &file).expect("a link");
    let drain = proxy.command(&["drain"]);
    wait_for("a file", || file.exists().then_some(()));
    proxy.wait_phase("drained");
    assert_eq!(fs::read_to_string(&others).expect("text"), "theirs", "what a link led to");
    std::thread::sleep(MOMENT / 30);
    assert!(file.exists(), "the app still shuts down");
    proxy.command_output(&["resume"]);
    assert!(!file.exists());
    drop(drain);
    let _ = fs::remove_dir_all(dir);
}
