//! Each limit in `--help` that is not a client's cost (those are in `clients_are_bounded`) has its status: targets,
//! responses, tunnels, TLS handshakes, and requests in flight.

use crate::common;

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::app::{Asked, RawApp};
use common::http::{Client, Fill};
use common::process::{Lameduck, Node};
use common::tls::Authority;
use common::websocket::{CLOSE, TEXT, WebSocket};
use common::{LIMIT, MOMENT, wait_for};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const OK: &str = "HTTP/1.1 204 No Content\r\n\r\n";

fn ended(proxy: &Lameduck, how: &str) -> f64 {
    proxy.metric(&format!("lameduck_requests_ended_total{{ended=\"{how}\"}}"))
}

/// The status and Retry-After that curl gets over HTTP/2.
fn by_http2(proxy: &Lameduck, target: &str) -> String {
    let url = format!("http://{}{target}", proxy.listen);
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--output", "/dev/null", "--http2-prior-knowledge"]);
    let shown =
        curl.args(["--write-out", "%{http_version} %{http_code} %header{retry-after}", &url]).output();
    String::from_utf8_lossy(&shown.expect("curl starts").stdout).trim().to_owned()
}

/// An upgraded connection that is not a WebSocket.
fn tunnel(proxy: &Lameduck, app: &RawApp) -> (Client, Asked) {
    let mut client = proxy.client();
    client.request("GET", "/shell", &["Connection: Upgrade", "Upgrade: other"]);
    let mut asked = app.asked();
    asked.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n");
    assert_eq!(client.head().status, 101);
    (client, asked)
}

#[test]
fn a_target_that_is_too_long_gets_414_however_long_the_head_is() {
    let app = RawApp::start();
    for (args, most) in [(&[][..], 16 << 10), (&["--max-uri", "100"], 100)] {
        let proxy = Lameduck::proxy(app.addr, args);
        let mut client = proxy.client();
        client.get(&format!("/{}", "x".repeat(most - 1)));
        app.asked().send(OK);
        assert_eq!(client.answer().head.status, 204, "{most} bytes are within the limit");
        // The last one also exceeds the limit of a head.
        for length in [most, most + 1000, 100_000] {
            let mut client = proxy.client();
            client.get(&format!("/{}", "x".repeat(length)));
            let answer = client.answer();
            assert_eq!(answer.head.status, 414, "{length} bytes");
            assert!(answer.text().contains("--max-uri"));
        }
        assert_eq!(by_http2(&proxy, &format!("/{}", "x".repeat(most))), "2 414");
        assert_eq!(ended(&proxy, "rejected"), 4.0);
    }
}

#[test]
fn a_head_may_have_as_many_fields_as_node_takes_and_no_more() {
    let app = RawApp::start();
    for (args, most) in [(&[][..], 2000), (&["--max-fields", "100"], 100), (&["--max-fields", "20"], 20)] {
        let proxy = Lameduck::proxy(app.addr, args);
        let fields = |n: usize| vec!["a: b"; n];
        // The Host counts too.
        let mut client = proxy.client();
        client.request("GET", "/", &fields(most - 1));
        let mut asked = app.asked();
        assert_eq!(asked.head.matches("\r\na: b").count(), most - 1);
        let answer = |n: usize| format!("HTTP/1.1 204 No Content\r\n{}\r\n", "c: d\r\n".repeat(n));
        asked.send(answer(most));
        assert_eq!(client.head().headers.len(), most);
        client.get("/");
        asked.next();
        asked.send(answer(most + 1));
        let refused = client.answer();
        assert_eq!(refused.head.status, 502);
        assert!(refused.text().contains("--max-fields"), "{}", refused.text());
        let mut client = proxy.client();
        client.request("GET", "/", &fields(most));
        let refused = client.answer();
        assert_eq!(refused.head.status, 431);
        assert!(refused.text().contains("--max-fields"), "{}", refused.text());
        client.expect_fin();
    }
}

#[test]
fn over_http2_a_head_may_have_as_many_fields() {
    let app = RawApp::start();
    let answer = format!("HTTP/1.1 204 No Content\r\n{}\r\n", "c: d\r\n".repeat(300));
    let app = app.answer_all(answer.leak());
    for (args, status) in
        [(&[][..], "204 300"), (&["--max-fields", "299"], "431 0"), (&["--max-fields", "310"], "204 300")]
    {
        let proxy = Lameduck::proxy(app.addr, args);
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--http2-prior-knowledge", "--dump-header", "-", "--output", "/dev/null"]);
        curl.args((0..300).flat_map(|n| ["--header".to_owned(), format!("a{n}: b")]));
        let shown = curl.arg(format!("http://{}/", proxy.listen)).output().expect("curl starts");
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        let (first, c) =
            (shown.split_whitespace().nth(1).unwrap_or_default(), shown.matches("\nc: d").count());
        assert_eq!(format!("{first} {c}"), status, "{shown}");
    }
    assert_eq!(app.seen().matches("\r\na299: b").count(), 2);
}

