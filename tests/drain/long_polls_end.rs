//! A waiting long poll is not work: when streams end, it is answered for the app, so that its client reconnects.

use crate::common;

use common::MOMENT;
use common::http::{Answer, Client};
use common::http2::{Peer, run, to, whole};
use common::process::{Lameduck, Node};
use http::Method;

/// The request of an engine.io client, with more in its query.
fn engine_io(more: &str) -> String {
    format!("/socket.io/?EIO=4&transport=polling&t=PQ1x{more}")
}

/// Begins a session on a new connection, and returns its id.
fn begin(proxy: &Lameduck) -> String {
    let open = Client::ask(proxy.listen, &engine_io("")).text();
    let open: serde_json::Value =
        serde_json::from_str(open.strip_prefix('0').expect("an open packet")).expect("JSON");
    open["sid"].as_str().expect("an id").to_owned()
}

/// A session whose GET waits in the app.
fn waiting(proxy: &Lameduck, app: &Node) -> (String, Client) {
    let sid = begin(proxy);
    let mut client = proxy.client();
    client.get(&engine_io(&format!("&sid={sid}")));
    wait_line(app, &format!("session {sid} waits"));
    (sid, client)
}

fn wait_line(app: &Node, line: &str) {
    app.process.wait_line(line, |other| (other == line).then_some(()));
}

fn expect_close_packet(answer: &Answer) {
    assert_eq!((answer.head.status, answer.text().as_str()), (200, "1"), "{:?}", answer.head);
    assert_eq!(answer.head.header("content-type"), Some("text/plain; charset=UTF-8"));
}

#[test]
fn a_socket_io_session_is_closed_by_its_own_protocol() {
    let app = Node::polling();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s"]);
    let (sid, mut client) = waiting(&proxy, &app);
    proxy.wait_in_flight(1);
    let ledger = Client::unix(&proxy.control).and_then(|control| control.try_ask("/ledger", &[]));
    assert!(ledger.expect("the ledger").text().contains("long-poll"));

    proxy.terminate();
    let answer = client.answer();
    expect_close_packet(&answer);
    assert!(answer.head.has("connection", "close"), "{:?}", answer.head);
    client.expect_fin();
    // To the app it looks as if the client had gone.
    wait_line(&app, &format!("session {sid} is over"));
    proxy.expect_clean_exit();
    assert_eq!(proxy.wait_log("drained")["streams_ended"], 1);
}

#[test]
fn the_apps_own_response_comes_first() {
    let app = Node::polling();
    let proxy = Lameduck::proxy(app.addr, &["--lame-duck", "60s", "--grace", "120s"]);
    let (sid, mut client) = waiting(&proxy, &app);
    proxy.terminate();
    proxy.wait_phase("lame-duck");
    assert!(client.is_quiet_for(MOMENT), "ended before its time");
    let mut other = proxy.client();
    other.request("POST", &engine_io(&format!("&sid={sid}")), &["Content-Length: 6"]);
    other.send("4hello");
    assert_eq!(other.answer().text(), "ok");
    let answer = client.answer();
    assert_eq!(answer.text(), "4hello");
    assert!(answer.head.has("connection", "close"), "{:?}", answer.head);
}

#[test]
fn a_hold_ends_it_and_its_client_is_held_when_it_comes_again() {
    let app = Node::polling();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let (_, mut client) = waiting(&proxy, &app);
    let mut hold = proxy.command(&["hold", "--until-idle"]);
    expect_close_packet(&client.answer());
    assert_eq!(hold.wait_exit(), 0, "{}", hold.output());
    // Over the same connection, since a hold is not a drain.
    client.get(&engine_io(""));
    proxy.wait_status("held", |status| status["held"] == 1);
    assert!(proxy.command_output(&["resume"]).status.success());
    assert!(client.answer().text().starts_with("0{\"sid\":"));
}

#[test]
fn a_hold_that_keeps_streams_keeps_it() {
    let app = Node::polling();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let (sid, mut client) = waiting(&proxy, &app);
    let mut hold = proxy.command(&["hold", "--until-idle", "--keep-streams"]);
    assert_eq!(hold.wait_exit(), 0, "{}", hold.output());
    assert!(client.is_quiet_for(MOMENT));
    // Directly to the app, because the proxy would hold it.
    let mut other = Client::connect(app.addr);
    other.request("POST", &engine_io(&format!("&sid={sid}")), &["Content-Length: 2"]);
    other.send("42");
    assert_eq!(client.answer().text(), "42");
}

#[test]
fn an_http2_client_gets_the_same() {
    let app = Node::polling();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s"]);
    let sid = begin(&proxy);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let answer = peer.send(to(Method::GET, &engine_io(&format!("&sid={sid}"))), true).await.0;
        wait_line(&app, &format!("session {sid} waits"));
        proxy.terminate();
        let answer = whole(answer.await.expect("answered")).await.expect("a clean end");
        assert_eq!((answer.status, answer.text().as_str()), (200, "1"));
        assert!(peer.wait_end().is_ok());
    });
    wait_line(&app, &format!("session {sid} is over"));
    proxy.expect_clean_exit();
}

#[test]
fn a_named_one_is_answered_204() {
    let app = Node::polling();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s", "--long-poll", "/rooms/*,/poll"]);
    let (mut client, mut answered) = (proxy.client(), proxy.client());
    answered.get("/poll");
    wait_line(&app, "poll waits");
    Client::ask(proxy.listen, "/news");
    assert_eq!(answered.answer().text(), "news");
    client.get("/poll?since=7");
    proxy.wait_in_flight(1);

    proxy.terminate();
    let answer = client.answer();
    assert_eq!((answer.head.status, answer.text().as_str()), (204, ""));
    assert!(answer.head.has("connection", "close") && answer.head.header("content-length").is_none());
    client.expect_fin();
    proxy.expect_clean_exit();
}

#[test]
fn a_named_one_gets_the_configured_response_after_its_body() {
    let app = Node::polling();
    let args =
        ["--grace", "60s", "--long-poll", "POST /poll", "--long-poll-answer", "200 application/json [1, 2]"];
    let mut proxy = Lameduck::proxy(app.addr, &args);
    let mut client = proxy.client();
    client.request("POST", "/poll", &["Content-Length: 4"]);
    client.send("si");
    wait_line(&app, "poll waits");
    proxy.terminate();
    proxy.wait_phase("draining");
    assert!(client.is_quiet_for(MOMENT), "answered before its request was complete");
    client.send("nc");
    let answer = client.answer();
    assert_eq!((answer.head.status, answer.text().as_str()), (200, "[1, 2]"));
    assert_eq!(answer.head.header("content-type"), Some("application/json"));
    wait_line(&app, "poll left");
    proxy.expect_clean_exit();
}

#[test]
fn one_that_is_not_named_is_work() {
    let app = Node::polling();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/poll");
    wait_line(&app, "poll waits");
    proxy.terminate();
    assert_eq!(proxy.wait_phase("draining")["in_flight"], 1);
    assert!(client.is_quiet_for(MOMENT));
    Client::ask(app.addr, "/news");
    assert_eq!(client.answer().text(), "news");
    proxy.expect_clean_exit();
}
