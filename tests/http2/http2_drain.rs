//! A drain sends GOAWAY to HTTP/2 clients, lets their streams finish, and cuts the rest at the deadline so that a
//! client can tell.

use crate::common;

use std::process::Command;
use std::time::Duration;

use common::http2::{
    CANCEL, GOAWAY, HEADERS, NO_ERROR, PING, Peer, RST_STREAM, Raw, block, ends_on_a_boundary, run, to, whole,
};
use common::port::Port;
use common::process::{Lameduck, Node, Process};
use http::Method;
use rustix::process::Signal;

/// Sets the deadline to two seconds after SIGTERM.
const SOON: [&str; 4] = ["--grace", "3s", "--reserve", "1s"];
/// Last stream of the advisory GOAWAY, 2^31−1: every stream that is on its way is served (RFC 9113 §6.8).
const ADVISORY: u32 = u32::MAX >> 1;

fn node_client(proxy: &Lameduck, args: &[&str]) -> Process {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/http2-client.js");
    let url = format!("http://{}", proxy.listen);
    Process::start("the client", Command::new("node").arg(script).arg(url).args(args))
}

#[test]
fn running_streams_finish_and_a_node_client_sees_no_error() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = node_client(&proxy, &["/wait", "/stream", "/sized", "/wait", "/stream"]);
    app.wait_active(5);
    proxy.terminate();
    client.wait_line("a GOAWAY", |line| line.starts_with("goaway 0 ").then_some(()));
    proxy.wait_phase("draining");
    app.release();
    assert_eq!(client.wait_exit(), 0);
    let output = client.output();
    for answer in ["/wait 200 9 0", "/stream 200 11 0", "/sized 200 11 0"] {
        assert!(output.contains(&format!("answer {answer}")), "{output}");
    }
    assert!(!output.contains("error") && output.contains("session closed"), "{output}");
    proxy.expect_clean_exit();
}

#[test]
fn a_node_client_that_never_stops_loses_nothing() {
    let app = Node::slow();
    // A long lame-duck phase, in which the client opens a new session after each GOAWAY.
    let mut proxy = Lameduck::proxy(app.addr, &["--lame-duck", "3s"]);
    let mut client = node_client(&proxy, &["--again", "/slow?ms=3"]);
    proxy.wait_status("requests", |status| status["in_flight"].as_u64() > Some(3));
    proxy.terminate();
    client.wait_line("a GOAWAY", |line| line.starts_with("goaway 0 ").then_some(()));
    client.signal(Signal::INT);
    let (asked, done) = client.wait_line("the end", |line| {
        let mut numbers =
            line.strip_prefix("stopped ")?.split(' ').map(|n| n.parse::<u64>().expect("a number"));
        Some((numbers.next()?, numbers.next()?))
    });
    assert!(asked >= 8 && asked - done < 8, "{asked} asked, {done} answered");
    client.wait_exit();
    assert!(!client.output().contains("error"), "{}", client.output());
    proxy.expect_clean_exit();
}

#[test]
fn the_goaway_comes_twice_and_what_is_on_its_way_is_served() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut raw = Raw::connect(proxy.listen);
    raw.frame(HEADERS, 5, 1, &block("/wait", &[]));
    app.wait_active(1);
    proxy.terminate();
    let advisory = raw.wait(GOAWAY).expect("an advisory GOAWAY");
    assert_eq!((advisory.last_stream(), advisory.code()), (ADVISORY, NO_ERROR));
    let ping = raw.wait(PING).expect("a ping");
    raw.frame(HEADERS, 5, 3, &block("/wait", &[]));
    app.wait_active(2);
    raw.frame(PING, 1, 0, &ping.payload);
    let last = raw.wait(GOAWAY).expect("the final GOAWAY");
    assert_eq!((last.last_stream(), last.code()), (3, NO_ERROR));
    // Streams above the last one are ignored; the client knows that and retries elsewhere.
    raw.frame(HEADERS, 5, 5, &block("/wait", &[]));
    app.release();
    let mut answered = vec![];
    while let Some(frame) = raw.next() {
        if frame.kind == HEADERS {
            answered.push(frame.id);
        }
        assert_ne!(frame.kind, RST_STREAM, "{frame:?}");
    }
    answered.sort_unstable();
    assert_eq!(answered, [1, 3]);
    proxy.expect_clean_exit();
}

