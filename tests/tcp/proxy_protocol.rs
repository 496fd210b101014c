//! A trusted load balancer names its client in a PROXY protocol header; that client is then the peer.

use crate::common;

use std::net::{Ipv4Addr, TcpListener};
use std::thread;
use std::time::{Duration, Instant};

use common::MOMENT;
use common::app::RawApp;
use common::http::{Client, Fill};
use common::process::Lameduck;

const TRUST: [&str; 3] = ["--proxy-protocol-from", "10.0.0.0/8,127.0.0.1", "--access-log"];
const LINE: &[u8] = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n";
const OK: &str = "HTTP/1.1 204 No Content\r\n\r\n";

/// A header of version 2.
fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
    let len = u16::try_from(body.len()).expect("short").to_be_bytes();
    [b"\r\n\r\n\0\r\nQUIT\n", &[command, family][..], &len, body].concat()
}

/// The same with an additional field after the addresses.
fn v2_with_client() -> Vec<u8> {
    v2(0x21, 0x11, &[192, 0, 2, 7, 198, 51, 100, 1, 0xdc, 0x04, 0x01, 0xbb, 0x04, 0, 1, b'x'])
}

fn wait_warning(proxy: &Lameduck, text: &str) {
    proxy.process.wait_line(text, |line| (line.contains("WARN") && line.contains(text)).then_some(()));
}

#[test]
fn the_client_it_names_is_the_peer_everywhere() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &TRUST);
    for header in [LINE.to_vec(), v2_with_client()] {
        let mut client = proxy.client();
        client.send([&header[..], b"GET /one HTTP/1.1\r\nHost: a\r\n\r\n"].concat());
        let mut asked = app.asked();
        assert!(asked.has_line("X-Forwarded-For: 192.0.2.7"), "{}", asked.head);
        let ledger = Client::unix(&proxy.control).and_then(|control| control.try_ask("/ledger", &[]));
        let ledger = ledger.expect("the ledger").text();
        assert!(ledger.contains("192.0.2.7:56324"), "{ledger}");
        asked.send(OK);
        assert_eq!(client.answer().head.status, 204);
        // The header applies to the connection, also after it was parked.
        thread::sleep(Duration::from_millis(1500));
        client.get("/two");
        assert!(asked_again(&app, &mut asked).contains("X-Forwarded-For: 192.0.2.7\r\n"));
        let peer = proxy.process.wait_line("the access log", |line| {
            let entry = serde_json::from_str::<serde_json::Value>(line).ok()?;
            (entry["path"] == "/one").then(|| entry["peer"].clone())
        });
        assert_eq!(peer, "192.0.2.7");
    }
}

/// Answers the next request, on either connection, and returns its head.
fn asked_again(app: &RawApp, before: &mut common::app::Asked) -> String {
    match app.asked_within(MOMENT) {
        Some(mut asked) => {
            asked.send(OK);
            asked.head.clone()
        }
        None => {
            let head = before.next().to_owned();
            before.send(OK);
            head
        }
    }
}

#[test]
fn it_may_come_in_pieces_and_not_a_byte_more_is_taken() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let route = format!("127.0.0.1:0={}", listener.local_addr().expect("its address"));
    let proxy = Lameduck::proxy(RawApp::start().addr, &[&TRUST[..], &["--tcp", &route]].concat());
    for header in [LINE.to_vec(), v2_with_client(), v2(0x20, 0, &[0; 600])] {
        for piece in [1, 7, 20, header.len()] {
            let mut client = Client::connect(proxy.tcp(0));
            let bytes = [&header[..], b"\r\nPROXY and what follows"].concat();
            for piece in bytes.chunks(piece) {
                client.send(piece);
                if header.len() < 100 {
                    thread::sleep(Duration::from_millis(2));
                }
            }
            client.shutdown();
            let mut app = Client::over(listener.accept().expect("accepted").0.into()).expect("a socket");
            assert_eq!(app.read_to_end(), (b"\r\nPROXY and what follows".to_vec(), Fill::Fin), "{piece}");
            app.shutdown();
            client.expect_fin();
        }
    }
    let log = proxy.process.output();
    assert!(log.contains("192.0.2.7"), "{log}");
}