#[test]
fn an_app_that_is_slow_to_answer_gets_its_client_504_and_is_told() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--answer-timeout", "1s"]);
    for (method, fields, body) in [("GET", &[][..], ""), ("POST", &["Content-Length: 5"], "12345")] {
        let (began, mut client) = (Instant::now(), proxy.client());
        client.request(method, "/", fields);
        client.send(body);
        let mut asked = app.asked();
        let answer = client.answer();
        assert_eq!(answer.head.status, 504);
        assert!(answer.text().contains("--answer-timeout"), "{}", answer.text());
        assert!(began.elapsed() >= Duration::from_millis(700), "{:?}", began.elapsed());
        client.expect_fin();
        assert_eq!(asked.rest(), body);
    }
    assert_eq!(ended(&proxy, "timed-out"), 2.0);
}

#[test]
fn an_answer_that_has_begun_may_take_its_time_and_so_may_a_request() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &["--answer-timeout", "1s"]);
    let mut client = proxy.client();
    client.request("POST", "/", &["Content-Length: 3"]);
    let mut asked = app.asked();
    for byte in ["1", "2", "3"] {
        assert!(
            client.is_quiet_for(Duration::from_millis(700)),
            "the client's time must not count as the app's"
        );
        client.send(byte);
        asked.take(1);
    }
    // An interim response restarts the time limit.
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(600));
        asked.send("HTTP/1.1 102 Processing\r\n\r\n");
        assert_eq!(client.head().status, 102);
    }
    asked.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlo");
    let head = client.head();
    thread::sleep(Duration::from_millis(1800));
    asked.send("ng");
    assert_eq!(client.body("POST", head).text(), "long");
    // Each request has its own time limit.
    client.get("/next");
    let mut next = app.asked_within(MOMENT).unwrap_or(asked);
    next.send(OK);
    assert_eq!(client.answer().head.status, 204);
    client.get("/last");
    assert_eq!(client.answer().head.status, 504);
}

#[test]
fn a_websocket_over_which_nothing_moves_is_told_1001_and_a_busy_one_stays() {
    let app = Node::chat();
    let proxy = Lameduck::proxy(app.addr, &["--tunnel-timeout", "2500ms"]);
    let mut silent = WebSocket::open(proxy.listen, "/chat?name=silent");
    silent.receive();
    let mut busy = WebSocket::open(app.addr, "/chat?name=elsewhere");
    busy.receive();
    // Data from the app counts as traffic too.
    silent.receive();
    let began = Instant::now();
    busy.send(TEXT, b"one more");
    silent.receive();
    let told = silent.receive();
    assert_eq!(told.close_code(), Some(1001), "{told:?}");
    assert!(began.elapsed() >= Duration::from_millis(2000), "{:?}", began.elapsed());
    silent.send(CLOSE, &1001u16.to_be_bytes());
    assert_eq!(silent.client.read_to_end().1, Fill::Fin);
    app.process.wait_line("its end", |line| (line == "silent left with code 1001").then_some(()));
    proxy.wait_in_flight(0);
    assert_eq!(ended(&proxy, "timed-out"), 1.0);

    let mut busy = WebSocket::open(proxy.listen, "/chat?name=busy");
    busy.receive();
    for word in 0..8 {
        thread::sleep(Duration::from_millis(500));
        busy.send(TEXT, format!("word {word}").as_bytes());
        while !busy.receive().text().contains(&format!("word {word}")) {}
    }
}

#[test]
fn a_websocket_that_stopped_inside_a_frame_is_not_waited_for() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--tunnel-timeout", "1s"]);
    let mut half = WebSocket::open(proxy.listen, "/half-frame");
    half.client.take(6);
    // The first half of a frame of six bytes, from the client.
    half.client.send([0x82, 0x86, 1, 2, 3, 4, 5]);
    assert_ne!(half.client.read_to_end().1, Fill::Data);
    proxy.wait_in_flight(0);
}

