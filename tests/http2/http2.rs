//! HTTP/2 on the data port: each stream is handled like any other request.

use crate::common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::app::RawApp;
use common::http::{Client, End};
use common::http2::{CANCEL, HEADERS, INTERNAL_ERROR, NO_ERROR, Peer, Raw, block, run, to, upload, whole};
use common::process::{Lameduck, Node};
use common::{MOMENT, wait_for};
use h2::client;
use http::{HeaderMap, HeaderValue, Method};

const MIB: usize = 1024 * 1024;
/// What "at once" means on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(1000);

fn code(error: h2::Error) -> Option<u32> {
    error.reason().map(u32::from)
}

#[test]
fn both_versions_are_served_on_one_port() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let url = format!("http://{}/", proxy.listen);
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let shown =
            Command::new("curl").args(["-sSw", "%{http_version} %{http_code}", version, &url]).output();
        let shown = shown.expect("curl starts");
        let text = String::from_utf8_lossy(&shown.stdout).into_owned();
        let ends = if version == "--http1.1" { "1.1 200" } else { "2 200" };
        assert!(text.starts_with("hello") && text.ends_with(ends), "{text}{shown:?}");
    }
}

#[test]
fn the_preface_may_come_in_pieces_and_is_no_other_request() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--head-timeout", "1s"]);
    let mut raw = Raw::bare(proxy.listen);
    for byte in b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" {
        raw.send(&[*byte]);
        std::thread::sleep(Duration::from_millis(5));
    }
    raw.frame(common::http2::SETTINGS, 0, 0, b"");
    raw.frame(HEADERS, 5, 1, &block("/", &[]));
    assert!(raw.wait(HEADERS).is_some());

    // POST, PUT and PATCH begin with the same byte.
    let mut client = proxy.client();
    client.send("P");
    std::thread::sleep(Duration::from_millis(50));
    client.send("OST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi");
    assert_eq!(client.answer().text(), "hi");
    // The preface is not accepted as a later request: an attacker who smuggles it in would control a connection.
    client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    assert_eq!(client.answer().head.status, 505);
    for (begun, status) in [("PRI * HTTP/2.0\r\n\r\n", 408), ("PRI * HTTP/2.0\r\n\r\nXY", 505), ("PRI", 408)]
    {
        let mut client = proxy.client();
        client.send(begun);
        assert_eq!(client.answer().head.status, status, "{begun:?}");
    }
}

#[test]
fn streams_run_side_by_side() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let begun = Instant::now();
        let mut answers = vec![];
        for _ in 0..50 {
            answers.push(peer.send(to(Method::GET, "/slow?ms=500"), true).await.0);
        }
        proxy.wait_in_flight(50);
        assert_eq!(proxy.status().expect("alive")["connections"], 1);
        for answer in answers {
            assert_eq!(
                whole(answer.await.expect("answered")).await.expect("whole").text(),
                "done after 500 ms\n"
            );
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        proxy.wait_in_flight(0);
        assert_eq!(proxy.metric("lameduck_requests_total{code=\"2xx\"}"), 50.0);
    });
}

#[test]
fn the_app_gets_a_request_of_http_1_1() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let mut request = to(Method::POST, "/a?b=c");
        let fields = request.headers_mut();
        for (name, value) in
            [("cookie", "a=1"), ("x", "1"), ("cookie", "b=2"), ("x", "2"), ("te", "trailers")]
        {
            fields.append(name, HeaderValue::from_static(value));
        }
        let (answer, mut body) = peer.send(request, false).await;
        body.send_data("hello".into(), false).expect("sent");
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", HeaderValue::from_static("7"));
        body.send_trailers(trailers).expect("sent");
        let mut asked = app.asked();
        assert!(asked.head.starts_with("POST /a?b=c HTTP/1.1\r\nHost: app.test\r\n"), "{}", asked.head);
        for line in ["x: 1", "x: 2", "Cookie: a=1; b=2", "X-Forwarded-For: 127.0.0.1", "TE: trailers"] {
            assert!(asked.has_line(line), "{line}: {}", asked.head);
        }
        let coded = "5\r\nhello\r\n0\r\nx-sum: 7\r\n\r\n";
        assert_eq!(asked.take(coded.len()), coded);
        asked.send("HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n");
        asked.send("HTTP/1.1 200 Fine\r\nTransfer-Encoding: chunked\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nConnection: X\r\nX: 1\r\n\r\n");
        asked.send("2\r\nhi\r\n0\r\nX-End: 9\r\n\r\n");
        let answer = whole(answer.await.expect("answered")).await.expect("whole");
        assert_eq!((answer.status, answer.text().as_str()), (200, "hi"));
        assert_eq!(answer.headers.get_all("set-cookie").iter().count(), 2);
        assert!(!answer.headers.contains_key("x") && !answer.headers.contains_key("connection"));
        assert_eq!(answer.trailers.expect("trailers")["x-end"], "9");
    });
}

