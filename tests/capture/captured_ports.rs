//! A port that the app opens on 127.77.0.1 is served under the same number on the pod's addresses, by the protocol of
//! each connection's first bytes. What did not move is left alone.

use crate::common;
use crate::{POD, POD_V6, in_pod, preloaded};

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::app::RawApp;
use common::http::{Client, Fill};
use common::process::{Lameduck, Process};
use common::{LIMIT, MOMENT, wait_for};
use serde_json::json;
use socket2::{Domain, Socket, Type};

/// Where apps move to.
pub const APP: Ipv4Addr = Ipv4Addr::new(127, 77, 0, 1);
/// More than all sockets on the way hold, in bytes.
const SIZE: usize = 32 << 20;
/// A response.
pub const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// A sidecar.
pub fn proxy(args: &[&str]) -> Lameduck {
    let quiet: &[&str] = if args.contains(&"--tcp-quiet") { &[] } else { &["--tcp-quiet", "300ms"] };
    let defaults = [&["--listen", "127.0.0.1:1", "--control-listen", "off"], quiet].concat();
    Lameduck::start_as(common::process::lameduck(), &["proxy", "--capture"], &[&defaults, args].concat(), &[])
}

/// A Node app that has moved.
fn node() -> Process {
    let script = "require('http').createServer((_, res) => res.end()).listen(3000, '127.77.0.1', () => console.log('up'))";
    let node = Process::start("node", Command::new("node").args(["-e", script]));
    node.wait_line("the app listens", |line| (line == "up").then_some(()));
    node
}

/// An app that has moved.
pub fn moved(port: u16) -> RawApp {
    RawApp::at(SocketAddr::new(APP.into(), port))
}

/// The port on the pod's address.
pub fn pod(port: u16) -> SocketAddr {
    SocketAddr::new(POD.parse::<IpAddr>().expect("an address"), port)
}

/// A client's connection, once the port is captured.
pub fn connect(addr: SocketAddr) -> Client {
    wait_for("the port to be captured", || Client::try_connect(addr).ok())
}

#[test]
fn it_listens_on_every_address_of_the_pod_and_http_is_http() {
    in_pod(|| {
        let proxy = proxy(&[]);
        let app = moved(3000).answer_all(OK);
        for ip in ["127.0.0.1", "::1", POD, POD_V6] {
            let mut client = connect(SocketAddr::new(ip.parse().expect("an address"), 3000));
            for _ in 0..2 {
                client.get("/a");
                assert_eq!(client.answer().text(), "ok", "by {ip}");
            }
        }
        assert!(app.seen().contains("Host: "), "{}", app.seen());
        wait_for("all requests counted", || {
            (proxy.metric("lameduck_requests_total{code=\"2xx\"}") == 8.0).then_some(())
        });
    });
}

/// An app that trusts loopback, as a database its root user, must not trust the whole network.
#[test]
fn the_app_sees_who_is_inside_the_pod_and_who_is_not() {
    in_pod(|| {
        let app = TcpListener::bind((APP, 3000)).expect("listen");
        let _proxy = proxy(&[]);
        for (to, seen) in
            [(POD, POD), ("127.0.0.1", "127.0.0.1"), (POD_V6, POD), ("::1", "127.0.0.1"), (POD, POD)]
        {
            let mut client = connect(SocketAddr::new(to.parse().expect("an address"), 3000));
            client.send("not HTTP\r\n\r\n");
            // A readiness check says nothing.
            let asks = |(stream, from): (TcpStream, SocketAddr)| {
                (&stream).read(&mut [0; 8]).is_ok_and(|n| n > 0).then_some(from)
            };
            let from = wait_for("the client", || asks(app.accept().expect("a connection")));
            assert_eq!(from.ip().to_string(), seen, "for a client of {to}");
        }
    });
}

