//! The cost of a client is limited in bytes, number and time, and each limit has its status.

use crate::common;

use std::thread;
use std::time::{Duration, Instant};

use common::app::RawApp;
use common::http::{Client, End, Fill};
use common::process::{Lameduck, Node};
use common::{MOMENT, wait_for};

/// The sweeper runs four times a second, and the machine may be busy.
const SLACK: Duration = Duration::from_secs(4);

fn took(since: Instant, least: u64) {
    let took = since.elapsed();
    assert!(took >= Duration::from_millis(least) && took < Duration::from_millis(least) + SLACK, "{took:?}");
}

#[test]
fn a_slow_head_gets_408() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--head-timeout", "1s"]);
    let mut client = proxy.client();
    let begun = Instant::now();
    // Byte by byte: each one is in time, but the head is not.
    for byte in "GET / HTTP/1.1\r\nHost: a\r\nX: ".bytes().chain(std::iter::repeat(b'x')) {
        client.send([byte]);
        if client.fill(Duration::from_millis(40)).is_some() {
            break;
        }
    }
    took(begun, 700);
    assert_eq!(client.answer().head.status, 408);
    client.expect_fin();
}

#[test]
fn the_heads_time_limit_ends_with_the_head() {
    let app = RawApp::start();
    let addr = app.addr;
    let proxy = Lameduck::proxy(addr, &["--head-timeout", "1s"]);
    let mut client = proxy.client();
    client.send("GET / HTTP/1.1\r\n");
    thread::sleep(Duration::from_millis(50));
    client.send("Host: a\r\n\r\n");
    let mut asked = app.asked();
    assert!(client.is_quiet_for(Duration::from_millis(1600)), "answered before the app");
    asked.send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(client.answer().head.status, 204);
}

#[test]
fn a_head_in_time_may_wait_for_an_app_that_is_down() {
    let nobody = common::port::Port::reserve();
    let proxy = Lameduck::proxy(nobody.addr, &["--head-timeout", "1s", "--upstream-wait", "2500ms"]);
    let mut client = proxy.client();
    let begun = Instant::now();
    client.send("GET / HTTP/1.1\r\n");
    thread::sleep(Duration::from_millis(50));
    client.send("Host: a\r\n\r\n");
    let answer = client.answer();
    assert_eq!(
        (answer.head.status, answer.head.header("retry-after")),
        (503, Some("1")),
        "{}",
        answer.text()
    );
    took(begun, 2300);
}

#[test]
fn a_huge_head_gets_431_however_it_comes() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--max-head", "8KiB"]);
    let line = |length| format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}", "x".repeat(length));
    let fields = |number| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X:\r\n".repeat(number));
    for head in [
        line(9000) + "\r\n\r\n",
        line(9000),
        line(60_000),
        format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(9000)),
        "\r\n".repeat(5000),
        "x".repeat(9000),
        fields(2000),
    ] {
        let mut client = proxy.client();
        client.send(&head);
        let answer = client.answer();
        assert_eq!(answer.head.status, 431, "{} bytes that begin {:?}", head.len(), &head[..20]);
    }
    let mut client = proxy.client();
    client.send(fields(1999));
    app.asked().send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(client.answer().head.status, 204, "at the limit");
}

#[test]
fn a_body_that_stalls_gets_408_and_the_app_is_told() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--body-timeout", "1s"]);
    for framing in ["Content-Length: 10", "Transfer-Encoding: chunked"] {
        let mut client = proxy.client();
        let begun = Instant::now();
        client.request("POST", "/", &[framing]);
        client.send("1\r\n");
        let mut asked = app.asked();
        assert_eq!(client.answer().head.status, 408);
        took(begun, 700);
        client.expect_fin();
        assert_eq!(asked.rest(), "1\r\n");
    }
}

#[test]
fn a_body_that_moves_is_not_cut_however_long_it_takes() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--body-timeout", "1s"]);
    let mut client = proxy.client();
    client.request("POST", "/upload", &["Content-Length: 20"]);
    for _ in 0..20 {
        client.send("x");
        thread::sleep(Duration::from_millis(100));
    }
    assert!(client.answer().text().contains("\"bytes\":20"));
}

#[test]
fn a_reader_that_stops_is_cut() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--body-timeout", "1s"]);
    let mut client = Client::connect_narrow(proxy.listen);
    client.get("/download?bytes=100000000");
    let head = client.head();
    app.wait_active(1);
    app.wait_active(0);
    proxy.wait_in_flight(0);
    assert_eq!(client.body("GET", head).end, End::CutByRst);
}

