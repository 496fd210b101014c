//! Connections to the app: kept and retired according to the app's observed behaviour, retried only where that is safe,
//! awaited while the app does not listen.

use crate::common;

use std::io::Read;
use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use common::app::{Asked, RawApp};
use common::http::{Answer, Client, Fill};
use common::port::Port;
use common::process::{Lameduck, Node, temporary_directory};
use common::{LIMIT, MOMENT};
use socket2::{Domain, SockAddr, Socket, Type};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// A proxy that has served one request. It has one thread, so the next request finds the same connection to the app.
fn kept(fields: &str) -> (RawApp, Lameduck, Client, Asked) {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--threads", "1"]);
    let mut client = proxy.client();
    client.get("/first");
    let mut asked = app.asked();
    asked.send(format!("HTTP/1.1 200 OK\r\n{fields}Content-Length: 2\r\n\r\nok"));
    assert_eq!(client.answer().text(), "ok");
    (app, proxy, client, asked)
}

#[test]
fn a_connection_is_used_again() {
    let (app, proxy, mut client, mut asked) = kept("");
    for _ in 0..3 {
        client.get("/again");
        assert!(asked.next().starts_with("GET /again "));
        asked.send(OK);
        assert_eq!(client.answer().text(), "ok");
    }
    let mut other = proxy.client();
    other.get("/other");
    assert!(asked.next().starts_with("GET /other "), "also for another client");
    assert!(app.asked_within(Duration::ZERO).is_none());
}

#[test]
fn an_idle_connection_is_closed_before_the_app_would() {
    let cases = [
        ("", 3000, 4900),
        ("Keep-Alive: timeout=5, max=9\r\n", 3000, 4900),
        ("Connection: keep-alive\r\nkeep-alive: max=9, Timeout=3\r\n", 1500, 2900),
        ("Keep-Alive: timeout=1\r\n", 200, 990),
    ];
    thread::scope(|threads| {
        for (fields, least, most) in cases {
            threads.spawn(move || {
                let (_app, _proxy, _client, mut asked) = kept(fields);
                let begun = Instant::now();
                assert_eq!(asked.rest(), "");
                let took = begun.elapsed().as_millis();
                assert!((least..most).contains(&took), "{fields:?}: {took} ms");
            });
        }
    });
}

#[test]
fn a_connection_that_the_app_does_not_keep_is_not_used_again() {
    for fields in ["Connection: close\r\n", "Keep-Alive: timeout=0\r\n"] {
        let (app, proxy, client, _asked) = kept(fields);
        drop(client);
        let mut client = proxy.client();
        client.request("POST", "/second", &["Content-Length: 0"]);
        assert!(app.asked().head.starts_with("POST /second "), "{fields}");
    }
}

#[test]
fn an_http_1_0_app_keeps_its_connection_only_if_it_says_so() {
    for (fields, again) in [("", false), ("Connection: keep-alive\r\n", true)] {
        let app = RawApp::start();
        let proxy = Lameduck::proxy(app.addr, &["--threads", "1"]);
        let mut client = proxy.client();
        client.get("/");
        let mut asked = app.asked();
        asked.send(format!("HTTP/1.0 200 OK\r\n{fields}Content-Length: 2\r\n\r\nok"));
        assert_eq!(client.answer().text(), "ok");
        client.get("/second");
        match again {
            true => assert!(asked.next().starts_with("GET /second ")),
            false => assert!(app.asked().head.starts_with("GET /second ")),
        }
    }
}

#[test]
fn a_connection_that_the_app_closed_while_idle_fails_no_request() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--threads", "1"]);
    let mut client = proxy.client();
    for _ in 0..50 {
        client.request("POST", "/", &["Content-Length: 2"]);
        client.send("hi");
        let mut asked = app.asked();
        assert_eq!(asked.take(2), "hi");
        asked.send(OK);
        assert_eq!(client.answer().text(), "ok");
        asked.close();
    }
}

/// Sends a second request over a connection that the app then closes instead of answering, after sending `before`.
fn dies(request: &str, before: &str) -> (RawApp, Lameduck, Client) {
    let (app, proxy, mut client, mut asked) = kept("");
    client.send(request);
    asked.next();
    if request.contains("Length: 5") {
        asked.take(5);
    }
    asked.send(before);
    asked.shutdown();
    (app, proxy, client)
}

