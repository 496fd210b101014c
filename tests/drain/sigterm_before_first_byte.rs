//! A connection that has sent nothing yet does not delay the drain, and is served if it sends a request in time.

use crate::common;

use common::http::End;
use common::process::{Lameduck, Node};

#[test]
fn a_silent_connection_delays_no_drain() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "120s"]);
    let mut client = proxy.client();
    proxy.wait_status("the connection", |status| status["connections"] == 1);
    proxy.terminate();
    client.expect_fin();
    proxy.expect_clean_exit();
}

#[test]
fn a_connection_that_speaks_after_sigterm_is_served() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut busy = proxy.client();
    busy.get("/wait");
    app.wait_active(1);
    let mut client = proxy.client();
    proxy.wait_status("both connections", |status| status["connections"] == 2);

    proxy.terminate();
    proxy.wait_phase("draining");
    client.get("/");
    let answer = client.answer();
    assert_eq!((answer.head.status, answer.end), (200, End::Whole));
    assert!(answer.head.has("connection", "close"), "{:?}", answer.head);
    client.expect_fin();
    app.release();
    busy.answer();
    proxy.expect_clean_exit();
}

#[test]
fn a_request_whose_head_is_half_sent_is_in_flight() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.send("GET / HTTP/1.1\r\nHo");
    proxy.wait_in_flight(1);

    proxy.terminate();
    proxy.wait_phase("draining");
    client.send("st: app.test\r\n\r\n");
    let answer = client.answer();
    assert_eq!((answer.head.status, answer.end), (200, End::Whole));
    client.expect_fin();
    proxy.expect_clean_exit();
}
