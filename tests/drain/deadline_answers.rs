//! At the deadline, remaining requests end so that the client can tell what happened: 503 if the app never received the
//! request, 504 if it did, and a visible cut if the response was partly sent.

use crate::common;

use common::http::{Client, End};
use common::port::Port;
use common::process::{Lameduck, Node};
use std::time::{Duration, Instant};

/// The deadline is then two seconds after SIGTERM.
const SOON: [&str; 4] = ["--grace", "3s", "--reserve", "1s"];

fn expect_unclean_exit(mut proxy: Lameduck) {
    proxy.process.wait_exit();
    assert_ne!(proxy.wait_log("drained")["verdict"], "clean");
}

#[test]
fn a_request_that_the_app_never_had_gets_503() {
    let nobody = Port::reserve();
    let proxy = Lameduck::proxy(nobody.addr, &[&SOON[..], &["--upstream-wait", "30s"]].concat());
    let mut client = proxy.client();
    client.get("/");
    proxy.wait_in_flight(1);

    proxy.terminate();
    let answer = client.answer();
    assert_eq!(answer.head.status, 503);
    assert!(answer.head.header("retry-after").is_some(), "{:?}", answer.head);
    assert!(answer.head.has("connection", "close"), "{:?}", answer.head);
    client.expect_fin();
    expect_unclean_exit(proxy);
}

#[test]
fn a_request_that_the_app_has_gets_504() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &SOON);
    let mut client = proxy.client();
    client.get("/hang");
    app.wait_active(1);

    let begun = Instant::now();
    proxy.terminate();
    let answer = client.answer();
    assert!(begun.elapsed() >= Duration::from_millis(1900), "{:?}", begun.elapsed());
    assert_eq!(answer.head.status, 504);
    assert!(answer.head.has("connection", "close"), "{:?}", answer.head);
    client.expect_fin();
    expect_unclean_exit(proxy);
}

#[test]
fn a_half_sent_chunked_response_has_no_final_chunk() {
    let (app, proxy, mut client) = half_sent("GET /stream HTTP/1.1\r\nHost: app.test\r\n\r\n");
    let answer = client.answer();
    assert!(matches!(answer.end, End::CutByRst | End::CutByFin), "{answer:?}");
    assert_eq!(answer.text(), "first\n");
    expect_unclean_exit(proxy);
    drop(app);
}

#[test]
fn a_half_sent_sized_response_stays_short() {
    let (app, proxy, mut client) = half_sent("GET /sized HTTP/1.1\r\nHost: app.test\r\n\r\n");
    let answer = client.answer();
    assert!(matches!(answer.end, End::CutByRst | End::CutByFin), "{answer:?}");
    assert_eq!(answer.text(), "first\n");
    expect_unclean_exit(proxy);
    drop(app);
}

#[test]
fn a_half_sent_response_of_unknown_length_is_reset() {
    // To an HTTP/1.0 client, a clean end of the connection is the end of the body.
    let (app, proxy, mut client) = half_sent("GET /stream HTTP/1.0\r\nHost: app.test\r\n\r\n");
    let answer = client.answer();
    assert_eq!(answer.end, End::CutByRst, "{answer:?}");
    expect_unclean_exit(proxy);
    drop(app);
}

fn half_sent(request: &str) -> (Node, Lameduck, Client) {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &SOON);
    let mut client = proxy.client();
    client.send(request);
    app.wait_active(1);
    proxy.terminate();
    (app, proxy, client)
}