#[test]
fn a_pod_that_loses_its_address_loses_no_request() {
    in_pod(|| {
        let _proxy = proxy(&[]);
        let _app = moved(3000).answer_all(OK);
        let v6 = SocketAddr::new(POD_V6.parse().expect("an address"), 3000);
        connect(v6);
        let lost = Command::new("ip").args(["addr", "del", &format!("{POD}/32"), "dev", "lo"]).status();
        assert!(lost.is_ok_and(|lost| lost.success()));
        let mut client = connect(v6);
        client.get("/");
        assert_eq!(client.answer().text(), "ok");
    });
}

#[test]
fn other_protocols_pass_byte_for_byte_whoever_speaks_first() {
    in_pod(|| {
        let (redis, mysql) =
            (moved(6379), RawApp::greeting_at(SocketAddr::new(APP.into(), 3306), b"greeting"));
        let proxy = proxy(&[]);
        let mut client = connect(pod(6379));
        // One byte at a time, as on a slow network.
        for byte in b"*1\r\n$4\r\nPING\r\n\r\n" {
            client.send([*byte]);
        }
        let mut at_app = redis.asked();
        assert_eq!(at_app.head, "*1\r\n$4\r\nPING\r\n\r\n");
        at_app.send("+PONG\r\n");
        client.until("+PONG\r\n");
        proxy.wait_in_flight(1);

        // The second time the port is known: the app is connected at once.
        for _ in 0..2 {
            let mut client = connect(pod(3306));
            client.until("greeting");
            client.send("login\r\n\r\n");
            assert_eq!(mysql.asked().head, "login\r\n\r\n");
        }
    });
}

#[test]
fn a_client_that_is_silent_at_first_may_still_become_http() {
    in_pod(|| {
        let app = moved(3000);
        let proxy = proxy(&[]);
        let mut client = connect(pod(3000));
        assert!(client.is_quiet_for(MOMENT));
        client.get("/late");
        let mut asked = app.asked();
        assert!(asked.has_line("GET /late HTTP/1.1"), "{}", asked.head);
        asked.send(OK);
        assert_eq!(client.answer().text(), "ok");
        proxy.wait_in_flight(0);
    });
}

#[test]
fn a_grpc_server_that_sends_its_settings_first_is_no_server_of_another_protocol() {
    in_pod(|| {
        let app = RawApp::greeting_at(SocketAddr::new(APP.into(), 3000), b"\0\0\0\x04\0\0\0\0\0");
        let _proxy = proxy(&[]);
        let mut client = connect(pod(3000));
        assert!(client.is_quiet_for(MOMENT), "the settings are for whoever speaks HTTP/2 to it");
        client.get("/");
        assert!(app.asked().head.contains("X-Forwarded-For"), "it is HTTP");
    });
}

#[test]
fn a_drain_ends_quiet_connections_and_waits_for_an_answer() {
    in_pod(|| {
        let app = moved(6379);
        let mut proxy = proxy(&[]);
        let connection = || {
            let mut client = connect(pod(6379));
            client.send("*1\r\n\r\n");
            (client, app.asked())
        };
        let ((mut quiet, mut quiet_app), (mut busy, mut busy_app)) = (connection(), connection());
        quiet_app.send("+OK");
        quiet.take(3);
        proxy.wait_in_flight(2);
        proxy.terminate();
        assert_eq!(quiet.read_to_end(), (vec![], Fill::Fin), "it was quiet, and the app owed nothing");
        proxy.wait_in_flight(1);
        // Longer than --tcp-quiet, but the app owes a response.
        thread::sleep(Duration::from_secs(1));
        busy_app.send("+OK");
        assert_eq!(busy.take(3), b"+OK");
        assert_eq!(busy.read_to_end(), (vec![], Fill::Fin));
        proxy.expect_clean_exit();
    });
}

