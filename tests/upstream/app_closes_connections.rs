//! The app's `Connection: close` concerns only its connection to the proxy: the client's connection stays, until an app
//! that kept its connections begins to close them.

use crate::common;

use std::thread;
use std::time::Duration;

use common::app::RawApp;
use common::grpc::App;
use common::http::Client;
use common::http2::{GOAWAY, HEADERS, Raw, block};
use common::process::Lameduck;

const KEPT: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const CLOSED: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";

fn start() -> (RawApp, Lameduck) {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--threads", "1"]);
    (app, proxy)
}

/// Sends one request, to which the app responds with `answer`; returns whether the client got `Connection: close`.
fn told(app: &RawApp, proxy: &Lameduck, answer: &str) -> bool {
    let mut client = proxy.client();
    client.get("/");
    // Each request uses a new connection to the app, because the previous one is closed.
    let mut asked = app.asked();
    asked.send(answer);
    let got = client.answer();
    assert_eq!(got.text(), "ok");
    if answer == KEPT {
        // The app closes the idle connection, which the pool notices.
        drop(asked);
    }
    got.head.has("connection", "close")
}

#[test]
fn an_app_that_closes_each_connection_closes_no_clients() {
    let app = RawApp::start().answer_all(CLOSED);
    let proxy = Lameduck::proxy(app.addr, &["--threads", "1"]);
    let mut client = proxy.client();
    for _ in 0..5 {
        client.get("/");
        let answer = client.answer();
        assert_eq!((answer.text().as_str(), answer.head.header("connection")), ("ok", None));
    }
    let mut old = proxy.client();
    for _ in 0..2 {
        old.send("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
        let answer = old.answer();
        assert_eq!((answer.text().as_str(), answer.head.header("connection")), ("ok", Some("keep-alive")));
    }
}

#[test]
fn an_app_that_kept_connections_and_begins_to_close_them_is_going_and_clients_are_told() {
    let (app, proxy) = start();
    let mut client = proxy.client();
    client.get("/");
    let mut asked = app.asked();
    asked.send(KEPT);
    assert_eq!(client.answer().head.header("connection"), None);
    client.get("/");
    asked.next();
    asked.send(CLOSED);
    assert!(client.answer().head.has("connection", "close"));
    client.expect_fin();
    assert!(told(&app, &proxy, CLOSED), "every client gets `close`");
}

#[test]
fn an_http2_client_is_told_by_goaway() {
    let (app, proxy) = start();
    let mut raw = Raw::connect(proxy.listen);
    raw.frame(HEADERS, 5, 1, &block("/", &[]));
    let mut asked = app.asked();
    asked.send(KEPT);
    assert!(raw.wait(HEADERS).is_some());
    raw.frame(HEADERS, 5, 3, &block("/", &[]));
    asked.next();
    asked.send(CLOSED);
    let goaway = raw.wait(GOAWAY).expect("the client gets a GOAWAY");
    assert_eq!(goaway.code(), 0);
}

#[test]
fn the_goaway_of_an_app_that_speaks_http2_is_the_same() {
    let start = || {
        let app = App::start();
        let proxy = Lameduck::proxy(app.addr, &["--upstream-protocol", "http2", "--threads", "1"]);
        (app, proxy)
    };
    let (_app, proxy) = start();
    let mut client = proxy.client();
    client.get("/first");
    assert_eq!(client.answer().head.header("connection"), None);
    client.get("/t.T/Away");
    let answer = client.answer();
    assert!(answer.head.status == 200 && answer.head.has("connection", "close"), "{answer:?}");
    let (_app, proxy) = start();
    let mut raw = Raw::connect(proxy.listen);
    raw.frame(HEADERS, 5, 1, &block("/first", &[]));
    assert!(raw.wait(HEADERS).is_some());
    raw.frame(HEADERS, 5, 3, &block("/t.T/Away", &[]));
    assert_eq!(raw.wait(GOAWAY).expect("the client gets a GOAWAY").code(), 0);
}

#[test]
fn an_app_that_closes_now_and_then_closes_no_clients() {
    let (app, proxy) = start();
    assert!(!told(&app, &proxy, KEPT));
    assert!(told(&app, &proxy, CLOSED), "one close is taken for the app's shutdown");
    // Long enough that a new response without `close` is not one that was already on its way.
    thread::sleep(Duration::from_millis(1100));
    assert!(!told(&app, &proxy, KEPT));
    assert!(!told(&app, &proxy, CLOSED));
}

#[test]
fn a_server_that_says_how_long_only_when_asked_is_asked() {
    let (app, proxy) = start();
    let mut client = proxy.client();
    client.get("/");
    let mut asked = app.asked();
    assert!(!asked.has_line("Connection: keep-alive"), "the field is sent only where it is needed");
    asked.send(KEPT);
    assert_eq!(client.answer().text(), "ok");
    for _ in 0..3 {
        client.get("/");
        asked.next();
        assert!(asked.has_line("Connection: keep-alive"), "{}", asked.head);
        asked.send("HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nKeep-Alive: timeout=20\r\nContent-Length: 2\r\n\r\nok");
        assert_eq!(client.answer().text(), "ok");
    }
    // An upgrade has its own `Connection` field.
    client.request("GET", "/", &["Connection: Upgrade", "Upgrade: websocket"]);
    asked.next();
    assert!(asked.has_line("Connection: Upgrade") && !asked.has_line("Connection: keep-alive"));
}

#[test]
fn a_server_that_says_it_unasked_is_not_asked() {
    let answer = "HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5\r\nContent-Length: 2\r\n\r\nok";
    let app = RawApp::start().answer_all(answer);
    let proxy = Lameduck::proxy(app.addr, &["--threads", "1"]);
    for _ in 0..3 {
        assert_eq!(Client::ask(proxy.listen, "/").text(), "ok");
    }
    assert!(!app.seen().contains("keep-alive"), "{}", app.seen());
}
