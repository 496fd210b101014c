//! A drain also ends a compressed event stream that its client can reopen: where it is quiet, and so that the client
//! can tell that it is incomplete.

use crate::common;

use common::http::End;
use common::http2::{CANCEL, Peer, run, to, whole};
use common::process::{Lameduck, Node};
use http::Method;

/// Last bytes of a flushed zlib stream: an empty stored block (RFC 1951 §3.2.4).
const FLUSHED: [u8; 4] = [0, 0, 0xff, 0xff];

const ACCEPT: [&str; 2] = ["Accept: text/event-stream", "Accept-Encoding: gzip"];

#[test]
fn it_ends_after_a_flush_and_counts_as_ended() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s"]);
    let mut client = proxy.client();
    client.request("GET", "/gzip-events", &ACCEPT);
    let head = client.head();
    app.wait_active(1);

    proxy.terminate();
    let answer = client.body("GET", head);
    assert_eq!(answer.end, End::CutByFin, "an incomplete coding must not end cleanly");
    assert!(answer.body.ends_with(&FLUSHED), "{:?}", answer.body);
    proxy.expect_clean_exit();
    assert_eq!(proxy.wait_log("drained")["streams_ended"], 1);
}

#[test]
fn one_that_is_never_quiet_ends_all_the_same() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "120s"]);
    let mut client = proxy.client();
    client.request("GET", "/busy-gzip-events", &ACCEPT);
    let head = client.head();

    proxy.terminate();
    let answer = client.body("GET", head);
    assert_eq!(answer.end, End::CutByFin);
    assert!(answer.body.ends_with(&FLUSHED), "{:?}", answer.body);
    proxy.expect_clean_exit();
}

#[test]
fn a_hold_ends_it_and_a_hold_that_keeps_streams_does_not() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("GET", "/gzip-events", &ACCEPT);
    let head = client.head();
    let mut hold = proxy.command(&["hold", "--until-idle", "--keep-streams"]);
    assert_eq!(hold.wait_exit(), 0, "{}", hold.output());
    assert!(proxy.command_output(&["resume"]).status.success());
    let mut hold = proxy.command(&["hold", "--until-idle"]);
    assert_eq!(client.body("GET", head).end, End::CutByFin);
    assert_eq!(hold.wait_exit(), 0, "{}", hold.output());
}

#[test]
fn a_client_of_http2_finds_its_stream_reset() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s"]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let mut request = to(Method::GET, "/gzip-events");
        request.headers_mut().insert("accept", "text/event-stream".parse().expect("a value"));
        let answer = peer.send(request, true).await.0.await.expect("a head");
        app.wait_active(1);
        proxy.terminate();
        let cut = whole(answer).await.expect_err("no clean end");
        assert_eq!(cut.reason().map(u32::from), Some(CANCEL), "{cut}");
    });
    proxy.expect_clean_exit();
}

#[test]
fn what_is_no_coding_ends_on_a_boundary() {
    for coding in ["none", "identity", "", "Identity, None"] {
        let app = Node::held();
        let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s"]);
        let mut client = proxy.client();
        client.request("GET", "/coded-events", &[ACCEPT[0], &format!("X-Coding: {coding}")]);
        let head = client.head();
        client.wait_seen("whole\n\n");
        proxy.terminate();
        let answer = client.body("GET", head);
        assert_eq!((answer.end, answer.text().as_str()), (End::Whole, "id: 1\ndata: whole\n\n"), "{coding}");
        proxy.expect_clean_exit();
    }
}