#[test]
fn the_lame_duck_serves_new_connections_and_sends_them_elsewhere() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &["--lame-duck", "2s"]);
    proxy.terminate();
    proxy.wait_phase("lame-duck");
    let mut raw = Raw::connect(proxy.listen);
    raw.frame(HEADERS, 5, 1, &block("/", &[]));
    let frames: Vec<_> = std::iter::from_fn(|| raw.next()).take_while(|frame| frame.kind != GOAWAY).collect();
    // GOAWAY comes after the first request; before it, the client would reconnect again and again.
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        assert_eq!(peer.get("/").await.expect("whole").status, 200);
        assert!(peer.wait_end().is_ok());
    });
    drop(frames);
    drop(raw);
    proxy.expect_clean_exit();
}

#[test]
fn a_client_that_answers_no_ping_holds_no_drain_up() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut raw = Raw::connect(proxy.listen);
    raw.frame(HEADERS, 5, 1, &block("/", &[]));
    assert!(raw.wait(HEADERS).is_some());
    let mut unused = Raw::connect(proxy.listen);
    proxy.terminate();
    assert_eq!(raw.wait(GOAWAY).expect("an advisory GOAWAY").last_stream(), ADVISORY);
    assert_eq!(raw.wait(GOAWAY).expect("the final GOAWAY").last_stream(), 1);
    assert!(raw.ends_within(Duration::from_secs(2)) && unused.ends_within(Duration::from_secs(5)));
    proxy.expect_clean_exit();
}

#[test]
fn after_a_resume_clients_that_reconnect_are_served() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--lame-duck", "20s", "--grace", "120s"]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let answer = peer.send(to(Method::GET, "/wait"), true).await.0;
        app.wait_active(1);
        let drain = proxy.command(&["drain"]);
        proxy.wait_phase("lame-duck");
        assert!(proxy.command_output(&["resume"]).status.success());
        drop(drain);
        let other = Peer::connect(proxy.listen).await;
        assert_eq!(other.get("/").await.expect("whole").status, 200);
        app.release();
        assert_eq!(whole(answer.await.expect("answered")).await.expect("whole").text(), "released\n");
        assert!(peer.wait_end().is_ok());
        assert_eq!(other.get("/").await.expect("whole").status, 200);
    });
}

#[test]
fn event_streams_end_on_a_boundary_and_cleanly() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &["--stream-spread", "0s"]);
    run(ends_on_a_boundary(&mut proxy, "/events?ms=100"));
    proxy.expect_clean_exit();
}

fn expect_unclean_exit(mut proxy: Lameduck) {
    proxy.process.wait_exit();
    assert_ne!(proxy.wait_log("drained")["verdict"], "clean");
}

#[test]
fn at_the_deadline_a_client_learns_whether_the_app_has_its_request() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &SOON);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let waiting = peer.send(to(Method::GET, "/wait"), true).await.0;
        let half = peer.send(to(Method::GET, "/sized"), true).await.0.await.expect("a head");
        app.wait_active(2);
        proxy.terminate();
        assert_eq!(waiting.await.expect("answered").status(), 504);
        let cut = whole(half).await.expect_err("no clean end");
        assert_eq!(cut.reason().map(u32::from), Some(CANCEL), "{cut}");
    });
    expect_unclean_exit(proxy);
}

#[test]
fn at_the_deadline_what_the_app_never_had_gets_503() {
    let nobody = Port::reserve();
    let proxy = Lameduck::proxy(nobody.addr, &[&SOON[..], &["--upstream-wait", "30s"]].concat());
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let answer = peer.send(to(Method::GET, "/"), true).await.0;
        proxy.wait_in_flight(1);
        proxy.terminate();
        let answer = answer.await.expect("answered");
        assert_eq!(answer.status(), 503);
        assert!(answer.headers().contains_key("retry-after"));
    });
    expect_unclean_exit(proxy);
}
