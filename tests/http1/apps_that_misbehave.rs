//! An app that sends invalid responses, hangs or dies costs its client one clear error or a visible cut, and no other
//! client anything.

use crate::common;

use std::time::Duration;

use common::MOMENT;
use common::app::{Asked, RawApp};
use common::http::{Answer, Client, End};
use common::process::Lameduck;

/// Sends a GET to an app that then does what `behave` does; returns the client's response and its connection.
fn get(behave: impl FnOnce(Asked)) -> (Answer, Client) {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--max-head", "8KiB"]);
    let mut client = proxy.client();
    client.get("/");
    behave(app.asked());
    let answer = client.answer();
    // The next request is served in any case, on a new connection to the app.
    let mut next = proxy.client();
    next.get("/next");
    app.asked().send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(next.answer().head.status, 204);
    (answer, client)
}

fn expect_502(name: &str, behave: impl FnOnce(Asked)) {
    let (answer, mut client) = get(behave);
    assert_eq!((answer.head.status, answer.end), (502, End::Whole), "{name}: {}", answer.text());
    assert!(answer.head.has("connection", "close") && answer.text().starts_with("lameduck: "), "{name}");
    client.expect_fin();
}

#[test]
fn heads_that_cannot_be_read_get_502() {
    for bytes in [
        "hello, I am no HTTP\r\n\r\n",
        "\u{0}\u{1}\u{2}\u{3}",
        "HTTP/2.0 200 OK\r\n\r\n",
        "HTTP/1.1 20 OK\r\n\r\n",
        "HTTP/1.1 099 No\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 abc\r\n\r\n",
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX : y\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: a\r\n folded\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: a\u{0}b\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    ] {
        expect_502(bytes, |mut asked| asked.send(bytes));
    }
}

#[test]
fn heads_past_the_bound_get_502() {
    let line = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(9000));
    expect_502("an endless line", |mut asked| asked.send(&line));
    expect_502("a long line", |mut asked| asked.send(line.clone() + "\r\nContent-Length: 0\r\n\r\n"));
    let fields = format!("HTTP/1.1 200 OK\r\n{}\r\n", "X:\r\n".repeat(2001));
    expect_502("too many fields", |mut asked| asked.send(&fields));
}

#[test]
fn interim_answers_without_end_get_502() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/");
    let mut asked = app.asked();
    asked.send("HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n".repeat(1000));
    let mut interim = 0;
    let last = loop {
        match client.head() {
            head if head.status == 103 => interim += 1,
            head => break head,
        }
    };
    assert_eq!((last.status, interim), (502, 64));
}

#[test]
fn a_101_that_nobody_asked_for_gets_502() {
    expect_502("101", |mut asked| {
        asked.send(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nGET / HTTP/1.1\r\n",
        );
    });
}

#[test]
fn a_close_before_the_answer_is_whole_in_its_head_gets_502() {
    expect_502("nothing", drop);
    expect_502("a reset", Asked::reset);
    expect_502("a part of the head", |mut asked| asked.send("HTTP/1.1 200 OK\r\nContent-Le"));
    expect_502("only an interim answer", |mut asked| asked.send("HTTP/1.1 102 Processing\r\n"));
}

#[test]
fn a_close_within_the_body_is_a_visible_cut() {
    for (name, bytes) in [
        ("sized", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"),
        ("chunked", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc"),
        ("between chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"),
        (
            "before the last empty line",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
        ),
    ] {
        for reset in [false, true] {
            let app = RawApp::start();
            let proxy = Lameduck::proxy(app.addr, &[]);
            let mut client = proxy.client();
            client.get("/");
            let mut asked = app.asked();
            asked.send(bytes);
            client.wait_seen("abc");
            if reset {
                asked.reset();
            } else {
                drop(asked);
            }
            let head = client.head();
            assert_eq!(client.body("GET", head).end, End::CutByRst, "{name}, reset: {reset}");
        }
    }
}

#[test]
fn a_reset_is_no_clean_end_of_a_body_that_ends_with_the_connection() {
    for version in ["1.1", "1.0"] {
        let app = RawApp::start();
        let proxy = Lameduck::proxy(app.addr, &[]);
        let mut client = proxy.client();
        client.send(format!("GET / HTTP/{version}\r\nHost: a\r\n\r\n"));
        let mut asked = app.asked();
        asked.send("HTTP/1.0 200 OK\r\n\r\nabc");
        client.wait_seen("abc");
        asked.reset();
        let head = client.head();
        assert_eq!(client.body("GET", head).end, End::CutByRst);
    }
}

#[test]
fn chunks_that_cannot_be_read_are_a_visible_cut() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/");
    let mut asked = app.asked();
    asked.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n");
    client.wait_seen("abc\r\n");
    asked.send("0\r\nno trailer\r\n\r\n");
    let head = client.head();
    assert_eq!(client.body("GET", head).end, End::CutByRst);
}

#[test]
fn an_answer_with_both_lengths_is_read_by_its_chunks_and_ends_the_apps_connection() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/");
    let mut asked = app.asked();
    asked.send(
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    );
    let answer = client.answer();
    assert_eq!((answer.text().as_str(), answer.head.header("content-length")), ("hi", None));
    assert!(asked.ends_within(Duration::from_secs(2)), "its connection is not used again");
    client.get("/second");
    assert!(app.asked().head.starts_with("GET /second "));
}

