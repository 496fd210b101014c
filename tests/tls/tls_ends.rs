//! Ends under TLS are as without: complete is distinguished from cut, a drain waits for running work, idle connections
//! are parked.

use crate::common;

use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use common::app::RawApp;
use common::http::{Client, Fill};
use common::http2::{DATA, END_HEADERS, HEADERS, SETTINGS, block, frame as http2_frame};
use common::process::Node;
use common::tls::{Authority, Secure, TlsEnd};
use common::websocket::CLOSE;
use common::{LIMIT, MOMENT, wait_for};
use rustls::version::TLS13;

const ANSWER: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";

#[test]
fn an_upload_that_is_cut_is_no_upload_to_the_app() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n";
    let cuts: [fn(Secure); 3] = [
        |mut client| {
            client.truncate();
            // Only the client's sending side is closed, as an attacker may do.
            client.is_quiet_for(MOMENT);
        },
        |mut client| client.notify(),
        Secure::reset,
    ];
    for cut in cuts {
        let mut client = authority.client(addr);
        client.send(chunked);
        let mut asked = app.asked();
        assert_eq!(asked.take(7), "2\r\nhi\r\n");
        cut(client);
        assert_eq!(asked.rest(), "", "no last chunk");
        proxy.wait_in_flight(0);
    }
}

#[test]
fn an_upload_over_http2_that_is_cut_is_no_upload_to_the_app() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let mut post = block("/", &[]);
    // `:method POST` instead of GET.
    post[0] = 0x83;
    let begun = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        http2_frame(SETTINGS, 0, 0, &[]),
        http2_frame(HEADERS, END_HEADERS, 1, &post),
        http2_frame(DATA, 0, 1, b"hi"),
    ];
    for notify in [true, false] {
        let mut config = authority.client_config(&[&TLS13], None);
        config.alpn_protocols = vec![b"h2".to_vec()];
        let mut client = Secure::connect(addr, "localhost", config);
        assert_eq!(client.session().alpn_protocol(), Some(&b"h2"[..]));
        client.send(begun.concat());
        let mut asked = app.asked();
        assert!(asked.head.starts_with("POST / ") && asked.has_line("Transfer-Encoding: chunked"));
        assert_eq!(asked.take(7), "2\r\nhi\r\n");
        if notify {
            client.notify();
        }
        client.truncate();
        assert_eq!(asked.rest(), "", "no last chunk");
        proxy.wait_in_flight(0);
    }
}

#[test]
fn a_client_that_leaves_takes_its_request_along() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let leave: [fn(Secure); 3] = [
        |mut client| {
            client.notify();
            client.truncate();
        },
        drop,
        Secure::reset,
    ];
    for (how, leave) in leave.into_iter().enumerate() {
        let mut client = authority.client(addr);
        client.get("/");
        let mut asked = app.asked();
        leave(client);
        assert!(asked.ends_within(LIMIT), "way {how}");
        proxy.wait_in_flight(0);
    }
}

#[test]
fn a_client_that_ends_its_own_side_gets_its_answer() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let mut client = authority.client(addr);
    client.get("/");
    let mut asked = app.asked();
    client.notify();
    assert!(!asked.ends_within(MOMENT));
    asked.send(ANSWER);
    let (answer, end) = client.read_to_end();
    assert!(answer.ends_with("\r\n\r\nhi") && answer.contains("Connection: close"), "{answer}");
    assert_eq!(end, TlsEnd::Notified);
}

#[test]
fn an_answer_that_the_app_cuts_is_cut_for_the_client() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let mut client = authority.client(addr);
    client.get("/");
    let mut asked = app.asked();
    asked.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n");
    client.until("abc\r\n");
    drop(asked);
    assert_eq!(client.read_to_end(), (String::new(), TlsEnd::Reset));
}

