//! A health check is neither work nor an arrival, in HTTP/1.1 and HTTP/2: no drain, hold or user waits for it. Limits,
//! metrics and time limits apply to it as to any request.

use std::thread;
use std::time::{Duration, Instant};

use crate::common::MOMENT;
use crate::common::app::RawApp;
use crate::common::http::Client;
use crate::common::http2::{Peer, run, to};
use crate::common::process::{Lameduck, Node};
use crate::common::websocket::WebSocket;
use http::{HeaderValue, Method, Request};

const KUBELET: &str = "User-Agent: kube-probe/1.34";
const OK: &str = "HTTP/1.1 204 No Content\r\n\r\n";

/// An HTTP/2 request with the kubelet's user agent.
fn by_kubelet(path: &str) -> Request<()> {
    let mut request = to(Method::GET, path);
    request.headers_mut().insert("user-agent", HeaderValue::from_static("kube-probe/1.34"));
    request
}

/// Sends a check over HTTP/1.1 without reading the response.
fn checking(proxy: &Lameduck, path: &str, fields: &[&str]) -> Client {
    let mut client = proxy.client();
    client.request("GET", path, fields);
    client
}

fn in_flight(proxy: &Lameduck) -> u64 {
    proxy.status().expect("a status")["in_flight"].as_u64().expect("a number")
}

#[test]
fn a_drain_waits_for_no_health_check_that_hangs() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s"]);
    let mut check = checking(&proxy, "/wait", &[KUBELET]);
    app.wait_active(1);
    assert_eq!(in_flight(&proxy), 0);
    let began = Instant::now();
    proxy.terminate();
    proxy.expect_clean_exit();
    assert!(began.elapsed() < Duration::from_secs(20), "it waited {:?}", began.elapsed());
    assert_eq!(check.answer().head.status, 504);
    let drained = proxy.wait_log("drained");
    assert_eq!((&drained["verdict"], &drained["unanswered"]), (&"clean".into(), &0.into()));
}

#[test]
fn a_drain_waits_for_no_http2_health_check_that_hangs() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s"]);
    let began = Instant::now();
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let (answer, _) = peer.send(by_kubelet("/wait"), true).await;
        app.wait_active(1);
        assert_eq!(in_flight(&proxy), 0);
        proxy.terminate();
        assert_eq!(answer.await.expect("an answer").status(), 504);
    });
    proxy.expect_clean_exit();
    assert!(began.elapsed() < Duration::from_secs(20), "it waited {:?}", began.elapsed());
}

#[test]
fn it_uses_no_slot_of_max_in_flight_and_the_exemption_is_limited() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--max-in-flight", "1"]);
    let first = checking(&proxy, "/wait", &[KUBELET]);
    app.wait_active(1);
    assert_eq!(Client::ask(proxy.listen, "/").head.status, 200, "the check takes up the only slot");
    // The count falls just after the last byte, which the client may see first.
    proxy.wait_in_flight(0);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        assert_eq!(peer.get("/").await.expect("an answer").status, 200);
        // At most --max-in-flight checks are exempt; the next one counts as an ordinary request.
        let (second, _) = peer.send(by_kubelet("/wait"), true).await;
        app.wait_active(2);
        proxy.wait_in_flight(1);
        assert_eq!(peer.ask(by_kubelet("/wait")).await.expect("an answer").status, 503);
        assert_eq!(checking(&proxy, "/wait", &[KUBELET]).answer().head.status, 503);
        assert_eq!(Client::ask(proxy.listen, "/").head.status, 503);
        app.release();
        assert_eq!(second.await.expect("an answer").status(), 200);
    });
    drop(first);
}