#[test]
fn quiet_connections_end_at_different_times() {
    in_pod(|| {
        let app = moved(6379);
        let proxy = proxy(&["--stream-spread", "4s"]);
        let connection = || {
            let mut client = connect(pod(6379));
            client.send("*1\r\n\r\n");
            let mut asked = app.asked();
            asked.send("+OK");
            client.take(3);
            (client, asked)
        };
        let connections: Vec<_> = (0..16).map(|_| connection()).collect();
        proxy.terminate();
        proxy.wait_phase("draining");
        let began = Instant::now();
        let mut ends: Vec<_> = thread::scope(|scope| {
            let ended = |(mut client, _app): (Client, _)| {
                assert_eq!(client.read_to_end(), (vec![], Fill::Fin));
                began.elapsed()
            };
            let all: Vec<_> = connections.into_iter().map(|it| scope.spawn(move || ended(it))).collect();
            all.into_iter().map(|it| it.join().expect("an end")).collect()
        });
        ends.sort();
        // Of 16 at random times, all within a second are one chance in 10^7.
        assert!(ends[15] - ends[0] > Duration::from_secs(1), "{ends:?}");
        assert!(ends[15] < Duration::from_secs(7), "{ends:?}");
    });
}

#[test]
fn running_requests_may_call_their_own_app_during_a_drain() {
    in_pod(|| {
        let app = moved(3000);
        let mut proxy = proxy(&[]);
        let mut outer = connect(pod(3000));
        outer.get("/outer");
        let mut outer_asked = app.asked();
        proxy.terminate();
        proxy.wait_phase("draining");
        Client::wait_refused(pod(3000));
        let mut inner = Client::connect(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 3000));
        inner.get("/inner");
        app.asked().send(OK);
        assert_eq!(inner.answer().text(), "ok");
        outer_asked.send(OK);
        assert_eq!(outer.answer().text(), "ok");
        proxy.expect_clean_exit();
    });
}

#[test]
fn a_port_that_opens_later_is_captured_and_an_app_may_come_back() {
    in_pod(|| {
        let proxy = proxy(&[]);
        proxy.wait_log("listening");
        let mut node = node();
        let mut client = connect(pod(3000));
        client.get("/");
        assert_eq!(client.answer().head.status, 200);
        node.kill();
        // The port stays ours: a request waits for the app.
        client.get("/");
        let _node = self::node();
        assert_eq!(client.answer().head.status, 200);
    });
}

#[test]
fn an_app_with_the_shim_is_reachable_as_soon_as_it_listens() {
    in_pod(|| {
        let proxy = proxy(&[]);
        // By now the looks at the start are rare: it's the word that counts.
        thread::sleep(Duration::from_millis(1500));
        let script = "const s = require('http').createServer((_, res) => res.end('ok'));
        const began = Date.now();
        s.listen(3000, () => console.log('listens after', Date.now() - began));";
        let mut app = preloaded("node");
        app.args(["-e", script]);
        let app = Process::start("node", &mut app);
        let line =
            app.wait_line("the app listens", |line| line.starts_with("listens").then(|| line.to_owned()));
        let mut client = Client::connect(pod(3000));
        client.get("/");
        assert_eq!(client.answer().text(), "ok");
        let ms: u64 = line.trim_start_matches("listens after ").parse().expect("milliseconds");
        assert!(ms < 900, "without an answer the app waits for a second: {ms}");
        wait_for("the request counted", || {
            (proxy.metric("lameduck_requests_total{code=\"2xx\"}") == 1.0).then_some(())
        });
    });
}

#[test]
fn an_app_with_a_socket_for_each_family_is_captured_for_both() {
    in_pod(|| {
        let proxy = proxy(&[]);
        let script = "const serve = (at, then) => require('http').createServer((_, res) => res.end('ok')).listen(at, then);
        serve({ port: 3000, host: '0.0.0.0' }, () =>
          serve({ port: 3000, host: '::', ipv6Only: true }, () => console.log('both listen')));";
        let mut app = preloaded("node");
        app.args(["-e", script]);
        let app = Process::start("node", &mut app);
        app.wait_line("the app listens twice", |line| (line == "both listen").then_some(()));
        for ip in ["127.0.0.1", "::1", POD, POD_V6] {
            let mut client = Client::connect(SocketAddr::new(ip.parse().expect("an address"), 3000));
            client.get("/");
            assert_eq!(client.answer().text(), "ok", "by {ip}");
        }
        wait_for("all requests counted", || {
            (proxy.metric("lameduck_requests_total{code=\"2xx\"}") == 4.0).then_some(())
        });
    });
}

