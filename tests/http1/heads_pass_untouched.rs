//! Heads are forwarded as sent: names, case, order, repetitions, `Host`. Only hop-by-hop fields are removed.

use crate::common;

use common::app::{Asked, RawApp};
use common::http::{Answer, Client, End};
use common::process::{Lameduck, Node};

const KEEP: [&str; 2] = ["--forwarded", "keep"];

/// Sends `request`; returns the app's side of it and the client's.
fn pass(args: &[&str], request: &str) -> (Asked, Client, Lameduck) {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, args);
    let mut client = proxy.client();
    client.send(request);
    (app.asked(), client, proxy)
}

/// The head that the app receives for this request.
fn forwarded(args: &[&str], request: &str) -> String {
    pass(args, request).0.head
}

/// The response that the client gets to `request` if the app sends these bytes.
fn answered(request: &str, method: &str, answer: &str) -> (Answer, Client, Lameduck) {
    let (mut asked, mut client, proxy) = pass(&[], request);
    asked.send(answer);
    asked.shutdown();
    let head = client.head();
    (client.body(method, head), client, proxy)
}

fn get(lines: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\n")
}

#[test]
fn names_case_order_and_repetition_are_kept() {
    let head = "GET /a%2Fb/../c?q=%20#f HTTP/1.1\r\nX-oDD-cASE: 1\r\nhost: App.Test:81\r\nx-r: one\r\nX-R: two\r\n\
                x-r: one\r\nX-Empty: \r\nCookie: a=b; c=d\r\nX-Latin: caf\u{e9}\r\n\r\n";
    assert_eq!(forwarded(&KEEP, head), head);
}

#[test]
fn an_answers_names_case_order_and_repetition_are_kept() {
    let (answer, ..) = answered(
        &get(""),
        "GET",
        "HTTP/1.1 299 Odd Reason\r\nX-oDD: 1\r\nset-cookie: a\r\nSet-Cookie: b\r\nDate: now\r\ncontent-LENGTH: 2\r\n\r\nhi",
    );
    let names: Vec<_> = answer.head.headers.iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(names, ["X-oDD=1", "set-cookie=a", "Set-Cookie=b", "Date=now", "content-LENGTH=2"]);
    assert_eq!((answer.head.status, answer.text().as_str()), (299, "hi"));
}

#[test]
fn a_real_app_sees_what_was_sent() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &KEEP);
    let mut client = proxy.client();
    client.request("GET", "/headers", &["X-oDD: 1", "x-R: a", "X-r: b"]);
    let answer = client.answer();
    assert_eq!(answer.text(), r#"["Host","app.test","X-oDD","1","x-R","a","X-r","b"]"#);
    let repeated = answer.head.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("x-repeated"));
    assert_eq!(
        repeated.map(|(n, v)| format!("{n}:{v}")).collect::<Vec<_>>(),
        ["X-Repeated:one", "x-repeated:two"]
    );
}

#[test]
fn what_belongs_to_one_hop_is_taken_out_of_a_request() {
    let request = get(
        "Connection: close, X-Mine\r\nX-Mine: 1\r\nKeep-Alive: timeout=9\r\nProxy-Connection: x\r\n\
                       x-mine: 2\r\nTE: trailers, gzip\r\nUpgrade: h2c\r\nconnection: X-Other\r\nX-Other: 3\r\nX-Stays: 4\r\n",
    );
    assert_eq!(
        forwarded(&KEEP, &request),
        get("X-Stays: 4\r\nConnection: TE\r\nTE: trailers\r\n"),
        "only `TE: trailers`, which the proxy supports itself, is sent again"
    );
}