#[test]
fn a_load_balancer_that_speaks_for_itself_stays_the_peer() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &TRUST);
    for header in [b"PROXY UNKNOWN\r\n".to_vec(), v2(0x20, 0, b""), v2(0x21, 0, b"")] {
        let mut client = proxy.client();
        client.send(header);
        client.get("/health");
        let mut asked = app.asked();
        assert!(asked.has_line("X-Forwarded-For: 127.0.0.1"), "{}", asked.head);
        asked.send(OK);
        assert_eq!(client.answer().head.status, 204);
    }
}

#[test]
fn from_others_it_is_not_read() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--proxy-protocol-from", "10.0.0.0/8"]);
    let mut client = proxy.client();
    client.get("/plain");
    let mut asked = app.asked();
    assert!(asked.has_line("X-Forwarded-For: 127.0.0.1"), "{}", asked.head);
    asked.send(OK);
    assert_eq!(client.answer().head.status, 204);
    // Read as HTTP, the line looks like a request with another version.
    for (header, status) in [(LINE.to_vec(), 505), (v2_with_client(), 400)] {
        let mut client = proxy.client();
        client.send([&header[..], b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"].concat());
        assert_eq!(client.answer().head.status, status);
    }
}

#[test]
fn a_missing_broken_or_endless_header_closes_the_connection_and_is_logged() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &TRUST);
    let endless = [b"PROXY TCP4 ".to_vec(), vec![b'1'; 5000]].concat();
    for (bytes, why) in [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), "does not begin with a PROXY protocol header"),
        (b"PROXY TCP4 here there 1 2\r\n".to_vec(), "line is invalid"),
        (endless, "line is too long"),
        (v2(0x21, 0x11, &[0; 5000]), "header is too long"),
        (v2(0x21, 0x11, b"short"), "too short for its addresses"),
        (v2(0x2f, 0x11, &[0; 12]), "unknown version, command or family"),
    ] {
        let mut client = proxy.client();
        client.send(bytes);
        assert_eq!(client.read_to_end().0, b"");
        wait_warning(&proxy, why);
    }
    let mut client = proxy.client();
    client.send("PROXY ");
    client.shutdown();
    assert_eq!(client.read_to_end().0, b"");
    wait_warning(&proxy, "is incomplete");
    assert_eq!(app.asked_within(MOMENT).map(|asked| asked.head), None);
    // A TCP health check, which sends nothing, is not reported.
    drop(proxy.client());
    proxy.wait_status("no connection", |status| status["connections"] == 0);
    assert_eq!(proxy.process.output().matches("--proxy-protocol-from was closed").count(), 7);
}

#[test]
fn a_missing_header_has_the_time_limit_of_a_head() {
    let proxy = Lameduck::proxy(RawApp::start().addr, &[&TRUST[..], &["--head-timeout", "1s"]].concat());
    for bytes in ["", "PROXY TCP4 1"] {
        let (began, mut client) = (Instant::now(), proxy.client());
        client.send(bytes);
        assert_eq!(client.read_to_end().0, b"");
        assert!(began.elapsed() > Duration::from_millis(700), "{:?}", began.elapsed());
    }
    wait_warning(&proxy, "came too slowly");
}

#[test]
fn a_drain_does_not_wait_for_it_for_long() {
    let mut proxy = Lameduck::proxy(RawApp::start().addr, &TRUST);
    let mut silent = proxy.client();
    proxy.wait_status("connected", |status| status["connections"] == 1);
    let began = Instant::now();
    proxy.terminate();
    assert_eq!(silent.read_to_end().0, b"");
    proxy.expect_clean_exit();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}
