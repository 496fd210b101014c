//! The request of a client that disconnects ends at once; a client that only shuts down its sending side gets its
//! response.

use crate::common;

use std::time::{Duration, Instant};

use common::MOMENT;
use common::app::{Asked, RawApp};
use common::http::{Client, End};
use common::process::{Lameduck, Node};

/// What "at once" means on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(1000);

/// A request that has reached the app, and its client.
fn asked(request: &str) -> (Asked, Client, Lameduck) {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.send(request);
    (app.asked(), client, proxy)
}

#[test]
fn the_app_sees_a_clients_close_at_once() {
    for (name, request) in [
        ("GET", "GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("POST", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"),
        ("sized upload", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhi"),
        ("chunked upload", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi"),
    ] {
        let (mut asked, client, proxy) = asked(request);
        drop(client);
        let begun = Instant::now();
        assert!(asked.ends_within(AT_ONCE), "{name}");
        eprintln!("{name}: {:?}", begun.elapsed());
        proxy.wait_in_flight(0);
    }
}

#[test]
fn the_app_sees_a_clients_reset_at_once() {
    let (mut asked, client, _proxy) = asked("GET / HTTP/1.0\r\nHost: a\r\n\r\n");
    client.reset();
    assert!(asked.ends_within(AT_ONCE));
}

#[test]
fn the_app_sees_a_close_between_two_parts_of_its_answer() {
    let (mut asked, mut client, _proxy) = asked("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    asked.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n");
    client.wait_seen("abc");
    drop(client);
    // Only a write shows whether a client that has shut down its side still reads.
    asked.send("3\r\ndef\r\n");
    assert!(asked.ends_within(AT_ONCE), "not ended by the first write after the close");
}

#[test]
fn the_app_sees_that_nobody_reads_its_events() {
    let (mut asked, mut client, _proxy) =
        asked("GET / HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n");
    asked.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n");
    client.wait_seen("data: 1");
    drop(client);
    assert!(asked.ends_within(AT_ONCE), "not ended although the app sends nothing more");
}

#[test]
fn a_real_app_sees_it_too() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/hang");
    let mut upload = proxy.client();
    upload.request("POST", "/upload", &["Content-Length: 100"]);
    upload.send("x");
    app.wait_active(2);
    drop(client);
    app.wait_active(1);
    drop(upload);
    app.wait_active(0);
    proxy.wait_in_flight(0);
}

#[test]
fn a_client_that_ends_its_own_side_gets_its_answer() {
    for version in ["1.1", "1.0"] {
        let request = format!("POST / HTTP/{version}\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi");
        let (mut asked, mut client, _proxy) = asked(&request);
        client.shutdown();
        assert!(!asked.ends_within(MOMENT));
        asked.send("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nanswer");
        let head = loop {
            match client.head() {
                interim if interim.status == 100 => {}
                head => break head,
            }
        };
        let answer = client.body("POST", head);
        assert_eq!((answer.text().as_str(), answer.end), ("answer", End::Whole));
        assert!(answer.head.has("connection", "close"));
        client.expect_fin();
    }
}

#[test]
fn pipelined_requests_before_a_half_close_are_all_answered() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/slow?ms=50");
    client.get("/slow?ms=20");
    client.shutdown();
    for ms in [50, 20] {
        let head = loop {
            match client.head() {
                interim if interim.status == 100 => {}
                head => break head,
            }
        };
        assert_eq!(client.body("GET", head).text(), format!("done after {ms} ms\n"));
    }
    client.expect_fin();
}

#[test]
fn an_upload_that_ends_too_soon_never_looks_whole_to_the_app() {
    let (mut asked, mut client, _proxy) =
        asked("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n");
    client.shutdown();
    assert_eq!(asked.rest(), "2\r\nhi\r\n");
}

#[test]
fn the_tunnel_of_a_client_that_leaves_ends() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("GET", "/", &["Connection: Upgrade", "Upgrade: other"]);
    let mut asked = app.asked();
    asked.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\nhi");
    assert_eq!(client.head().status, 101);
    client.until("hi");
    client.send("ho");
    assert_eq!(asked.take(2), "ho");
    drop(client);
    assert!(asked.ends_within(AT_ONCE));
    drop(asked);
    proxy.wait_in_flight(0);
}
