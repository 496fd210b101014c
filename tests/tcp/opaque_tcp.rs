//! `--tcp`: connections are forwarded byte for byte, including ends and resets, and each is work in flight.

use crate::common;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use common::app::RawApp;
use common::http::{Client, Fill};
use common::port::Port;
use common::process::{Lameduck, Process, temporary_directory};
use common::{MOMENT, wait_for};
use socket2::Socket;

/// A server whose side of each connection the test controls.
struct Server {
    listener: Socket,
    addr: SocketAddr,
}

impl Server {
    fn start() -> Self {
        Self::at((Ipv4Addr::LOCALHOST, 0).into())
    }

    fn at(addr: SocketAddr) -> Self {
        let listener = TcpListener::bind(addr).expect("a port");
        Self { addr: listener.local_addr().expect("its address"), listener: listener.into() }
    }

    /// Accepts the next connection from the proxy.
    fn accept(&self) -> Client {
        Client::over(self.listener.accept().expect("accepted").0).expect("a socket")
    }

    /// Whether the proxy opens no connection within this time.
    fn is_left_alone_for(&self, time: Duration) -> bool {
        self.listener.set_nonblocking(true).expect("a mode");
        thread::sleep(time);
        let none = self.listener.accept().is_err();
        self.listener.set_nonblocking(false).expect("a mode");
        none
    }
}

/// A proxy whose only `--tcp` leads to `upstream`.
fn proxy(upstream: impl ToString, args: &[&str]) -> Lameduck {
    let app = RawApp::start();
    let route = format!("127.0.0.1:0={}", upstream.to_string());
    Lameduck::proxy(app.addr, &[&["--tcp", &route][..], args].concat())
}

/// Both ends of a connection.
fn connect(proxy: &Lameduck, server: &Server) -> (Client, Client) {
    let client = Client::connect(proxy.tcp(0));
    (client, server.accept())
}

fn ledger(proxy: &Lameduck) -> String {
    Client::unix(&proxy.control)
        .and_then(|control| control.try_ask("/ledger", &[]))
        .expect("the ledger")
        .text()
}

fn wait_parked(proxy: &Lameduck) {
    wait_for("both sides parked", || (proxy.parked() == 2).then_some(()));
}

#[test]
fn it_is_work_in_flight_and_the_server_may_speak_first() {
    let server = Server::start();
    let proxy = proxy(server.addr, &["--access-log"]);
    let (mut client, mut app) = connect(&proxy, &server);
    app.send("hello, this is a server\n");
    client.until("server\n");
    client.send([0, 255, b'\n', 7]);
    assert_eq!(app.take(4), [0, 255, b'\n', 7]);
    proxy.wait_in_flight(1);
    let row = ledger(&proxy);
    for text in ["\"tcp\"", "\"TCP\"", &server.addr.to_string(), "127.0.0.1:"] {
        assert!(row.contains(text), "{text} is not in {row}");
    }
    client.shutdown();
    app.expect_fin();
    app.shutdown();
    client.expect_fin();
    proxy.wait_in_flight(0);
    let line = proxy.process.wait_line("the access log", |line| {
        serde_json::from_str::<serde_json::Value>(line).ok().filter(|entry| entry["method"] == "TCP")
    });
    assert_eq!((&line["received"], &line["sent"]), (&4.into(), &24.into()), "{line}");
    assert_eq!((&line["ended"], &line["peer"]), (&"complete".into(), &"127.0.0.1".into()), "{line}");
    assert_eq!(proxy.metric("lameduck_requests_total{code=\"none\"}"), 1.0);
    assert_eq!(proxy.metric("lameduck_requests_ended_total{ended=\"complete\"}"), 1.0);
}

#[test]
fn either_side_may_end_its_half_first() {
    let server = Server::start();
    let proxy = proxy(server.addr, &[]);
    for client_first in [true, false] {
        let (client, app) = connect(&proxy, &server);
        let (mut first, mut other) = if client_first { (client, app) } else { (app, client) };
        first.send("all I have");
        first.shutdown();
        assert_eq!(other.read_to_end(), (b"all I have".to_vec(), Fill::Fin));
        for word in ["but", "I", "go on"] {
            other.send(word);
            assert_eq!(first.take(word.len()), word.as_bytes());
        }
        proxy.wait_in_flight(1);
        other.shutdown();
        first.expect_fin();
        proxy.wait_in_flight(0);
    }
}

