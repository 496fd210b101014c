//! A message that two parsers could read differently is refused, and nothing after it becomes a request.

use crate::common;

use common::app::{Answering, RawApp};
use common::http::Fill;
use common::process::{Lameduck, Node};

const SECOND: &str = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";

/// Sends a message and, right behind it, a second request; it must be refused.
fn refused(proxy: &Lameduck, app: &Answering, name: &str, request: &[u8]) {
    let mut client = proxy.client();
    client.send([request, SECOND.as_bytes()].concat());
    let answer = client.answer();
    assert!(matches!(answer.head.status, 400 | 501 | 505), "{name}: {:?} {}", answer.head, answer.text());
    assert!(answer.head.has("connection", "close"), "{name}");
    client.shutdown();
    let (rest, end) = client.read_to_end();
    assert_eq!((rest.as_slice(), end), (&b""[..], Fill::Fin), "{name}: something after the response");
    assert!(!app.seen().contains("/smuggled"), "{name}: the app saw {}", app.seen());
}

fn setting() -> (Answering, Lameduck) {
    let app = RawApp::start().answer_all("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let proxy = Lameduck::proxy(app.addr, &[]);
    (app, proxy)
}

#[test]
fn heads_that_leave_the_length_open_to_doubt() {
    let (app, proxy) = setting();
    let body = "5\r\nhello\r\n0\r\n\r\n";
    for lines in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 0",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5\r\ncontent-length: 5",
        "Content-Length: 5, 5",
        "Content-Length: +5",
        "Content-Length: -5",
        "Content-Length: 0x5",
        "Content-Length: 5 5",
        "Content-Length: 5a",
        "Content-Length: 5.0",
        "Content-Length:",
        "Content-Length: 99999999999999999999999",
        "Content-Length: 18446744073709551621",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding:",
        "Transfer-Encoding: \u{b}chunked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding\t: chunked",
        "Content-Length : 5",
        " Content-Length: 5",
        "X: y\r\n Transfer-Encoding: chunked",
        "X: y\r\n\tz",
        "Transfer-Encoding:\r\n chunked",
        "Transfer\u{0}-Encoding: chunked",
        "X: a\u{0}b",
        "X: a\rTransfer-Encoding: chunked",
        "X: a\nTransfer-Encoding: chunked",
        "X: a\r\r\nTransfer-Encoding: chunked",
        "no colon",
        ": no name",
        "X y: z",
    ] {
        let request = format!("POST /first HTTP/1.1\r\nHost: a\r\n{lines}\r\n\r\n{body}");
        refused(&proxy, &app, lines, request.as_bytes());
    }
    assert_eq!(app.seen(), "", "part of it reached the app");
}

#[test]
fn request_lines_and_hosts_open_to_doubt() {
    let (app, proxy) = setting();
    for head in [
        "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked",
        "GET / HTTP/1.1",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b",
        "GET / HTTP/1.1\r\nHost: a\r\nhost: a",
        "GET  / HTTP/1.1\r\nHost: a",
        "GET /  HTTP/1.1\r\nHost: a",
        "GET\t/ HTTP/1.1\r\nHost: a",
        "GET /a b HTTP/1.1\r\nHost: a",
        "GET / HTTP/1.1 \r\nHost: a",
        "GET /",
        "GET / http/1.1\r\nHost: a",
        "G@T / HTTP/1.1\r\nHost: a",
        "GET a HTTP/1.1\r\nHost: a",
        "GET * HTTP/1.1\r\nHost: a",
        "GET ftp://a/ HTTP/1.1\r\nHost: a",
        "GET http:///p HTTP/1.1\r\nHost: a",
        "GET http://user@a/ HTTP/1.1\r\nHost: a",
        "CONNECT a:80 HTTP/1.1\r\nHost: a",
        "GET /\u{0} HTTP/1.1\r\nHost: a",
        "GET / HTTP/1.1\nHost: a",
        "GET / HTTP/1.1\r\nHost: a\n",
    ] {
        refused(&proxy, &app, head, format!("{head}\r\n\r\n").as_bytes());
    }
    assert_eq!(app.seen(), "", "part of it reached the app");
}