#[test]
fn a_slow_handshake_is_cut_in_time() {
    let authority = Authority::default();
    let app = RawApp::start();
    let args = ["--tls-handshake-timeout", "500ms"];
    let (proxy, addr) = authority.proxy(&app.addr.to_string(), &args);
    let begun = Instant::now();
    let silent = Client::connect(addr);
    let mut begins = Client::connect(addr);
    begins.send(b"\x16\x03\x01\x02\x00\x01");
    // The rest comes byte by byte: each one is in time, but the handshake is not.
    let drips = || {
        let mut client = Client::connect(addr);
        client.send(b"\x16\x03\x01\x02\x00\x01");
        while client.try_send(&[0]).is_ok() && client.is_quiet_for(Duration::from_millis(20)) {}
        begun.elapsed()
    };
    // Sends its whole hello, reads the server's, and sends nothing more.
    let stalls = || {
        let mut client = authority.begun(addr);
        let hello = client.take_words();
        client.send_sealed(&hello);
        assert_eq!(client.read_to_end(), (String::new(), TlsEnd::Truncated));
        begun.elapsed()
    };
    let in_time = Duration::from_millis(400)..Duration::from_secs(5);
    thread::scope(|scope| {
        let (drips, stalls) = (scope.spawn(drips), scope.spawn(stalls));
        for mut client in [silent, begins] {
            assert_eq!(client.fill(LIMIT), Some(Fill::Fin));
        }
        let ended = [begun.elapsed(), drips.join().expect("cut"), stalls.join().expect("cut")];
        assert!(ended.iter().all(|ended| in_time.contains(ended)), "{ended:?}");
    });
    wait_for("no connection", || (proxy.metric("lameduck_connections") == 0.0).then_some(()));
}

#[test]
fn plain_http_on_the_tls_port_gets_400() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let mut client = Client::connect(addr);
    client.get("/");
    let answer = client.answer();
    assert_eq!(answer.head.status, 400);
    assert!(answer.text().contains("plain HTTP was sent to an HTTPS port"), "{}", answer.text());
    client.expect_fin();
}

#[test]
fn a_drain_waits_for_running_requests_and_sends_close_notify() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (mut proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let mut idle = authority.client(addr);
    let mut parked = authority.client(addr);
    for client in [&mut idle, &mut parked] {
        client.get("/");
        app.asked().send(ANSWER);
        client.until("\r\n\r\nhi");
    }
    wait_for("both to be parked", || (proxy.parked() == 2).then_some(()));
    idle.get("/");
    app.asked().send(ANSWER);
    idle.until("\r\n\r\nhi");
    let mut running = authority.client(addr);
    running.get("/");
    let mut asked = app.asked();
    // This connection stays in its handshake: it counts, but the drain does not wait for it for ever.
    let half = TcpStream::connect(addr).expect("connected");
    proxy.terminate();
    proxy.wait_phase("draining");
    assert!(running.is_quiet_for(MOMENT), "the running request must go on");
    asked.send(ANSWER);
    let (answer, end) = running.read_to_end();
    assert!(answer.contains("Connection: close") && answer.ends_with("\r\n\r\nhi"), "{answer}");
    assert_eq!(end, TlsEnd::Notified);
    for client in [&mut idle, &mut parked] {
        assert_eq!(client.read_to_end(), (String::new(), TlsEnd::Notified));
    }
    drop((idle, parked, running));
    proxy.expect_clean_exit();
    drop(half);
}