#[test]
fn a_safe_request_on_a_dead_connection_is_sent_once_more() {
    for request in [
        "GET /again HTTP/1.1\r\nHost: a\r\n\r\n",
        "DELETE /again HTTP/1.1\r\nHost: a\r\n\r\n",
        "PUT /again HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    ] {
        let (app, proxy, mut client) = dies(request, "");
        let mut asked = app.asked();
        assert!(asked.head.contains(" /again "), "{}", asked.head);
        if request.ends_with("hello") {
            assert_eq!(asked.take(5), "hello");
        }
        asked.send(OK);
        assert_eq!(client.answer().text(), "ok");
        assert_eq!(proxy.metric("lameduck_upstream_retries_total"), 1.0);
    }
}

#[test]
fn it_is_sent_once_more_and_not_twice() {
    let (app, _proxy, mut client) = dies("GET /again HTTP/1.1\r\nHost: a\r\n\r\n", "");
    drop(app.asked());
    assert_eq!(client.answer().head.status, 502);
    assert!(app.asked_within(MOMENT).is_none());
}

#[test]
fn a_body_that_came_in_parts_is_sent_once_more_as_a_whole() {
    let (app, _proxy, mut client, mut asked) = kept("");
    client.request("PUT", "/again", &["Transfer-Encoding: chunked"]);
    asked.next();
    client.send("5\r\nhello\r\n");
    asked.take(10);
    client.send("3\r\nyou\r\n");
    asked.take(8);
    drop(asked);
    let mut asked = app.asked();
    assert_eq!(asked.take(18), "5\r\nhello\r\n3\r\nyou\r\n");
    client.send("0\r\n\r\n");
    assert_eq!(asked.take(5), "0\r\n\r\n");
    asked.send(OK);
    assert_eq!(client.answer().text(), "ok");
}

#[test]
fn an_unsafe_request_is_never_sent_twice() {
    for (request, before) in [
        ("POST /again HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", ""),
        ("PATCH /again HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", ""),
        ("GET /again HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 2"),
        ("GET /again HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n"),
    ] {
        let (app, _proxy, mut client) = dies(request, before);
        let answer = loop {
            match client.answer() {
                interim if interim.head.status == 103 => {}
                answer => break answer,
            }
        };
        assert_eq!(answer.head.status, 502, "{request} {before}");
        assert!(app.asked_within(MOMENT).is_none(), "{request} {before}");
    }
}

#[test]
fn a_body_too_large_to_keep_is_not_sent_twice() {
    let (app, _proxy, mut client, mut asked) = kept("");
    client.request("PUT", "/again", &["Content-Length: 200000"]);
    asked.next();
    client.send(vec![b'x'; 150_000]);
    asked.take(150_000);
    asked.shutdown();
    assert_eq!(client.answer().head.status, 502);
    assert!(app.asked_within(MOMENT).is_none());
}

#[test]
fn a_new_connection_that_dies_is_not_tried_again() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/");
    drop(app.asked());
    assert_eq!(client.answer().head.status, 502);
    assert!(app.asked_within(MOMENT).is_none());
}

/// Sends a request to an app that closes its port: either before it reads the request, which resets the connection, or
/// after it has `read` it. Then a new app listens on the port. Returns the client's response.
fn app_is_replaced(request: &str, read: bool) -> Answer {
    let port = Port::reserve();
    let old = TcpListener::bind(port.addr).expect("the port");
    let proxy = Lameduck::proxy(port.addr, &[]);
    let mut client = proxy.client();
    client.send(request);
    // The proxy's readiness checks connect too, but send nothing.
    let mut stream = loop {
        let (stream, _) = old.accept().expect("a connection");
        if stream.peek(&mut [0]).is_ok_and(|n| n > 0) {
            break stream;
        }
    };
    if read {
        let _ = stream.read(&mut [0; 4096]).expect("the request");
    }
    drop(old);
    drop(stream);
    thread::sleep(MOMENT);
    let _app = Node::held_at(port.number());
    client.answer()
}

#[test]
fn a_safe_request_that_a_closing_port_reset_is_sent_to_the_next_app() {
    let answer = app_is_replaced("GET / HTTP/1.1\r\nHost: a\r\n\r\n", false);
    assert_eq!(answer.head.status, 200, "{}", answer.text());
}

#[test]
fn one_that_the_app_may_have_died_of_is_not() {
    assert_eq!(app_is_replaced("GET / HTTP/1.1\r\nHost: a\r\n\r\n", true).head.status, 502);
    let post = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(app_is_replaced(post, false).head.status, 502, "the app may have processed it");
}