#[test]
fn its_answers_are_counted_and_it_has_no_more_time_than_others() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--answer-timeout", "1s"]);
    assert_eq!(checking(&proxy, "/", &[KUBELET]).answer().head.status, 200);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        assert_eq!(peer.ask(by_kubelet("/")).await.expect("an answer").status, 200);
    });
    assert_eq!(checking(&proxy, "/wait", &[KUBELET]).answer().head.status, 504);
    for (family, number) in [
        ("lameduck_requests_total{code=\"2xx\"}", 2.0),
        ("lameduck_requests_ended_total{ended=\"complete\"}", 2.0),
        ("lameduck_requests_ended_total{ended=\"timed-out\"}", 1.0),
        ("lameduck_health_checks_total{ended=\"complete\"}", 2.0),
        ("lameduck_health_checks_total{ended=\"timed-out\"}", 1.0),
    ] {
        crate::common::wait_for(family, || (proxy.metric(family) == number).then_some(()));
    }
}

#[test]
fn a_user_agent_makes_no_health_check_of_other_work() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--health-check", "/socket"]);
    // A POST, a request with a body, one for events, and one that becomes a tunnel.
    let mut post = proxy.client();
    post.request("POST", "/wait", &[KUBELET, "Content-Length: 0"]);
    let mut body = proxy.client();
    body.request("GET", "/wait", &[KUBELET, "Content-Length: 2"]);
    body.send("hi");
    let events = checking(&proxy, "/wait", &[KUBELET, "Accept: text/event-stream"]);
    app.wait_active(3);
    proxy.wait_in_flight(3);
    app.release();
    assert_eq!((post.answer().head.status, body.answer().head.status), (200, 200));
    drop(events);
    proxy.wait_in_flight(0);
    let _socket = WebSocket::open(proxy.listen, "/socket");
    assert_eq!(in_flight(&proxy), 1);
}

#[test]
fn requests_that_the_user_names_are_health_checks_too() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--health-check", "/wait,agent:Own Monitor"]);
    let path = checking(&proxy, "/wait", &[]);
    app.wait_active(1);
    assert_eq!(in_flight(&proxy), 0);
    let held = proxy.command_output(&["hold"]);
    assert!(held.status.success(), "{held:?}");
    // A hold lets checks pass, and holds other requests.
    let named = checking(&proxy, "/", &["User-Agent: Mozilla/5.0 (Own Monitor 3)"]).answer();
    assert_eq!(named.head.status, 200);
    let mut user = checking(&proxy, "/", &["User-Agent: Mozilla/5.0 (Somebody)"]);
    proxy.wait_status("held", |status| status["held"] == 1);
    assert!(user.is_quiet_for(MOMENT));
    assert!(proxy.command_output(&["resume"]).status.success());
    assert_eq!(user.answer().head.status, 200);
    drop(path);
}

#[test]
fn a_lame_duck_does_not_wait_for_callers_that_are_health_checks() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s", "--health-check", "/ping"]);
    // If checks counted, their intervals would prolong the lame-duck phase to ten seconds.
    for fields in [&["User-Agent: Prometheus/3.5.0"][..], &[], &[KUBELET]] {
        assert_eq!(checking(&proxy, "/ping", fields).answer().head.status, 200);
        thread::sleep(Duration::from_millis(1500));
    }
    let mut bare = proxy.client();
    bare.send("OPTIONS / HTTP/1.0\r\n\r\n");
    assert_eq!(bare.answer().head.status, 200);
    let began = Instant::now();
    proxy.terminate();
    proxy.wait_log("new connections are refused");
    assert!(began.elapsed() < Duration::from_secs(7), "it waited {:?}", began.elapsed());
    drop(bare);
    proxy.expect_clean_exit();
}

#[test]
fn grpc_has_a_health_check_of_its_own() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--upstream-protocol", "http1"]);
    let mut check = proxy.client();
    check.request("POST", "/grpc.health.v1.Health/Check", &["Content-Length: 5"]);
    check.send([0; 5]);
    let mut asked = app.asked();
    assert_eq!(in_flight(&proxy), 0);
    asked.send(OK);
    assert_eq!(check.answer().head.status, 204);
}