#[test]
fn a_reader_that_is_slow_but_reads_is_not_cut() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--body-timeout", "1s"]);
    let mut client = Client::connect_narrow(proxy.listen);
    let length = 6_000_000;
    client.get(&format!("/download?bytes={length}"));
    let head = client.head();
    let read = std::sync::atomic::AtomicUsize::new(0);
    let answer = client.body_slowly(head, 100_000, Duration::from_millis(40), &read);
    assert_eq!(answer.body.len(), length);
}

#[test]
fn an_idle_connection_is_closed_after_its_time() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--idle-timeout", "1s"]);
    let mut silent = proxy.client();
    let mut used = proxy.client();
    let begun = Instant::now();
    used.get("/");
    assert_eq!(used.answer().head.status, 200);
    used.expect_fin();
    silent.expect_fin();
    took(begun, 700);
}

#[test]
fn a_long_answer_is_no_idle_time() {
    let app = Node::slow();
    let args = ["--idle-timeout", "500ms", "--body-timeout", "500ms", "--head-timeout", "500ms"];
    let proxy = Lameduck::proxy(app.addr, &args);
    let mut client = proxy.client();
    client.get("/slow?ms=1000");
    assert_eq!(client.answer().text(), "done after 1000 ms\n");
    client.get("/stream?n=2&ms=900");
    assert_eq!(client.answer().text(), "line 1 of 2\nline 2 of 2\n");
}

#[test]
fn connections_over_the_limit_are_served_when_others_close() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--max-connections", "2"]);
    let mut first = proxy.client();
    let mut second = proxy.client();
    for client in [&mut first, &mut second] {
        client.get("/");
        assert_eq!(client.answer().head.status, 200);
    }
    let mut waiting: Vec<_> = (0..3).map(|_| proxy.client()).collect();
    waiting.iter_mut().for_each(|client| client.get("/"));
    for client in &mut waiting {
        assert!(client.is_quiet_for(MOMENT), "must be neither refused nor served");
    }
    drop(first);
    assert_eq!(waiting[0].answer().head.status, 200);
    assert!(waiting[1].is_quiet_for(MOMENT));
    drop(second);
    assert_eq!(waiting[1].answer().head.status, 200);
    assert!(waiting[2].is_quiet_for(MOMENT));
    waiting.remove(0);
    assert_eq!(waiting[1].answer().head.status, 200);
}

#[test]
fn a_proxy_at_its_connection_limit_still_drains() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &["--max-connections", "1"]);
    let mut first = proxy.client();
    first.get("/");
    assert_eq!(first.answer().head.status, 200);
    proxy.terminate();
    drop(first);
    proxy.expect_clean_exit();
}

#[test]
fn a_flood_of_pipelined_requests_is_answered_one_by_one_in_little_memory() {
    let app = RawApp::start().answer_all("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let proxy = Lameduck::proxy(app.addr, &["--threads", "1"]);
    let before = proxy.peak_memory();
    let mut client = proxy.client();
    let number = 3000;
    let flood = "GET /flood HTTP/1.1\r\nHost: a\r\n\r\n".repeat(number);
    client.send(flood);
    for _ in 0..number {
        assert_eq!(client.answer().text(), "ok");
    }
    assert_eq!(app.seen().matches("/flood").count(), number);
    assert!(proxy.peak_memory() - before < 4096);
    assert_eq!(proxy.status().expect("alive")["in_flight"], 0);
}

#[test]
fn a_client_that_sends_for_ever_after_its_refusal_is_left() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.send("no request\r\n\r\n");
    assert_eq!(client.answer().head.status, 400);
    let begun = Instant::now();
    wait_for("the connection's end", || client.try_send(&[b'x'; 1000]).is_err().then_some(()));
    took(begun, 4000);
    assert_ne!(client.fill(MOMENT), Some(Fill::Data));
}

#[test]
fn a_client_that_closes_within_its_head_costs_nothing() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    for part in ["", "G", "GET / HTTP/1.1\r\nHost: a\r\n"] {
        let mut client = proxy.client();
        client.send(part);
        client.shutdown();
        let (rest, end) = client.read_to_end();
        assert_eq!((rest.len(), end), (0, Fill::Fin), "after {part:?}");
    }
    proxy.wait_status("no connections", |status| status["in_flight"] == 0);
}