#[test]
fn interim_answers_and_answers_without_a_body_pass() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        for (method, head, status, length) in [
            (Method::HEAD, "200 OK\r\nContent-Length: 5", 200, Some("5")),
            (Method::GET, "204 No Content", 204, None),
            (Method::GET, "304 Not Modified\r\nContent-Length: 5", 304, Some("5")),
        ] {
            let (mut answer, _) = peer.send(to(method, "/"), true).await;
            let mut asked = app.asked();
            asked.send(format!("HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\nHTTP/1.1 {head}\r\n\r\n"));
            let hints = std::future::poll_fn(|cx| answer.poll_informational(cx)).await;
            assert_eq!(hints.expect("hints").expect("hints").status(), 103);
            let answer = whole(answer.await.expect("answered")).await.expect("whole");
            assert_eq!((answer.status, answer.body.len()), (status, 0));
            assert_eq!(answer.headers.get("content-length").map(|v| v.to_str().expect("text")), length);
            asked.reset();
        }
    });
}

#[test]
fn bodies_pass_both_ways_in_constant_memory() {
    const SIZE: usize = 256 * MIB;
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    run(async {
        let mut builder = client::Builder::new();
        builder.initial_window_size(1 << 20).initial_connection_window_size(1 << 20);
        let peer = Peer::connect_as(proxy.listen, &builder).await;
        let (answer, mut body) = peer.send(to(Method::POST, "/upload"), false).await;
        upload(&mut body, vec![7; SIZE].into(), true).await.expect("sent");
        let answer = whole(answer.await.expect("answered")).await.expect("whole");
        assert!(answer.text().contains(&format!("\"bytes\":{SIZE}")), "{}", answer.text());
        let answer = peer.get(&format!("/download?bytes={SIZE}")).await.expect("whole");
        assert_eq!(answer.body.len(), SIZE);
    });
    assert!(proxy.peak_memory() < 48 * 1024, "{} KiB", proxy.peak_memory());
}

#[test]
fn a_client_that_takes_nothing_holds_up_only_its_own_stream() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--body-timeout", "2s"]);
    run(async {
        let mut builder = client::Builder::new();
        builder.initial_window_size(1000).initial_connection_window_size(1 << 20);
        let peer = Peer::connect_as(proxy.listen, &builder).await;
        let stuck = peer.send(to(Method::GET, "/download?bytes=100000000"), true).await.0;
        let mut stuck = stuck.await.expect("a head").into_body();
        assert_eq!(stuck.data().await.expect("some").expect("some").len(), 1000);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(1) {
            assert_eq!(peer.get("/").await.expect("whole").status, 200);
        }
        // The stream is cut when nothing has moved for --body-timeout.
        let cut = stuck.data().await.expect("an end").expect_err("no clean one");
        assert_eq!(code(cut), Some(CANCEL));
        assert_eq!(peer.get("/").await.expect("whole").status, 200);
        proxy.wait_in_flight(0);
    });
    assert!(proxy.peak_memory() < 40 * 1024, "{} KiB", proxy.peak_memory());
}

#[test]
fn a_slow_upload_that_moves_is_not_cut_and_one_that_stands_still_is() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--body-timeout", "1s"]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let (answer, mut body) = peer.send(to(Method::POST, "/upload"), false).await;
        for _ in 0..5 {
            body.send_data("x".into(), false).expect("sent");
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
        body.send_data("".into(), true).expect("sent");
        let answer = whole(answer.await.expect("answered")).await.expect("whole");
        assert!(answer.text().contains("\"bytes\":5"), "{}", answer.text());
        let (answer, _body) = peer.send(to(Method::POST, "/upload"), false).await;
        assert_eq!(answer.await.expect("answered").status(), 408);
    });
}

#[test]
fn the_app_sees_a_clients_reset_at_once() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        for end in [true, false] {
            let (answer, mut body) = peer.send(to(Method::POST, "/"), end).await;
            let mut asked = app.asked();
            body.send_reset(h2::Reason::CANCEL);
            assert!(asked.ends_within(AT_ONCE), "request over: {end}");
            drop(answer);
        }
        // The client resets in the middle of the response.
        let answer = peer.send(to(Method::GET, "/"), true).await.0;
        let mut asked = app.asked();
        asked.send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc");
        drop(answer.await.expect("a head"));
        assert!(asked.ends_within(AT_ONCE), "not ended in the middle of the response");
        proxy.wait_in_flight(0);
        assert_eq!(proxy.metric("lameduck_requests_ended_total{ended=\"client-gone\"}"), 3.0);
        // The end of a connection ends all its streams.
        let _answer = peer.send(to(Method::GET, "/"), true).await.0;
        let mut asked = app.asked();
        let mut raw = Raw::connect(proxy.listen);
        raw.frame(HEADERS, 5, 1, &block("/", &[]));
        let mut other = app.asked();
        drop(raw);
        assert!(other.ends_within(AT_ONCE), "not ended with its connection");
        assert!(!asked.ends_within(MOMENT), "another client's request ended too");
    });
}