/// Sends half of the record with a GET; returns the other half.
fn half_a_request(client: &mut Secure) -> Vec<u8> {
    let mut record = client.seal("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    let rest = record.split_off(record.len() / 2);
    client.send_sealed(&record);
    rest
}

#[test]
fn a_drain_serves_a_request_of_which_half_a_record_has_come() {
    let authority = Authority::default();
    let app = RawApp::start().answer_all(ANSWER);
    let (mut proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let [mut idle, mut fresh, mut parked] = [(); 3].map(|()| authority.client(addr));
    for client in [&mut idle, &mut parked] {
        client.get("/");
        client.until("\r\n\r\nhi");
    }
    wait_for("all to be parked", || (proxy.parked() == 3).then_some(()));
    let halves = [half_a_request(&mut fresh), half_a_request(&mut parked)];
    wait_for("two to wake", || (proxy.parked() == 1).then_some(()));
    proxy.terminate();
    assert_eq!(idle.read_to_end(), (String::new(), TlsEnd::Notified));
    // Idle connections are being closed, but these are not idle.
    for (client, half) in [&mut fresh, &mut parked].into_iter().zip(halves) {
        client.send_sealed(&half);
        let (answer, end) = client.read_to_end();
        assert!(answer.contains("Connection: close") && answer.ends_with("\r\n\r\nhi"), "{answer:?}");
        assert_eq!(end, TlsEnd::Notified);
    }
    drop((idle, fresh, parked));
    proxy.expect_clean_exit();
}

#[test]
fn a_drain_waits_a_bounded_time_for_the_rest_of_a_record() {
    let authority = Authority::default();
    let app = RawApp::start().answer_all(ANSWER);
    let (mut proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let mut client = authority.client(addr);
    client.get("/");
    client.until("\r\n\r\nhi");
    drop(half_a_request(&mut client));
    proxy.terminate();
    assert_eq!(client.read_to_end(), (String::new(), TlsEnd::Notified));
    drop(client);
    proxy.expect_clean_exit();
}

#[test]
fn half_a_record_wakes_a_parked_connection_until_the_rest_comes_or_its_time_is_over() {
    let authority = Authority::default();
    let app = RawApp::start().answer_all(ANSWER);
    let (proxy, addr) = authority.proxy(&app.addr.to_string(), &["--head-timeout", "2s"]);
    let mut client = authority.client(addr);
    for comes in [true, false] {
        client.get("/");
        client.until("\r\n\r\nhi");
        wait_for("it to be parked", || (proxy.parked() == 1).then_some(()));
        let (half, begun) = (half_a_request(&mut client), Instant::now());
        wait_for("it to wake", || (proxy.parked() == 0).then_some(()));
        if comes {
            // Longer than an idle connection waits before it is parked.
            assert!(client.is_quiet_for(Duration::from_millis(1500)));
            assert_eq!(proxy.parked(), 0);
            client.send_sealed(&half);
            client.until("\r\n\r\nhi");
        } else {
            assert_eq!(client.read_to_end(), (String::new(), TlsEnd::Notified));
            assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
        }
    }
}

#[test]
fn an_idle_connection_is_parked_and_wakes() {
    let authority = Authority::default();
    let app = RawApp::start().answer_all(ANSWER);
    let (proxy, addr) = authority.proxy(&app.addr.to_string(), &["--idle-timeout", "4s"]);
    let mut client = authority.client(addr);
    for _ in 0..3 {
        client.get("/");
        client.until("\r\n\r\nhi");
        wait_for("it to be parked", || (proxy.parked() == 1).then_some(()));
    }
    // In two parts: the first one wakes the connection and is not a request yet.
    client.send("GET / HTTP/1.1\r\n");
    wait_for("it to wake", || (proxy.parked() == 0).then_some(()));
    client.send("Host: a\r\n\r\n");
    client.until("\r\n\r\nhi");
    // Finally the idle timeout ends the connection with close_notify.
    assert_eq!(client.read_to_end(), (String::new(), TlsEnd::Notified));
}

/// A WebSocket's handshake (the key is the RFC's own example).
fn upgrade(client: &mut Secure, target: &str) {
    client.send(format!(
        "GET {target} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ));
    assert!(client.until("\r\n\r\n").starts_with("HTTP/1.1 101 "));
}

fn frame(client: &mut Secure) -> (u8, Vec<u8>) {
    let head = client.take(2);
    assert!(head[1] < 126, "a short frame for the client");
    (head[0] & 0x0f, client.take(head[1].into()))
}

#[test]
fn a_websocket_is_parked_wakes_and_gets_its_1001() {
    let authority = Authority::default();
    let app = Node::chat();
    let (mut proxy, addr): (_, SocketAddr) = authority.proxy(&app.addr.to_string(), &[]);
    let mut ada = authority.client(addr);
    upgrade(&mut ada, "/chat?name=ada");
    frame(&mut ada);
    wait_for("both sides to be parked", || (proxy.parked() == 2).then_some(()));
    // One masked text frame: "hi" under the key 0.
    ada.send([0x81, 0x82, 0, 0, 0, 0, b'h', b'i']);
    let (_, said) = frame(&mut ada);
    assert!(String::from_utf8_lossy(&said).contains("hi"));
    wait_for("both sides to be parked again", || (proxy.parked() == 2).then_some(()));

    proxy.terminate();
    let close = frame(&mut ada);
    assert_eq!(close, (CLOSE, 1001u16.to_be_bytes().to_vec()));
    ada.send([0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe9]);
    assert_eq!(ada.read_to_end(), (String::new(), TlsEnd::Notified));
    app.process.wait_line("ada's end", |line| (line == "ada left with code 1001").then_some(()));
    drop(ada);
    proxy.expect_clean_exit();
}
