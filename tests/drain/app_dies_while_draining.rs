//! If the app dies during the drain, requests that wait for it fail at once instead of at the deadline.

use crate::common;

use common::http::End;
use common::process::{Lameduck, Node};
use std::time::Instant;

#[test]
fn what_waits_for_a_dead_app_fails_at_once() {
    let mut app = Node::held();
    // The deadline comes later than any wait of a test would allow.
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "120s", "--upstream-wait", "60s"]);
    let (mut unanswered, mut half_sent, mut kept) = (proxy.client(), proxy.client(), proxy.client());
    kept.get("/");
    kept.answer();
    unanswered.get("/wait");
    half_sent.get("/stream");
    app.wait_active(2);
    proxy.terminate();
    // The connections above arrived just before, but no more arrive, so the lame-duck phase ends within 10 s.
    proxy.wait_phase("draining");

    let died = Instant::now();
    app.process.kill();
    let answer = unanswered.answer();
    assert_eq!(answer.head.status, 502, "{answer:?}");
    assert!(answer.head.has("connection", "close"), "{:?}", answer.head);
    let answer = half_sent.answer();
    assert!(matches!(answer.end, End::CutByRst | End::CutByFin), "{answer:?}");
    proxy.process.wait_exit();
    assert!(died.elapsed() < common::LIMIT, "{:?}", died.elapsed());
}

#[test]
fn a_new_request_for_a_dead_app_fails_at_once() {
    let mut app = Node::held();
    let mut proxy =
        Lameduck::proxy(app.addr, &["--grace", "120s", "--upstream-wait", "60s", "--lame-duck", "3s"]);
    proxy.terminate();
    proxy.wait_phase("lame-duck");
    app.process.kill();
    let mut client = proxy.client();
    client.get("/");
    let answer = client.answer();
    assert_eq!(answer.head.status, 503, "{answer:?}");
    proxy.process.wait_exit();
}