#[test]
fn any_other_tunnel_and_a_tcp_connection_are_reset_both_ways() {
    let (app, listener) = (RawApp::start(), TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port"));
    let route = format!("127.0.0.1:0={}", listener.local_addr().expect("its address"));
    for timeout in ["500ms", "2500ms"] {
        let proxy = Lameduck::proxy(app.addr, &["--tunnel-timeout", timeout, "--tcp", &route]);
        let began = Instant::now();
        let (mut client, mut asked) = tunnel(&proxy, &app);
        let mut raw = Client::connect(proxy.tcp(0));
        let mut server = Client::over(listener.accept().expect("accepted").0.into()).expect("a socket");
        // Half-closed tunnels too, although they are never parked.
        let (mut half, mut half_asked) = tunnel(&proxy, &app);
        half.shutdown();
        assert_eq!(half_asked.rest(), "");
        for client in [&mut client, &mut half, &mut raw, &mut server] {
            assert_eq!(client.read_to_end(), (vec![], Fill::Rst), "{timeout}");
        }
        assert_eq!(asked.rest(), "");
        assert!(began.elapsed() >= Duration::from_millis(if timeout == "500ms" { 250 } else { 2200 }));
        proxy.wait_in_flight(0);
        assert_eq!(ended(&proxy, "timed-out"), 3.0);
    }
}

#[test]
fn over_max_in_flight_a_request_gets_503_with_retry_after_and_a_connection_a_reset() {
    let app = Node::held();
    let route = format!("127.0.0.1:0={}", app.addr);
    let proxy = Lameduck::proxy(app.addr, &["--max-in-flight", "2", "--tcp", &route]);
    let (mut first, mut second) = (proxy.client(), Client::connect(proxy.tcp(0)));
    first.get("/wait");
    second.get("/wait");
    app.wait_active(2);
    let mut refused = proxy.client();
    refused.request("POST", "/", &["Content-Length: 3"]);
    refused.send("abc");
    let answer = refused.answer();
    assert_eq!((answer.head.status, answer.head.header("retry-after")), (503, Some("1")));
    assert!(answer.text().contains("--max-in-flight"), "{}", answer.text());
    refused.expect_fin();
    assert!(Client::is_reset_by(proxy.tcp(0)));
    assert_eq!(by_http2(&proxy, "/"), "2 503 1");
    // A probe does not count as work.
    let mut probe = proxy.client();
    probe.request("GET", "/", &["User-Agent: kube-probe/1.30"]);
    assert_eq!(probe.answer().head.status, 200);
    assert_eq!((ended(&proxy, "refused"), app.active()), (3.0, 2));
    app.release();
    assert_eq!(first.answer().text(), "released\n");
    assert_eq!(Client::ask(proxy.listen, "/").head.status, 200);
}

#[test]
fn handshakes_over_the_limit_wait_and_silent_connections_do_not_count() {
    /// More than the 1000 handshakes that may be under way.
    const MANY: usize = 1200;
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("more files");
    let authority = Authority::default();
    let app = RawApp::start().answer_all("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
    let args = ["--tls-handshake-timeout", "60s"];
    let (proxy, addr) = authority.proxy(&app.addr.to_string(), &args);
    let connections = || proxy.metric("lameduck_connections");
    let connect = || TcpStream::connect(addr).expect("connected");
    let silent: Vec<_> = (0..MANY).map(|_| connect()).collect();
    wait_for("all of them", || (connections() == MANY as f64).then_some(()));
    let mut served = authority.client(addr);
    let mut early = authority.begun(addr);
    // These begin a handshake and stall. The proxy accepts connections until the limit is reached.
    let stall = |_| {
        let mut tcp = connect();
        tcp.write_all(&[0x16]).expect("sent");
        tcp
    };
    let stalled: Vec<_> = (0..MANY).map(stall).collect();
    wait_for("no more to be let in", || {
        let before = connections();
        thread::sleep(MOMENT);
        (before >= (MANY + 1000) as f64 && connections() == before).then_some(())
    });
    // The accept in progress takes one more connection.
    let one_more = connect();
    thread::scope(|scope| {
        let late = scope.spawn(|| authority.client(addr));
        // A connection accepted earlier must wait too once it sends its hello.
        let hello = early.take_words();
        early.send_sealed(&hello);
        assert!(!early.hears_within(MOMENT) && !late.is_finished(), "must be neither refused nor served");
        // Established connections and the plain listener still work.
        served.get("/");
        served.until("\r\n\r\nhi");
        assert_eq!(Client::ask(proxy.listen, "/").text(), "hi");
        drop(stalled);
        assert!(early.hears_within(LIMIT));
        let mut late = late.join().expect("served once there is room");
        late.get("/");
        late.until("\r\n\r\nhi");
    });
    drop((silent, one_more));
}