#[test]
fn a_port_that_did_not_move_is_left_alone_and_reported() {
    in_pod(|| {
        let app = TcpListener::bind("0.0.0.0:3000").expect("the app's port");
        let proxy = proxy(&[]);
        let bypassed = proxy.process.wait_line("the bypassed port", |line| {
            serde_json::from_str::<serde_json::Value>(line)
                .ok()
                .filter(|entry| entry["reason"] == "not-moved")
        });
        assert_eq!(bypassed["port"], 3000, "{bypassed}");
        assert_eq!(proxy.metric("lameduck_port_bypassed{port=\"3000\",reason=\"not-moved\"}"), 1.0);
        let status = proxy.status().expect("the status");
        assert_eq!(
            (&status["bypassed"][0]["reason"], &status["captured"]),
            (&"not-moved".into(), &json!([]))
        );
        wait_for("readiness, by the app's own port", || {
            proxy.status().filter(|status| status["ready"] == true)
        });
        let shown = proxy.command_output(&["status"]).stdout;
        assert!(
            String::from_utf8_lossy(&shown)
                .contains("bypassed     0.0.0.0:3000: the app listens there itself")
        );
        let mut client = Client::connect(pod(3000));
        client.send("straight");
        // Checks of readiness connect too, and send nothing.
        let came = app.incoming().any(|at_app| {
            let mut bytes = [0; 8];
            at_app.expect("accepted").read_exact(&mut bytes).is_ok() && bytes == *b"straight"
        });
        assert!(came);
        assert_eq!(Client::ask(proxy.probe, "/app-port/3000").head.status, 200);
        let _later = TcpListener::bind("0.0.0.0:4000").expect("another port");
        assert_eq!(Client::ask(proxy.probe, "/app-port/4000").head.status, 200, "it sends no word");
        let only_v6 = Socket::new(Domain::IPV6, Type::STREAM, None).expect("a socket");
        only_v6.set_only_v6(true).expect("an option");
        let any: SocketAddr = "[::]:5000".parse().expect("an address");
        only_v6.bind(&any.into()).and_then(|()| only_v6.listen(1)).expect("a third port");
        assert_eq!(Client::ask(proxy.probe, "/app-port/5000").head.status, 200, "of IPv6 only");
    });
}

#[test]
fn a_probe_of_a_port_asks_the_app_itself() {
    in_pod(|| {
        let proxy = proxy(&[]);
        let probe = || Client::ask(proxy.probe, "/app-port/3000").head.status;
        assert_eq!(probe(), 503, "nobody listens yet");
        let mut node = node();
        wait_for("the app's port to be found", || (probe() == 200).then_some(()));
        node.kill();
        wait_for("the app's port to be closed", || (probe() == 503).then_some(()));
        assert!(Client::try_connect(pod(3000)).is_ok(), "our own socket still accepts");
    });
}

#[test]
fn rules_override_what_the_first_bytes_would_say() {
    in_pod(|| {
        let _proxy = proxy(&["--capture-as", "9000=tcp,7000=skip"]);
        let (tcp, skipped) = (moved(9000), moved(7000));
        let mut client = connect(pod(9000));
        client.get("/");
        // As HTTP it would have got X-Forwarded-For.
        assert!(!tcp.asked().head.contains("X-Forwarded"));
        assert!(Client::try_connect(pod(7000)).is_err(), "a skipped port is not ours");
        drop(skipped);
    });
}