#[test]
fn an_abort_of_one_side_is_one_for_the_other() {
    let server = Server::start();
    let proxy = proxy(server.addr, &[]);
    for (client_aborts, rests) in [(true, false), (false, false), (true, true), (false, true)] {
        let (client, app) = connect(&proxy, &server);
        let (mut one, mut other) = if client_aborts { (client, app) } else { (app, client) };
        one.send("x");
        other.take(1);
        if rests {
            wait_parked(&proxy);
        }
        one.reset();
        assert_eq!(other.read_to_end().1, Fill::Rst, "client aborts: {client_aborts}, parked: {rests}");
        proxy.wait_in_flight(0);
    }
    let ended = |how: &str| proxy.metric(&format!("lameduck_requests_ended_total{{ended=\"{how}\"}}"));
    assert_eq!((ended("client-gone"), ended("app-gone")), (2.0, 2.0));
}

#[test]
fn an_abort_after_an_orderly_end_is_one_too() {
    let server = Server::start();
    let proxy = proxy(server.addr, &[]);
    for client_first in [true, false] {
        let (client, app) = connect(&proxy, &server);
        let (mut first, mut other) = if client_first { (client, app) } else { (app, client) };
        first.shutdown();
        other.expect_fin();
        first.reset();
        // It has already read the clean end, so only a write can show the reset.
        let mut write = || other.try_send(b"x").is_err().then_some(());
        proxy.wait_in_flight(0);
        wait_for("a failed write", &mut write);
    }
}

#[test]
fn a_drain_still_accepts_as_a_lame_duck_then_refuses_and_waits_for_what_runs() {
    let server = Server::start();
    let mut proxy = proxy(server.addr, &["--lame-duck", "1s"]);
    let (addr, (mut early, mut early_app)) = (proxy.tcp(0), connect(&proxy, &server));
    proxy.terminate();
    proxy.wait_phase("lame-duck");
    let (mut late, mut late_app) = connect(&proxy, &server);
    late.send("hello");
    late_app.take(5);
    proxy.wait_phase("draining");
    Client::wait_refused(addr);
    for (client, app) in [(&mut early, &mut early_app), (&mut late, &mut late_app)] {
        assert!(client.is_quiet_for(MOMENT));
        client.send("still here?");
        assert_eq!(app.take(11), b"still here?");
        app.send("yes");
        client.take(3);
    }
    proxy.wait_in_flight(2);
    for (mut client, mut app) in [(early, early_app), (late, late_app)] {
        client.shutdown();
        app.expect_fin();
        app.shutdown();
        client.expect_fin();
    }
    proxy.expect_clean_exit();
}

#[test]
fn at_the_deadline_both_sides_see_a_reset() {
    let server = Server::start();
    for rests in [false, true] {
        let mut proxy = proxy(server.addr, &["--grace", "7s", "--reserve", "5s"]);
        let (mut client, mut app) = connect(&proxy, &server);
        client.send("x");
        app.take(1);
        if rests {
            wait_parked(&proxy);
        }
        proxy.terminate();
        assert_eq!(client.read_to_end(), (vec![], Fill::Rst));
        assert_eq!(app.read_to_end(), (vec![], Fill::Rst));
        assert_eq!(proxy.process.wait_exit(), 3);
        assert_eq!(proxy.wait_log("drained")["verdict"], "1 cut");
    }
}

#[test]
fn health_checks_by_tcp_do_not_hold_up_a_drain() {
    let server = Server::start();
    let mut proxy = proxy(server.addr, &["--grace", "60s"]);
    let addr = proxy.tcp(0);
    // The server closes when the proxy does.
    thread::spawn(move || {
        loop {
            server.accept().read_to_end();
        }
    });
    let check = || drop(Client::try_connect(addr));
    let (began, mut checked) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(1) {
        check();
        checked += 1;
        thread::sleep(Duration::from_millis(50));
    }
    assert!(checked > 3);
    proxy.terminate();
    let began = Instant::now();
    wait_for("the end of the lame duck", || {
        check();
        thread::sleep(Duration::from_millis(50));
        proxy.status().is_none_or(|status| status["phase"] != "lame-duck").then_some(())
    });
    // If the checks counted as arrivals, the phase would last 18 s, a third of the time to the deadline.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    proxy.expect_clean_exit();
}