#[test]
fn other_versions_are_refused() {
    let (app, proxy) = setting();
    for head in
        ["PRI * HTTP/2.0\r\n\r\nsm\r\n\r\n", "GET / HTTP/1.2\r\nHost: a\r\n\r\n", "GET / HTTP/3\r\n\r\n"]
    {
        let mut client = proxy.client();
        client.send(head);
        assert!(matches!(client.answer().head.status, 400 | 505), "{head}");
    }
    assert_eq!(app.seen(), "");
}

#[test]
fn chunks_open_to_doubt() {
    let (app, proxy) = setting();
    for body in [
        "5\nhello\r\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        " 5\r\nhello\r\n0\r\n\r\n",
        "5 a\r\nhello\r\n0\r\n\r\n",
        "\r\n5\r\nhello\r\n0\r\n\r\n",
        "g\r\nhello\r\n0\r\n\r\n",
        "ffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        "10000000000000005\r\nhello\r\n0\r\n\r\n",
        "00000000000000000000000000000005\r\nhello\r\n0\r\n\r\n",
        "5;a\nb\r\nhello\r\n0\r\n\r\n",
        "5;\u{0}\r\nhello\r\n0\r\n\r\n",
        "5;a\rb\r\nhello\r\n0\r\n\r\n",
        "0\r\nbad trailer\r\n\r\n",
        "0\r\n X: folded\r\n\r\n",
        "0\r\nX: a\nY: b\r\n\r\n",
        "0\r\nX : a\r\n\r\n",
    ] {
        let request = format!("POST /first HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        refused(&proxy, &app, body, request.as_bytes());
    }
    assert_eq!(
        app.seen(),
        "",
        "body bytes that came with the head must be checked before anything is sent to the app"
    );
}

#[test]
fn chunks_that_turn_bad_later_end_the_apps_connection_too() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("POST", "/first", &["Transfer-Encoding: chunked"]);
    client.send("5\r\nhello\r\n");
    let mut asked = app.asked();
    assert_eq!(asked.take(10), "5\r\nhello\r\n");
    client.send(format!("0\r\nX : y\r\n\r\n{SECOND}"));
    assert_eq!(client.answer().head.status, 400);
    client.expect_fin();
    assert_eq!(asked.rest(), "", "part of it, or another request, reached the app");
}

#[test]
fn long_extensions_and_trailers_are_refused() {
    let (app, proxy) = setting();
    let long = "x".repeat(20_000);
    for body in [format!("5;{long}\r\nhello\r\n0\r\n\r\n"), format!("0\r\nX: {long}\r\n\r\n")] {
        let mut client = proxy.client();
        client.request("POST", "/first", &["Transfer-Encoding: chunked"]);
        client.send(body);
        assert_eq!(client.answer().head.status, 400);
    }
    assert!(!app.seen().contains("x\r\n"), "the app saw the end of one: {}", app.seen());
}

#[test]
fn what_is_legal_though_odd_passes_and_is_one_request() {
    let (app, proxy) = setting();
    let mut client = proxy.client();
    for body in [
        "5;a=b;c=\"d\"\r\nhello\r\n0;e\r\nX: y\r\n\r\n",
        "5 ;a\r\nhello\r\n00\r\n\r\n",
        "0005\r\nhello\r\n0\r\n\r\n",
    ] {
        client.send(format!(
            "\r\nPOST /odd HTTP/1.1\r\nHost: a\r\ntransfer-ENCODING: \t CHUNKED \t\r\n\r\n{body}"
        ));
        assert_eq!(client.answer().head.status, 200, "{body:?}");
    }
    client.request("POST", "/odd", &["Content-Length: 0005"]);
    client.send("hello");
    assert_eq!(client.answer().head.status, 200);
    assert_eq!(app.seen().matches(" /odd HTTP/1.1\r\n").count(), 4);
}

#[test]
fn a_real_app_reads_what_passes_as_we_do() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    for (line, body) in [
        ("Transfer-Encoding: CHUNKED", "5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n"),
        ("Transfer-Encoding: chunked\r\nConnection: transfer-encoding", "5\r\nhello\r\n0\r\n\r\n"),
        ("Content-Length: 5\r\nConnection: content-length", "hello"),
    ] {
        client.send(format!("POST /upload HTTP/1.1\r\nHost: a\r\n{line}\r\n\r\n{body}"));
        let answer = client.answer();
        assert!(answer.text().contains("\"bytes\":5"), "{line}: {:?} {}", answer.head, answer.text());
    }
}
