//! A client times out only if nothing moves in either direction and it is the client's turn (`--body-timeout`).

use crate::common;

use std::thread;
use std::time::{Duration, Instant};

use common::app::RawApp;
use common::http::{Client, End};
use common::http2::{DATA, END_STREAM, HEADERS, Peer, Raw, SETTINGS, WINDOW_UPDATE, block, run, to, whole};
use common::process::{Lameduck, Node};
use common::{LIMIT, MOMENT};
use http::Method;

const SECOND: [&str; 2] = ["--body-timeout", "1s"];

/// How long data keeps moving: several times `--body-timeout`.
const LONG: Duration = Duration::from_millis(3500);

/// Repeats `step` for [`LONG`].
fn keep_on(mut step: impl FnMut()) {
    let begun = Instant::now();
    while begun.elapsed() < LONG {
        step();
        thread::sleep(MOMENT);
    }
}

#[test]
fn a_client_that_sends_nothing_while_its_answer_flows_is_not_silent() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &SECOND);
    let mut client = proxy.client();
    client.request("POST", "/", &["Content-Length: 5"]);
    let mut asked = app.asked();
    asked.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
    keep_on(|| {
        asked.send("1\r\nx\r\n");
        client.until("1\r\nx\r\n");
    });
    client.send("hello");
    assert_eq!(asked.take(5), "hello");
    asked.send("0\r\n\r\n");
    client.until("0\r\n\r\n");
}

#[test]
fn a_client_that_reads_nothing_while_its_request_flows_is_not_silent() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &SECOND);
    let mut client = Client::connect_narrow(proxy.listen);
    client.request("POST", "/", &["Content-Length: 1000000"]);
    let mut asked = app.asked();
    // More than the sockets can buffer.
    let length = 30_000_000;
    let pour = thread::spawn(move || {
        asked.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n"));
        asked.send(vec![b'x'; length]);
        asked
    });
    let head = client.head();
    keep_on(|| client.send("x"));
    let answer = client.body("POST", head);
    assert_eq!((answer.end, answer.body.len()), (End::Whole, length));
    drop(pour);
}

#[test]
fn a_client_that_still_takes_what_the_socket_holds_is_not_silent() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &SECOND);
    let mut client = Client::connect_narrow(proxy.listen);
    client.request("POST", "/", &["Content-Length: 5"]);
    let mut asked = app.asked();
    // The proxy has written everything before the client has read half of it.
    let length = 600_000;
    asked.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{}", length + 2, "x".repeat(length)));
    client.head();
    let (begun, mut read) = (Instant::now(), 0);
    while begun.elapsed() < LONG {
        read += client.take(40_000).len();
        thread::sleep(MOMENT);
    }
    assert!(read < length);
    client.take(length - read);
    client.send("hello");
    assert_eq!(asked.take(5), "hello");
    asked.send("ok");
    assert_eq!(client.take(2), b"ok");
}

#[test]
fn a_client_that_still_takes_an_early_answer_may_send_the_rest_after_it() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = Client::connect_narrow(proxy.listen);
    client.request("POST", "/", &["Content-Length: 10"]);
    client.send("hello");
    let mut asked = app.asked();
    let length = 600_000;
    asked.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{}", "x".repeat(length)));
    client.head();
    let (begun, mut read) = (Instant::now(), 0);
    // A client that stopped reading would be cut after five seconds.
    while begun.elapsed() < Duration::from_secs(7) {
        read += client.take(20_000).len();
        thread::sleep(MOMENT);
    }
    assert!(read < length);
    client.send("again");
    assert_eq!(asked.take(10), "helloagain");
    client.take(length - read);
}

#[test]
fn a_drain_does_not_wait_long_for_the_rest_of_a_request_that_was_answered() {
    let app = RawApp::start();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s"]);
    let mut client = proxy.client();
    client.request("POST", "/", &["Content-Length: 10"]);
    let mut asked = app.asked();
    asked.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.answer().text(), "ok");
    proxy.terminate();
    proxy.expect_clean_exit();
}

#[test]
fn an_app_that_has_answered_and_takes_no_more_ends_the_request() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("POST", "/", &["Content-Length: 100000000"]);
    let mut asked = app.asked();
    asked.send("HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno");
    assert_eq!(client.answer().text(), "no");
    let begun = Instant::now();
    while client.try_send(&[b'x'; 65536]).is_ok() {}
    assert!(begun.elapsed() < LIMIT);
    proxy.wait_in_flight(0);
}

#[test]
fn an_http2_connection_that_is_not_read_stays_while_uploads_come_in_over_it() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &SECOND);
    let mut raw = Raw::connect(proxy.listen);
    // The windows are as large as possible and the client reads nothing, so the socket fills up.
    raw.frame(SETTINGS, 0, 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff]);
    raw.frame(WINDOW_UPDATE, 0, 0, &0x7fff_0000u32.to_be_bytes());
    let upload = [&block("/upload", &[])[..]].concat();
    let post = [&[0x83][..], &upload[1..]].concat();
    raw.frame(HEADERS, 4, 1, &post);
    raw.frame(HEADERS, 5, 3, &block("/download?bytes=30000000", &[]));
    let mut sent = 0;
    keep_on(|| {
        assert!(raw.frame(DATA, 0, 1, b"x"), "the connection was closed");
        sent += 1;
    });
    assert_eq!(proxy.status().expect("alive")["in_flight"], 2, "a stream was cut");
    raw.frame(DATA, END_STREAM, 1, b"");
    let answer = std::iter::from_fn(|| raw.next()).find(|frame| frame.kind == DATA && frame.id == 1);
    let answer = String::from_utf8(answer.expect("an answer").payload).expect("text");
    assert!(answer.contains(&format!("\"bytes\":{sent}")), "{answer}");
}

#[test]
fn an_http2_client_that_sends_nothing_while_its_answer_flows_is_not_silent() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &SECOND);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let (answer, mut body) = peer.send(to(Method::POST, "/"), false).await;
        let mut asked = app.asked();
        asked.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        let mut answer = answer.await.expect("a head");
        let begun = Instant::now();
        while begun.elapsed() < LONG {
            asked.send("1\r\nx\r\n");
            assert_eq!(answer.body_mut().data().await.expect("some").expect("no reset"), "x");
            tokio::time::sleep(MOMENT).await;
        }
        body.send_data("".into(), true).expect("sent");
        assert_eq!(asked.take(5), "0\r\n\r\n");
        asked.send("0\r\n\r\n");
        assert_eq!(whole(answer).await.expect("whole").status, 200);
    });
}