#[test]
fn connection_cannot_take_out_what_the_message_means() {
    let sent = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Type: b\r\nX-Forwarded-For: 9.9.9.9\r\n\
                Connection: host, content-length, content-type, x-forwarded-for\r\n\r\nhi";
    let head = forwarded(&[], sent);
    for line in ["Host: a", "Content-Length: 2", "Content-Type: b", "X-Forwarded-For: 9.9.9.9, 127.0.0.1"] {
        assert!(head.contains(&format!("\r\n{line}\r\n")), "{line} is gone from {head}");
    }
    let (mut asked, ..) = pass(
        &KEEP,
        "POST / HTTP/1.1\r\nHost: a\r\nConnection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    );
    assert!(asked.has_line("Transfer-Encoding: chunked"), "the body would become a request: {}", asked.head);
    assert_eq!(asked.take(5), "0\r\n\r\n");
}

#[test]
fn what_belongs_to_one_hop_is_taken_out_of_an_answer() {
    let (answer, ..) = answered(
        &get(""),
        "GET",
        "HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Mine\r\nKeep-Alive: timeout=5\r\nX-Mine: 1\r\nX-Stays: 2\r\n\
         Upgrade: h2c\r\nContent-Length: 0\r\n\r\n",
    );
    let names: Vec<_> = answer.head.headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["X-Stays", "Content-Length"]);
}

#[test]
fn an_upgrade_to_http2_is_not_passed_on_however_it_is_written() {
    for upgrade in ["Upgrade: h2c", "Upgrade: websocket, H2C", "Upgrade: h2c\r\nUpgrade: x"] {
        let head = forwarded(&KEEP, &get(&format!("Connection: Upgrade\r\n{upgrade}\r\n")));
        assert!(!head.to_lowercase().contains("h2c"), "{head}");
    }
}

#[test]
fn an_absolute_target_names_the_host_and_becomes_a_path() {
    for (target, path) in [
        ("GET http://real.test:81/p?q", "GET /p?q"),
        ("GET http://real.test:81", "GET /"),
        ("GET HTTP://real.test:81?q", "GET /?q"),
        ("OPTIONS http://real.test:81", "OPTIONS *"),
    ] {
        let head = forwarded(&KEEP, &format!("{target} HTTP/1.1\r\nHost: other.test\r\nA: b\r\n\r\n"));
        assert_eq!(head, format!("{path} HTTP/1.1\r\nA: b\r\nHost: real.test:81\r\n\r\n"));
    }
    assert_eq!(
        forwarded(&KEEP, "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"),
        "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"
    );
}

#[test]
fn an_http_1_0_client_is_served_in_its_own_way() {
    let (answer, mut client, _proxy) = answered(
        "GET / HTTP/1.0\r\n\r\n",
        "GET",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nA: b\r\n\r\n",
    );
    assert_eq!(
        (answer.text().as_str(), answer.end),
        ("hi", End::UntilClose),
        "no chunks, no interim answers"
    );
    assert!(answer.head.has("connection", "close") && !answer.head.has("transfer-encoding", "chunked"));
    client.expect_fin();
}

#[test]
fn a_request_without_a_host_gets_the_host_of_the_readiness_checks() {
    let app = RawApp::start();
    let port = app.addr.port();
    for upstream in [format!("127.0.0.1:{port}"), format!("localhost:{port}")] {
        let args = [&KEEP[..], &["--ready-check", "/healthz"]].concat();
        let proxy = Lameduck::proxy_to(&upstream, &args);
        let probe = app.asked();
        assert!(probe.head.contains(&format!("\r\nhost: {upstream}\r\n")), "{}", probe.head);
        let mut client = proxy.client();
        client.send("GET / HTTP/1.0\r\nX-A: b\r\n\r\n");
        let asked = loop {
            let asked = app.asked();
            if asked.head.starts_with("GET / ") {
                break asked;
            }
        };
        assert_eq!(asked.head, format!("GET / HTTP/1.1\r\nX-A: b\r\nHost: {upstream}\r\n\r\n"));
    }
    // An empty `Host` was sent by the client, so it stays.
    assert_eq!(forwarded(&KEEP, "GET / HTTP/1.0\r\nHost: \r\n\r\n"), "GET / HTTP/1.1\r\nHost: \r\n\r\n");
}