#[test]
fn requests_wait_for_an_app_whose_port_is_closed() {
    let port = Port::reserve();
    let proxy = Lameduck::proxy(port.addr, &[]);
    let mut get = proxy.client();
    get.get("/");
    let mut post = proxy.client();
    post.request("POST", "/", &["Content-Length: 2"]);
    post.send("hi");
    assert!(get.is_quiet_for(MOMENT) && post.is_quiet_for(MOMENT));
    let _app = Node::held_at(port.number());
    assert_eq!((get.answer().head.status, post.answer().head.status), (200, 200));
}

#[test]
fn a_wait_for_the_app_ends_with_503() {
    let port = Port::reserve();
    let proxy = Lameduck::proxy(port.addr, &["--upstream-wait", "500ms"]);
    let begun = Instant::now();
    let answer = Client::ask(proxy.listen, "/");
    assert_eq!((answer.head.status, answer.head.header("retry-after")), (503, Some("1")));
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
}

#[test]
fn a_name_that_is_gone_for_a_while_is_waited_for() {
    // The label is too long for a name, so the lookup fails without a DNS server.
    let name = format!("{}.test:80", "a".repeat(64));
    let proxy = Lameduck::proxy_to(&name, &["--upstream-wait", "500ms"]);
    let begun = Instant::now();
    assert_eq!(Client::ask(proxy.listen, "/").head.status, 503);
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
}

#[test]
fn an_app_may_listen_on_a_unix_socket() {
    let dir = temporary_directory();
    let path = dir.join("app.sock");
    let proxy =
        Lameduck::proxy_to(&format!("unix:{}", path.display()), &["--forwarded", "keep", "--threads", "1"]);
    let mut client = proxy.client();
    client.get("/first");
    assert!(client.is_quiet_for(MOMENT), "answered before the app listened");
    let app = RawApp::unix(&path);
    let mut asked = app.asked();
    assert_eq!(asked.head, "GET /first HTTP/1.1\r\nHost: app.test\r\n\r\n");
    asked.send(OK);
    assert_eq!(client.answer().text(), "ok");
    client.request("POST", "/second", &["Content-Length: 2"]);
    client.send("hi");
    assert!(asked.next().starts_with("POST /second "));
    assert_eq!(asked.take(2), "hi");
    drop(client);
    assert!(asked.ends_within(LIMIT));
    let _ = std::fs::remove_dir_all(dir);
}

#[test]
fn a_unix_socket_whose_queue_is_full_is_waited_for() {
    let dir = temporary_directory();
    let path = dir.join("app.sock");
    let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    listener.listen(0).unwrap();
    let _first = Client::unix(&path).expect("the queue has room for one");
    let proxy = Lameduck::proxy_to(&format!("unix:{}", path.display()), &[]);
    let mut client = proxy.client();
    client.get("/");
    assert!(client.is_quiet_for(MOMENT));
    let app = RawApp::accepting(listener);
    app.asked().send(OK);
    assert_eq!(client.answer().text(), "ok");
    let _ = std::fs::remove_dir_all(dir);
}

#[test]
fn clients_come_in_by_every_listening_address() {
    let app = RawApp::start();
    let listens = ["--listen", "[::]:0", "--listen", "127.0.0.1:0,[::1]:0"];
    let proxy = Lameduck::proxy(app.addr, &listens);
    assert_eq!(proxy.listens.len(), 3);
    let [any, v4, v6] = proxy.listens[..] else { panic!("three addresses") };
    for (addr, peer) in [
        (([127, 0, 0, 1], any.port()).into(), "127.0.0.1"),
        ((std::net::Ipv6Addr::LOCALHOST, any.port()).into(), "::1"),
        (v4, "127.0.0.1"),
        (v6, "::1"),
    ] {
        let mut client = Client::connect(addr);
        client.request("GET", "/", &["Connection: close"]);
        let mut asked = app.asked();
        assert!(asked.has_line(&format!("X-Forwarded-For: {peer}")), "{addr}: {}", asked.head);
        asked.send("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok");
        assert_eq!(client.answer().text(), "ok");
        assert_eq!(client.fill(LIMIT), Some(Fill::Fin));
    }
}

#[test]
fn an_app_that_closes_each_connection_loses_nothing_under_load() {
    let app =
        RawApp::start().answer_all("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok");
    let proxy = Lameduck::proxy(app.addr, &[]);
    let addr = proxy.listen;
    let clients: Vec<_> = (0..8)
        .map(|_| {
            thread::spawn(move || {
                for _ in 0..25 {
                    assert_eq!(Client::ask(addr, "/").text(), "ok");
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().expect("every answer"));
}