#[test]
fn an_app_that_dies_in_its_answer_gives_no_clean_end() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        for part in ["Content-Length: 9\r\n\r\nabc", "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"] {
            let answer = peer.send(to(Method::GET, "/"), true).await.0;
            let mut asked = app.asked();
            asked.send(format!("HTTP/1.1 200 OK\r\n{part}"));
            let answer = answer.await.expect("a head");
            asked.reset();
            assert_eq!(code(whole(answer).await.expect_err("cut")), Some(INTERNAL_ERROR), "{part}");
        }
        let answer = peer.send(to(Method::POST, "/"), true).await.0;
        app.asked().reset();
        assert_eq!(answer.await.expect("answered").status(), 502);
    });
}

#[test]
fn an_early_answer_is_whole_and_its_request_is_reset_without_an_error() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let (answer, mut body) = peer.send(to(Method::POST, "/"), false).await;
        body.send_data("part".into(), false).expect("sent");
        let mut asked = app.asked();
        asked.send("HTTP/1.1 413 No\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno");
        asked.reset();
        let answer = whole(answer.await.expect("answered")).await.expect("whole");
        assert_eq!((answer.status, answer.text().as_str()), (413, "no"));
        let reset = std::future::poll_fn(|cx| body.poll_reset(cx)).await.expect("a reset");
        assert_eq!(u32::from(reset), NO_ERROR);
    });
}

#[test]
fn large_heads_pass_and_larger_ones_get_431() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--max-head", "64KiB"]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let with = |bytes: usize| {
            let mut request = to(Method::GET, "/");
            let value = HeaderValue::from_bytes(&vec![b'x'; bytes]).expect("a value");
            request.headers_mut().insert("x-large", value);
            request
        };
        // Node itself takes 16 KiB.
        assert_eq!(peer.ask(with(12 * 1024)).await.expect("whole").status, 200);
        assert_eq!(peer.ask(with(70 * 1024)).await.expect("whole").status, 431);
        assert_eq!(peer.get("/").await.expect("whole").status, 200, "the connection stays open");
    });
}

#[test]
fn streams_past_the_bound_are_refused() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--max-streams", "2"]);
    let mut raw = Raw::connect(proxy.listen);
    for id in [1, 3, 5] {
        raw.frame(HEADERS, 5, id, &block("/slow?ms=1000", &[]));
    }
    let refused = raw.wait(common::http2::RST_STREAM).expect("a reset");
    assert_eq!((refused.id, refused.code()), (5, common::http2::REFUSED_STREAM));
    let mut answered: Vec<_> = [0; 2].map(|_| raw.wait(HEADERS).expect("an answer").id).into();
    answered.sort_unstable();
    assert_eq!(answered, [1, 3]);
}

#[test]
fn an_idle_connection_is_closed_in_time() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--idle-timeout", "2s"]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        assert_eq!(
            peer.get("/slow?ms=3000").await.expect("whole").status,
            200,
            "a busy connection stays open"
        );
        let begun = Instant::now();
        wait_for("the connection's end", || peer.has_ended().then_some(()));
        assert!(begun.elapsed() > Duration::from_millis(1500), "{:?}", begun.elapsed());
    });
    // A connection that is parked before its first byte may still become HTTP/2.
    let mut raw = Raw::bare(proxy.listen);
    std::thread::sleep(Duration::from_millis(1500));
    raw.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    raw.frame(common::http2::SETTINGS, 0, 0, b"");
    raw.frame(HEADERS, 5, 1, &block("/", &[]));
    assert!(raw.wait(HEADERS).is_some());
}

#[test]
fn requests_are_held_while_the_app_restarts_and_seen_in_the_ledger() {
    let mut app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        assert_eq!(peer.get("/").await.expect("whole").status, 200);
        app.process.kill();
        let answer = peer.send(to(Method::GET, "/later?secret=1"), true).await.0;
        proxy.wait_in_flight(1);
        let ledger = Client::unix(&proxy.control).and_then(|client| client.try_ask("/ledger", &[]));
        let ledger = ledger.expect("an answer");
        assert!(
            ledger.end == End::Whole && ledger.text().contains("\"path\":\"/later\""),
            "{}",
            ledger.text()
        );
        let _app = Node::held_at(app.addr.port());
        assert_eq!(whole(answer.await.expect("answered")).await.expect("whole").status, 200);
    });
}
