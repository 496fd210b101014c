//! `lameduck resume` cancels a drain: the proxy listens again at the same address and serves, in a new round.

use crate::common;

use common::http::{Client, Fill};
use common::process::{Lameduck, Node};

#[test]
fn a_resumed_proxy_serves_and_can_drain_again() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut running = proxy.client();
    running.get("/wait");
    app.wait_active(1);

    let mut drain = proxy.command(&["drain"]);
    let before = proxy.wait_phase("draining");
    Client::wait_refused(proxy.listen);
    assert_eq!(proxy.ready().head.status, 503);

    let resume = proxy.command_output(&["resume"]);
    assert!(resume.status.success(), "{resume:?}");
    drain.wait_exit();
    let after = proxy.wait_phase("serving");
    assert_eq!(after["round"].as_u64(), before["round"].as_u64().map(|round| round + 1));

    let mut kept = proxy.client();
    kept.get("/");
    let answer = kept.answer();
    assert!(answer.head.status == 200 && !answer.head.has("connection", "close"), "{:?}", answer.head);
    app.release();
    assert_eq!(running.answer().text(), "released\n");

    proxy.terminate();
    kept.expect_fin();
    proxy.expect_clean_exit();
}

#[test]
fn a_drained_proxy_can_be_resumed() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let drain = proxy.command_output(&["drain"]);
    assert!(drain.status.success(), "{drain:?}");
    assert_eq!(proxy.status().expect("still there")["phase"], "drained");

    assert!(proxy.command_output(&["resume"]).status.success());
    let mut client = proxy.client();
    client.get("/");
    assert_eq!(client.answer().head.status, 200);
    assert_eq!(client.fill(common::MOMENT), None::<Fill>, "a kept connection stays open");
}