#[test]
fn an_idle_connection_is_parked_and_wakes_for_either_side() {
    let server = Server::start();
    let proxy = proxy(server.addr, &[]);
    let (mut client, mut app) = connect(&proxy, &server);
    for _ in 0..2 {
        wait_parked(&proxy);
        client.send("ping");
        assert_eq!(app.take(4), b"ping");
        wait_parked(&proxy);
        app.send("pong");
        assert_eq!(client.take(4), b"pong");
    }
    wait_parked(&proxy);
    proxy.wait_in_flight(1);
    assert!(ledger(&proxy).contains("\"tcp\""), "{}", ledger(&proxy));
    client.shutdown();
    app.expect_fin();
}

#[test]
fn a_side_that_does_not_read_is_waited_for_in_little_memory() {
    let server = Server::start();
    let proxy = proxy(server.addr, &[]);
    let (mut client, mut app) = connect(&proxy, &server);
    client.send("x");
    app.take(1);
    let before = proxy.peak_memory();
    const MEGABYTES: usize = 96;
    let sending = thread::spawn(move || {
        let megabyte: Vec<u8> = (0..1 << 20).map(|at| (at % 251) as u8).collect();
        for _ in 0..MEGABYTES {
            client.send(&megabyte);
        }
        client.shutdown();
        client
    });
    thread::sleep(MOMENT);
    assert!(!sending.is_finished(), "everything was buffered");
    for _ in 0..MEGABYTES {
        let megabyte = app.take(1 << 20);
        assert!(megabyte.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8));
    }
    app.expect_fin();
    let grown = proxy.peak_memory() - before;
    assert!(grown < 4096, "{grown} KiB");
    drop(sending.join());
}

#[test]
fn a_closed_port_is_tried_again_in_time_and_then_the_client_is_reset() {
    let port = Port::reserve();
    let proxy = proxy(port.addr, &["--upstream-wait", "2s"]);
    let mut client = Client::connect(proxy.tcp(0));
    client.send("said before anybody listened");
    proxy.wait_in_flight(1);
    assert!(client.is_quiet_for(MOMENT));
    let server = Server::at(port.addr);
    let mut app = server.accept();
    assert_eq!(app.take(28), b"said before anybody listened");
    app.send("welcome");
    client.take(7);
    drop((server, app, client));

    let (began, mut client) = (Instant::now(), Client::connect(proxy.tcp(0)));
    assert_eq!(client.read_to_end(), (vec![], Fill::Rst));
    assert!(began.elapsed() > Duration::from_millis(1500), "{:?}", began.elapsed());
    assert_eq!(proxy.metric("lameduck_requests_ended_total{ended=\"app-down\"}"), 1.0);
    // A client that goes away while it waits ends at once.
    Client::connect(proxy.tcp(0)).reset();
    wait_for("its end", || {
        let gone = proxy.metric("lameduck_requests_ended_total{ended=\"client-gone\"}");
        (gone >= 1.0 && proxy.status()?["in_flight"] == 0).then_some(())
    });
}

#[test]
fn a_hold_holds_new_connections_within_limits_and_releases_them() {
    let server = Server::start();
    let proxy = proxy(server.addr, &["--max-held", "1"]);
    assert!(proxy.command_output(&["hold"]).status.success());
    let mut held = Client::connect(proxy.tcp(0));
    held.send("early");
    proxy.wait_status("held", |status| status["held"] == 1);
    assert!(Client::is_reset_by(proxy.tcp(0)));
    assert!(server.is_left_alone_for(MOMENT) && held.is_quiet_for(MOMENT));
    assert!(proxy.command_output(&["resume"]).status.success());
    let mut app = server.accept();
    assert_eq!(app.take(5), b"early");
    app.send("late");
    held.take(4);

    // A hold waits for a running connection, or leaves it alone with --keep-streams.
    let mut hold = proxy.command(&["hold", "--until-idle"]);
    proxy.wait_status("a hold", |status| status["hold"]["idle"] == false);
    assert!(proxy.command_output(&["resume"]).status.success());
    hold.wait_exit();
    assert!(proxy.command_output(&["hold", "--until-idle", "--keep-streams"]).status.success());
    held.send("on and on");
    app.take(9);
}

