//! Bodies are streamed in both directions as they arrive, in constant memory, with all fields and trailers around them.

use crate::common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use common::app::RawApp;
use common::http::End;
use common::process::{Lameduck, Node};
use common::{MOMENT, wait_for};

const MIB: usize = 1024 * 1024;

#[test]
fn a_body_comes_back_chunked_and_sized() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("POST", "/echo", &["Content-Length: 5"]);
    client.send("hello");
    let answer = client.answer();
    assert_eq!((answer.text().as_str(), answer.end), ("hello", End::Whole));
    let mut client = proxy.client();
    client.request("POST", "/echo", &["Transfer-Encoding: chunked"]);
    for piece in ["one", "two"] {
        client.send(format!("3\r\n{piece}\r\n"));
        assert!(client.until(&format!("{piece}\r\n")).contains("3\r\n"), "forwarded at once");
    }
    client.send("0\r\n\r\n");
    assert_eq!(client.until("0\r\n\r\n"), "0\r\n\r\n");
}

#[test]
fn trailers_pass_both_ways() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("POST", "/", &["Transfer-Encoding: chunked", "Trailer: X-Sum"]);
    let mut asked = app.asked();
    let body = "2;a=\"b\"\r\nhi\r\n0\r\nX-Sum: 1\r\nx-sum: 2\r\n\r\n";
    client.send(body);
    assert_eq!(asked.take(body.len()), body);
    asked.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-End\r\n\r\n2\r\nhi\r\n0\r\nX-End: 9\r\n\r\n");
    let answer = client.answer();
    assert_eq!((answer.text().as_str(), answer.end), ("hi", End::Whole));
    assert_eq!(answer.trailers, [("X-End".to_owned(), "9".to_owned())]);
    assert_eq!(answer.head.header("trailer"), Some("X-End"));
    client.get("/again");
    assert!(asked.next().starts_with("GET /again "), "both connections stay open");
}

#[test]
fn a_client_that_waits_for_100_gets_it_from_the_app() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("POST", "/upload", &["Content-Length: 3", "Expect: 100-continue"]);
    assert_eq!(client.head().status, 100);
    client.send("abc");
    let answer = client.answer();
    assert_eq!(answer.head.status, 200);
    assert!(answer.text().contains("\"bytes\":3"), "{}", answer.text());
}

#[test]
fn early_hints_come_before_the_answer() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/hints");
    let hints = client.head();
    assert_eq!((hints.status, hints.header("link")), (103, Some("</style.css>; rel=preload; as=style")));
    assert_eq!(client.answer().text(), "hinted\n");
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    let mut requests = String::new();
    for ms in [40, 1, 20, 0] {
        requests += &format!("GET /slow?ms={ms} HTTP/1.1\r\nHost: a\r\n\r\n");
        requests += &format!("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n{}", ms % 10);
    }
    client.send(requests);
    for ms in [40, 1, 20, 0] {
        assert_eq!(client.answer().text(), format!("done after {ms} ms\n"));
        assert_eq!(client.answer().text(), format!("{}", ms % 10));
    }
}

#[test]
fn an_answer_before_the_requests_end_arrives_and_the_rest_reaches_the_app() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("POST", "/", &["Content-Length: 6"]);
    client.send("one");
    let mut asked = app.asked();
    assert_eq!(asked.take(3), "one");
    asked.send("HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno");
    let answer = client.answer();
    assert_eq!((answer.head.status, answer.text().as_str(), answer.end), (413, "no", End::Whole));
    assert!(answer.head.has("connection", "close"));
    client.send("two");
    assert_eq!(asked.take(3), "two", "the app may still need the rest");
    client.expect_fin();
}

#[test]
fn an_answer_that_ends_with_the_apps_connection_ends_so_that_both_kinds_of_client_can_tell() {
    for (version, coding, end) in [("1.1", Some("chunked"), End::Whole), ("1.0", None, End::UntilClose)] {
        let app = RawApp::start();
        let proxy = Lameduck::proxy(app.addr, &[]);
        let mut client = proxy.client();
        client.send(format!("GET / HTTP/{version}\r\nHost: a\r\n\r\n"));
        let mut asked = app.asked();
        asked.send("HTTP/1.1 200 OK\r\n\r\nfirst ");
        let head = client.head();
        assert_eq!(head.header("transfer-encoding"), coding);
        client.wait_seen("first ");
        asked.send("last");
        asked.shutdown();
        let answer = client.body("GET", head);
        assert_eq!((answer.text().as_str(), answer.end), ("first last", end));
    }
}