#[test]
fn bytes_after_an_answer_never_become_the_next_one() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--threads", "1"]);
    let evil = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
    let mut client = proxy.client();
    client.get("/");
    let mut asked = app.asked();
    asked.send(format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok{evil}"));
    assert_eq!(client.answer().text(), "ok");
    assert!(asked.ends_within(Duration::from_secs(2)), "at once");

    client.get("/");
    let mut asked = app.asked();
    asked.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    assert_eq!(client.answer().text(), "ok");
    asked.send(evil);
    assert_eq!(asked.rest(), "", "closed while idle");
    client.get("/third");
    let mut asked = app.asked();
    assert!(asked.head.starts_with("GET /third "));
    asked.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood");
    assert_eq!(client.answer().text(), "good");

    client.request("HEAD", "/", &[]);
    asked.next();
    asked.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil");
    assert_eq!(client.head().status, 200);
    assert_eq!(asked.rest(), "", "closed because of the body");
    assert!(client.is_quiet_for(MOMENT));
}

#[test]
fn an_app_that_hangs_is_waited_for_and_its_client_may_leave() {
    let app = RawApp::start();
    let proxy =
        Lameduck::proxy(app.addr, &["--body-timeout", "1s", "--head-timeout", "1s", "--idle-timeout", "1s"]);
    let mut client = proxy.client();
    client.get("/");
    let mut asked = app.asked();
    asked.send("HTTP/1.1 200");
    assert!(
        client.is_quiet_for(MOMENT * 6),
        "the app's response has no time limit, not even within its head"
    );
    drop(client);
    assert_eq!(asked.rest(), "");
    proxy.wait_in_flight(0);
}

#[test]
fn an_answer_followed_by_the_apps_close_is_whole() {
    for close in ["", "Connection: close\r\n"] {
        let (answer, _client) =
            get(|mut asked| asked.send(format!("HTTP/1.1 200 OK\r\n{close}Content-Length: 2\r\n\r\nok")));
        assert_eq!((answer.text().as_str(), answer.end), ("ok", End::Whole));
        assert_eq!(answer.head.header("connection"), None, "it concerns only the connection to the app");
    }
}

#[test]
fn an_app_that_answers_and_closes_while_the_client_uploads_is_heard() {
    for reset in [false, true] {
        let app = RawApp::start();
        let proxy = Lameduck::proxy(app.addr, &[]);
        let mut client = proxy.client();
        client.request("POST", "/", &["Content-Length: 30000000"]);
        client.send(vec![b'x'; 1000]);
        let mut asked = app.asked();
        asked.take(1000);
        asked.send("HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno");
        client.wait_seen("no");
        if reset {
            asked.reset();
        } else {
            drop(asked);
        }
        for _ in 0..20 {
            if client.try_send(&[b'x'; 100_000]).is_err() {
                break;
            }
        }
        let answer = client.answer();
        assert_eq!((answer.head.status, answer.text().as_str(), answer.end), (413, "no", End::Whole));
        proxy.wait_in_flight(0);
        assert!(!proxy.process.output().contains("panicked"), "{}", proxy.process.output());
    }
}

#[test]
fn an_answer_is_heard_though_the_upload_failed_before_it_was_read() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("POST", "/", &["Content-Length: 1000000"]);
    client.send("x");
    let mut asked = app.asked();
    asked.take(1);
    // While the proxy is stopped, more of the upload arrives, and a response followed by a reset.
    proxy.pause();
    asked.send("HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno");
    asked.reset();
    client.send("x");
    proxy.unpause();
    let answer = client.answer();
    assert_eq!((answer.head.status, answer.text().as_str(), answer.end), (413, "no", End::Whole));
    client.expect_fin();
    assert!(!proxy.process.output().contains("panicked"), "{}", proxy.process.output());
}

#[test]
fn the_rest_of_an_answered_upload_is_not_waited_for_long() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("POST", "/", &["Content-Length: 10"]);
    client.send("x");
    let mut asked = app.asked();
    asked.send("HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno");
    assert_eq!(client.answer().head.status, 413);
    client.send("x");
    asked.take(2);
    assert!(asked.ends_within(Duration::from_secs(8)), "well before --body-timeout");
    proxy.wait_in_flight(0);
}

#[test]
fn an_app_that_dies_while_the_client_uploads_is_a_502() {
    for length in ["Content-Length: 30000000", "Transfer-Encoding: chunked"] {
        let app = RawApp::start();
        let proxy = Lameduck::proxy(app.addr, &[]);
        let mut client = proxy.client();
        client.request("PUT", "/", &[length]);
        client.send("3e8\r\n");
        let mut asked = app.asked();
        asked.take(5);
        asked.reset();
        let answer = client.answer();
        assert_eq!((answer.head.status, answer.end), (502, End::Whole));
        client.expect_fin();
    }
}

#[test]
fn an_answer_that_was_there_before_the_request_is_taken_and_its_connection_is_not_used_again() {
    let app = RawApp::greeting(b"HTTP/1.1 503 Full\r\nContent-Length: 4\r\nConnection: close\r\n\r\nfull");
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/");
    let answer = client.answer();
    assert_eq!((answer.head.status, answer.text().as_str()), (503, "full"));
    client.get("/again");
    assert_eq!(client.answer().text(), "full", "from a new connection, which begins with the same greeting");
}