#[test]
fn new_connections_wait_while_the_app_is_swapped() {
    let server = Server::start();
    let proxy = proxy(server.addr, &[]);
    let marker = proxy.dir.join("go");
    let script = format!("until [ -e {} ]; do sleep 0.05; done", marker.display());
    let swap = ["swap", "--control", proxy.control.to_str().expect("UTF-8"), "--", "sh", "-c", &script];
    let mut swap = Process::start("swap", common::process::lameduck().args(swap));
    proxy.wait_status("idle", |status| status["hold"]["idle"] == true);
    let mut held = Client::connect(proxy.tcp(0));
    proxy.wait_status("held", |status| status["held"] == 1);
    assert!(server.is_left_alone_for(MOMENT));
    fs::write(marker, "").expect("a file");
    let mut app = server.accept();
    assert_eq!(swap.wait_exit(), 0, "{}", swap.output());
    held.send("hello");
    app.take(5);
}

/// An unmodified server: echoes what it receives, and at the end sends the number of bytes.
const NODE: &str = r"
const net = require('net');
const server = net.createServer({ allowHalfOpen: true }, (socket) => {
  let bytes = 0;
  socket.on('data', (data) => { bytes += data.length; socket.write(data); });
  socket.on('end', () => socket.end(`${bytes} bytes
`));
});
server.listen(0, '127.0.0.1', () => console.log(`listens on port ${server.address().port}`));
";

#[test]
fn a_node_server_loses_nothing_of_its_clients_in_a_drain() {
    let node = Process::start("node", Command::new("node").args(["-e", NODE]));
    let port: u16 = node.wait_line("its port", |line| line.strip_prefix("listens on port ")?.parse().ok());
    let mut proxy = proxy(format!("localhost:{port}"), &[]);
    let addr = proxy.tcp(0);
    let (ready, begun) = channel();
    let clients: Vec<_> = (0..8)
        .map(|number| {
            let ready = ready.clone();
            thread::spawn(move || {
                let mut client = Client::connect(addr);
                let piece = vec![number as u8; 10_000];
                for round in 0..60 {
                    client.send(&piece);
                    assert_eq!(client.take(piece.len()), piece);
                    if round == 5 {
                        ready.send(()).expect("the test waits");
                    }
                    thread::sleep(Duration::from_millis(20));
                }
                client.shutdown();
                assert_eq!(client.read_to_end(), (b"600000 bytes\n".to_vec(), Fill::Fin));
            })
        })
        .collect();
    (0..8).for_each(|_| begun.recv_timeout(common::LIMIT).expect("every client is sending"));
    proxy.terminate();
    clients.into_iter().for_each(|client| client.join().expect("nothing lost"));
    proxy.expect_clean_exit();
}

#[test]
fn a_switch_of_the_app_leaves_it_where_it_is() {
    let server = Server::start();
    let (app, green) = (RawApp::start(), RawApp::start());
    let route = format!("127.0.0.1:0={}", server.addr);
    let proxy = Lameduck::proxy(app.addr, &["--tcp", &route]);
    assert!(proxy.command_output(&["switch", &green.addr.to_string()]).status.success());
    let (mut client, mut there) = connect(&proxy, &server);
    client.send("same place");
    there.take(10);
}

#[test]
fn several_lead_each_to_its_own_server_a_unix_socket_too() {
    let (one, dir) = (Server::start(), temporary_directory());
    let path = dir.join("db.sock");
    let two = Server {
        listener: Socket::from(OwnedFd::from(UnixListener::bind(&path).expect("a socket"))),
        addr: one.addr,
    };
    let routes = format!("127.0.0.1:0={},127.0.0.1:0=unix:{}", one.addr, path.display());
    let proxy = Lameduck::proxy(RawApp::start().addr, &["--tcp", &routes]);
    for (number, server) in [&one, &two].into_iter().enumerate() {
        let mut client = Client::connect(proxy.tcp(number));
        let mut app = server.accept();
        client.send("which one?");
        app.take(10);
        wait_parked(&proxy);
        app.send(format!("number {number}"));
        client.until(&format!("number {number}"));
        client.shutdown();
        app.expect_fin();
        drop(app);
        client.expect_fin();
        proxy.wait_in_flight(0);
    }
    let _ = fs::remove_dir_all(dir);
}