#[test]
fn a_big_download_runs_in_constant_memory() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--threads", "1"]);
    let before = proxy.peak_memory();
    let mut client = proxy.client();
    let length = 400 * MIB;
    client.get(&format!("/download?bytes={length}"));
    let head = client.head();
    assert_eq!(head.header("content-length"), Some(length.to_string().as_str()));
    let mut left = length;
    while left > 0 {
        let piece = left.min(MIB);
        assert_eq!(client.take(piece).len(), piece);
        left -= piece;
    }
    let grown = proxy.peak_memory() - before;
    assert!(grown < 4096, "{grown} KiB more for 400 MiB");
}

#[test]
fn a_big_upload_runs_in_constant_memory() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--threads", "1"]);
    let before = proxy.peak_memory();
    for framing in ["Content-Length: 209715200", "Transfer-Encoding: chunked"] {
        let mut client = proxy.client();
        client.request("POST", "/upload", &[framing]);
        let piece = vec![b'x'; MIB];
        for _ in 0..200 {
            if framing.ends_with("chunked") {
                client.send("100000\r\n");
                client.send(&piece);
                client.send("\r\n");
            } else {
                client.send(&piece);
            }
        }
        if framing.ends_with("chunked") {
            client.send("0\r\n\r\n");
        }
        let answer = client.answer();
        assert!(answer.text().contains("\"bytes\":209715200"), "{}", answer.text());
    }
    let grown = proxy.peak_memory() - before;
    assert!(grown < 4096, "{grown} KiB more for 400 MiB");
}

/// Sends 256 MiB as far as the proxy reads it; the counter holds the number of bytes sent so far.
fn pours(asked: common::app::Asked) -> (Arc<AtomicUsize>, thread::JoinHandle<()>) {
    let poured = Arc::new(AtomicUsize::new(0));
    let count = poured.clone();
    let pouring = thread::spawn(move || {
        let mut asked = asked;
        asked.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 256 * MIB));
        let piece = vec![b'x'; MIB / 4];
        for _ in 0..1024 {
            asked.send(&piece);
            count.fetch_add(piece.len(), Ordering::AcqRel);
        }
    });
    (poured, pouring)
}

#[test]
fn a_reader_that_stops_stops_the_app_not_the_proxys_memory() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--threads", "1"]);
    let before = proxy.peak_memory();
    let mut client = proxy.client();
    client.get("/");
    let (poured, pouring) = pours(app.asked());
    client.wait_seen("HTTP/1.1 200");
    // The kernel's buffers fill up; after that nothing moves.
    let mut last = usize::MAX;
    let stopped = wait_for("the app to be stopped", || {
        thread::sleep(MOMENT);
        let now = poured.load(Ordering::Acquire);
        let stopped = now == last;
        last = now;
        stopped.then_some(now)
    });
    assert!(stopped < 64 * MIB, "{} MiB were sent that no client read", stopped / MIB);
    let grown = proxy.peak_memory() - before;
    assert!(grown < 4096, "{grown} KiB more");
    let answer = {
        let head = client.head();
        client.body("GET", head)
    };
    assert_eq!((answer.body.len(), answer.end), (256 * MIB, End::Whole), "the whole body arrives in the end");
    pouring.join().expect("poured");
}

#[test]
fn an_unread_upload_stops_the_client_not_the_proxys_memory() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--threads", "1"]);
    let before = proxy.peak_memory();
    let mut client = proxy.client();
    client.request("POST", "/", &["Content-Length: 100000000"]);
    let mut asked = app.asked();
    let sent = Arc::new(AtomicUsize::new(0));
    let sending = {
        let sent = sent.clone();
        thread::spawn(move || {
            let piece = vec![b'x'; 100_000];
            for _ in 0..1000 {
                client.send(&piece);
                sent.fetch_add(piece.len(), Ordering::AcqRel);
            }
            client
        })
    };
    let mut last = usize::MAX;
    let stopped = wait_for("the client to be stopped", || {
        thread::sleep(MOMENT);
        let now = sent.load(Ordering::Acquire);
        let stopped = now == last;
        last = now;
        stopped.then_some(now)
    });
    assert!(stopped < 64 * MIB, "{stopped} bytes were sent that the app did not read");
    asked.take(100_000_000);
    asked.send("HTTP/1.1 204 No Content\r\n\r\n");
    let mut client = sending.join().expect("sent");
    assert_eq!(client.answer().head.status, 204);
    assert!(proxy.peak_memory() - before < 4096);
}

#[test]
fn a_body_that_the_app_ends_too_soon_is_visibly_cut() {
    for head in ["Content-Length: 10", "Transfer-Encoding: chunked"] {
        let app = RawApp::start();
        let proxy = Lameduck::proxy(app.addr, &[]);
        let mut client = proxy.client();
        client.get("/");
        let mut asked = app.asked();
        asked.send(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n3\r\nabc"));
        client.wait_seen("abc");
        asked.shutdown();
        let head = client.head();
        assert_eq!(client.body("GET", head).end, End::CutByRst);
    }
}