#[test]
fn a_drain_does_not_truncate_what_a_slow_client_is_still_to_read() {
    in_pod(|| {
        let app = moved(6379);
        let mut proxy = proxy(&[]);
        let mut client = connect(pod(6379));
        client.send("*1\r\n\r\n");
        let mut asked = app.asked();
        let sending = thread::spawn(move || {
            asked.send(vec![7; SIZE]);
            asked.close();
        });
        proxy.wait_in_flight(1);
        proxy.terminate();
        proxy.wait_phase("draining");
        // Several times --tcp-quiet, in which the client reads nothing.
        thread::sleep(Duration::from_secs(2));
        let (bytes, end) = client.read_to_end();
        assert_eq!((bytes.len(), end), (SIZE, Fill::Fin));
        sending.join().expect("sent");
        proxy.expect_clean_exit();
    });
}

#[test]
fn one_stray_http_client_does_not_make_http_of_a_server_that_speaks_first() {
    in_pod(|| {
        let _app = RawApp::greeting_at(SocketAddr::new(APP.into(), 3306), b"J\0\0\0\n8.4.0\0");
        let _proxy = proxy(&[]);
        let mut stray = connect(pod(3306));
        stray.get("/");
        stray.read_to_end();
        let mut client = connect(pod(3306));
        client.until("8.4.0");
    });
}

#[test]
fn a_hold_is_idle_once_recently_used_connections_are_quiet() {
    in_pod(|| {
        let app = moved(6379);
        // Longer than it takes until an idle connection is parked.
        let proxy = proxy(&["--tcp-quiet", "2s"]);
        let mut client = connect(pod(6379));
        client.send("*1\r\n\r\n");
        let mut asked = app.asked();
        asked.send("+OK");
        client.take(3);
        let held = proxy.command_output(&["hold", "--until-idle", "--max", "15s"]);
        assert!(held.status.success(), "{held:?}");
        assert_eq!(client.read_to_end(), (vec![], Fill::Fin));
    });
}

#[test]
fn clients_of_the_same_pod_do_not_prolong_a_drain() {
    in_pod(|| {
        let _app = moved(3000).answer_all(OK);
        let mut proxy = proxy(&["--grace", "30s", "--reserve", "1s"]);
        let local = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 3000);
        connect(local);
        let stop = AtomicBool::new(false);
        let mut seconds = 0.0;
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut silent, began) = (vec![], Instant::now());
                while !stop.load(Ordering::Relaxed) && began.elapsed() < LIMIT {
                    // Refused once the proxy has gone.
                    silent.push(Client::try_connect(local));
                    let _ = Client::try_connect(local).ok().and_then(|client| client.try_ask("/", &[]));
                    thread::sleep(Duration::from_millis(50));
                }
            });
            proxy.terminate();
            seconds = proxy.wait_log("drained")["seconds"].as_f64().expect("a number");
            stop.store(true, Ordering::Relaxed);
        });
        proxy.expect_clean_exit();
        assert!(seconds < 6.0, "the lame duck's maximum is 9.7 s: {seconds}");
    });
}

#[test]
fn a_word_without_an_end_is_not_kept_waiting_for_one() {
    in_pod(|| {
        let app = TcpListener::bind((APP, 3000)).expect("the app's port");
        let _proxy = proxy(&[]);
        let mut client = connect(pod(3000));
        client.send("HELLO");
        app.set_nonblocking(true).expect("a mode");
        let passed = wait_for("what the client said", || {
            // The proxy's readiness checks say nothing.
            let (stream, _) = app.accept().ok()?;
            let mut at_app = Client::over(stream.into()).expect("a socket");
            matches!(at_app.fill(MOMENT), Some(Fill::Data)).then(|| at_app.take(5))
        });
        assert_eq!(passed, b"HELLO");
    });
}

#[test]
fn there_is_nothing_to_switch_to() {
    in_pod(|| {
        let proxy = proxy(&[]);
        let said = proxy.command_output(&["switch", "127.0.0.1:4000"]);
        assert!(
            !said.status.success() && String::from_utf8_lossy(&said.stderr).contains("nothing to switch")
        );
    });
}
