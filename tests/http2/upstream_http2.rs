//! `--upstream-protocol http2`: HTTP/1.1 clients reach an app that speaks only HTTP/2.

use crate::common;

use common::grpc::{App, Call};
use common::http::{Answer, Client, End};
use common::http2::{ends_on_a_boundary, run};
use common::process::Lameduck;
use serde_json::Value;

const HTTP2: [&str; 4] = ["--upstream-protocol", "http2", "--threads", "1"];

fn app() -> (App, Lameduck) {
    let app = App::start();
    let proxy = Lameduck::proxy(app.addr, &HTTP2);
    (app, proxy)
}

/// The request as the app saw it, which it returns as its response.
fn seen(answer: &Answer) -> Value {
    assert_eq!(answer.head.status, 200, "{answer:?}");
    serde_json::from_slice(&answer.body).unwrap_or_else(|_| panic!("{answer:?}"))
}

#[test]
fn a_chunked_request_arrives_with_its_trailers_and_the_answers_trailers_come_back() {
    let (_app, proxy) = app();
    let mut client = proxy.client();
    client.send(
        "POST /a?b=c HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding: chunked\r\nX-A: 1\r\nX-A: 2\r\n\
         Connection: keep-alive\r\n\r\n3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nX-Sum: 7\r\n\r\n",
    );
    let answer = client.answer();
    let seen = seen(&answer);
    let fields = &seen["fields"];
    assert_eq!((&seen["body"], &seen["trailers"]["x-sum"]), (&"abcdefg".into(), &"7".into()));
    assert_eq!((&fields[":path"], &fields[":authority"]), (&"/a?b=c".into(), &"app.test".into()));
    assert_eq!((&fields["x-a"], &fields["x-forwarded-for"]), (&"1, 2".into(), &"127.0.0.1".into()));
    assert!(fields["connection"].is_null() && fields["transfer-encoding"].is_null(), "{fields}");
    assert!(answer.head.has("transfer-encoding", "chunked"), "{:?}", answer.head);
    assert!(answer.trailers.iter().any(|(name, _)| name == "x-calls"), "{:?}", answer.trailers);
    // The connection stays open.
    client.get("/again");
    assert_eq!(self::seen(&client.answer())["fields"][":path"], "/again");
}

#[test]
fn a_body_of_known_length_arrives_whole_and_large_ones_do_too() {
    let (_app, proxy) = app();
    let body = "x".repeat(1 << 20);
    let mut client = proxy.client();
    client.send(format!("PUT /large HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
    assert_eq!(seen(&client.answer())["body"].as_str().map(str::len), Some(body.len()));
}

#[test]
fn answers_without_a_body_and_old_clients_get_what_they_understand() {
    let (_app, proxy) = app();
    let mut client = proxy.client();
    client.request("HEAD", "/", &[]);
    let head = client.head();
    assert!(head.status == 200 && head.has("content-length", "9"), "{head:?}");
    client.get("/empty");
    let head = client.head();
    assert!(head.status == 204 && head.header("transfer-encoding").is_none(), "{head:?}");
    client.get("/nothing");
    let head = client.head();
    assert!(head.status == 200 && head.has("content-length", "0"), "{head:?}");
    let mut old = proxy.client();
    old.send("GET /old HTTP/1.0\r\n\r\n");
    let answer = old.answer();
    assert_eq!(answer.head.header("transfer-encoding"), None);
    assert_eq!(seen(&answer)["fields"][":path"], "/old");
}

#[test]
fn a_client_that_expects_100_continue_gets_it_and_an_upgrade_is_left_aside() {
    let (_app, proxy) = app();
    let mut client = proxy.client();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert_eq!(client.head().status, 100);
    client.send("ok");
    assert_eq!(seen(&client.answer())["body"], "ok");
    client.send("GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
    assert_eq!(seen(&client.answer())["fields"]["upgrade"], Value::Null);
}

#[test]
fn a_post_that_the_app_did_not_process_is_sent_again() {
    let (_app, proxy) = app();
    Client::ask(proxy.listen, "/first");
    let mut client = proxy.client();
    client.send("POST /t.T/Away HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok");
    let answer = client.answer();
    assert_eq!((answer.head.status, answer.text().as_str()), (200, "ok"));
    assert_eq!(proxy.metric("lameduck_upstream_retries_total"), 1.0);
}

#[test]
fn an_answer_that_the_app_cuts_is_seen_to_be_cut() {
    let (mut app, proxy) = app();
    let mut client = proxy.client();
    client.send("POST /t.T/Watch HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
    let head = client.head();
    app.wait("call /t.T/Watch");
    app.process.kill();
    let answer = client.body("POST", head);
    assert!(matches!(answer.end, End::CutByRst | End::CutByFin), "{answer:?}");
}

#[test]
fn clients_of_both_protocols_share_it() {
    let (app, proxy) = app();
    assert_eq!(Call::begin(proxy.listen, "/t.T/Unary", &["hello"]).json("data"), "hello");
    Client::ask(proxy.listen, "/plain");
    app.wait("call /plain");
}

#[test]
fn event_streams_end_on_a_boundary_where_both_sides_speak_http2() {
    let app = App::start();
    let mut proxy = Lameduck::proxy(app.addr, &[&HTTP2[..], &["--stream-spread", "0s"]].concat());
    run(ends_on_a_boundary(&mut proxy, "/events"));
    proxy.expect_clean_exit();
}