#[test]
fn an_app_makes_a_url_of_what_it_gets_as_host() {
    let script = "require('node:http').createServer((req, res) => res.end(new URL(req.url, 'http://' + req.headers.host)
                  .href)).listen(process.env.PORT, () => console.log('up'))";
    let run = Lameduck::run(&[], &["node", "-e", script]);
    for (request, host) in [
        ("GET /x HTTP/1.0\r\n\r\n", "http://localhost:"),
        ("GET /x HTTP/1.0\r\nHost: a\r\n\r\n", "http://a/"),
    ] {
        let mut client = run.client();
        client.send(request);
        let answer = client.answer();
        assert!(answer.text().starts_with(host) && answer.text().ends_with("/x"), "{}", answer.text());
    }
}

#[test]
fn a_reason_phrase_may_be_in_any_language() {
    for reason in [&b"caf\xe9"[..], "Nicht gefunden: \u{20ac}".as_bytes(), b"", b"plain"] {
        let (mut asked, mut client, _proxy) = pass(&[], &get(""));
        asked.send([b"HTTP/1.1 404 ", reason, b"\r\nX-A: b\r\nContent-Length: 0\r\n\r\n"].concat());
        let wanted = [b"HTTP/1.1 404 ", reason, b"\r\nX-A: b\r\n"].concat();
        assert_eq!(client.take(wanted.len()), wanted);
    }
}

#[test]
fn a_426_says_that_its_connection_closes() {
    for (request, connection) in [
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "Upgrade"),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "Upgrade, close"),
        ("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "Upgrade, keep-alive"),
    ] {
        let (mut asked, mut client, _proxy) = pass(&[], request);
        asked.send("HTTP/1.1 426 Upgrade Required\r\nUpgrade: TLS/1.2\r\nContent-Length: 0\r\n\r\n");
        let head = client.head();
        assert_eq!((head.header("connection"), head.header("upgrade")), (Some(connection), Some("TLS/1.2")));
        if connection == "Upgrade, close" {
            client.expect_fin();
        }
    }
}

#[test]
fn an_http_1_0_client_that_asks_for_it_keeps_its_connection() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    for _ in 0..2 {
        client.send("GET /headers HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n");
        client.until("\r\n\r\n");
        let (rest, _) = client.read_to_end();
        assert!(!rest.is_empty(), "a body of unknown length ends with the connection");
        client = proxy.client();
    }
    for _ in 0..2 {
        client.send("GET /download?bytes=3 HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n");
        let answer = client.answer();
        assert!(answer.head.has("connection", "keep-alive"), "{:?}", answer.head);
        assert_eq!(answer.text(), "abc");
    }
}

#[test]
fn answers_without_a_body_have_none_and_the_connection_goes_on() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("HEAD", "/download?bytes=12345", &[]);
    let head = client.head();
    assert_eq!((head.status, head.header("content-length")), (200, Some("12345")));
    for status in [204, 304] {
        client.get(&format!("/empty?status={status}"));
        let head = client.head();
        assert_eq!((head.status, head.header("etag")), (status, Some("\"1\"")));
        assert!(head.header("transfer-encoding").is_none() && head.header("content-length").is_none());
    }
    client.get("/");
    assert_eq!(client.answer().head.status, 200);
}

#[test]
fn an_answer_to_head_or_304_tells_the_length_of_what_it_leaves_out() {
    for (request, answer) in [
        ("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"),
        ("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n"),
    ] {
        let (answer, mut client, _proxy) = answered(request, "HEAD", answer);
        assert!(answer.head.headers.len() == 1, "{:?}", answer.head);
        assert!(
            client.is_quiet_for(std::time::Duration::from_millis(50)),
            "neither a body nor a close follows"
        );
    }
}
