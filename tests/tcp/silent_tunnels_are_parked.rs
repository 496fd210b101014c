//! A tunnel without traffic is parked, and neither side can tell.

use crate::common;

use std::fs;
use std::path::Path;

use common::MOMENT;
use common::app::{Asked, RawApp};
use common::http::{Client, Fill};
use common::process::{Lameduck, Node};
use common::wait_for;
use common::websocket::{TEXT, WebSocket};

/// Waits until both sides of this number of tunnels are parked.
fn wait_parked(proxy: &Lameduck, tunnels: usize) {
    wait_for(&format!("{tunnels} parked"), || (proxy.parked() == 2 * tunnels).then_some(()));
}

/// An upgraded connection that is not a WebSocket.
fn tunnel(proxy: &Lameduck, app: &RawApp) -> (Client, Asked) {
    let mut client = proxy.client();
    client.request("GET", "/shell", &["Connection: Upgrade", "Upgrade: other"]);
    let mut asked = app.asked();
    asked.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\nhi");
    assert_eq!(client.head().status, 101);
    client.until("hi");
    (client, asked)
}

#[test]
fn it_stays_in_flight_and_wakes_for_either_side() {
    let app = Node::chat();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut ada = WebSocket::open(proxy.listen, "/chat?name=ada");
    ada.receive();
    for round in 1..=3 {
        wait_parked(&proxy, 1);
        proxy.wait_in_flight(1);
        let ledger = Client::unix(&proxy.control).and_then(|control| control.try_ask("/ledger", &[]));
        let ledger = ledger.expect("the ledger").text();
        assert!(ledger.contains("websocket") && ledger.contains("/chat"), "{ledger}");
        ada.send(TEXT, format!("is anybody there? {round}").as_bytes());
        assert!(ada.receive().text().contains(&format!("is anybody there? {round}")));
    }
    wait_parked(&proxy, 1);
    // Now the app sends first.
    let mut bob = WebSocket::open(app.addr, "/chat?name=bob");
    bob.receive();
    assert!(ada.receive().text().contains("bob"));
    wait_parked(&proxy, 1);
    drop(ada);
    assert!(bob.receive().text().contains("left"));
    proxy.wait_in_flight(0);
    wait_parked(&proxy, 0);
}

#[test]
fn a_drain_ends_it_with_1001_both_ways() {
    let app = Node::chat();
    let mut proxy = Lameduck::proxy(app.addr, &["--stream-spread", "300ms"]);
    let mut sockets: Vec<_> =
        ["ada", "bob"].map(|name| WebSocket::open(proxy.listen, &format!("/chat?name={name}"))).into();
    sockets[0].receive();
    sockets.iter_mut().for_each(|socket| drop(socket.receive()));
    wait_parked(&proxy, 2);

    proxy.terminate();
    // The app tells each client that the other one left, if that client is still connected.
    let mut ended = 0;
    for socket in &mut sockets {
        loop {
            let frame = socket.receive();
            if let Some(code) = frame.close_code() {
                assert_eq!(code, 1001);
                socket.send(common::websocket::CLOSE, &code.to_be_bytes());
                assert_eq!(socket.client.read_to_end().1, Fill::Fin);
                ended += 1;
                break;
            }
            assert!(frame.text().contains("left"), "{frame:?}");
        }
    }
    assert_eq!(ended, 2);
    for name in ["ada", "bob"] {
        let left = format!("{name} left with code 1001");
        app.process.wait_line(&left, |line| (line == left).then_some(()));
    }
    proxy.expect_clean_exit();
}

#[test]
fn one_that_is_no_websocket_runs_on_to_the_deadline_and_is_cut() {
    let app = RawApp::start();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "8s", "--reserve", "5s"]);
    let (mut client, mut asked) = tunnel(&proxy, &app);
    wait_parked(&proxy, 1);
    proxy.terminate();
    proxy.wait_phase("draining");
    assert!(client.is_quiet_for(MOMENT));
    client.send("ho");
    assert_eq!(asked.take(2), "ho");
    assert_eq!(client.read_to_end().1, Fill::Rst);
    proxy.process.wait_exit();
    assert_eq!(proxy.wait_log("drained")["verdict"], "1 cut");
}

#[test]
fn it_ends_when_either_side_does() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let (client, mut asked) = tunnel(&proxy, &app);
    wait_parked(&proxy, 1);
    drop(client);
    assert_eq!(asked.rest(), "");
    drop(asked);
    proxy.wait_in_flight(0);

    let (mut client, asked) = tunnel(&proxy, &app);
    wait_parked(&proxy, 1);
    drop(asked);
    client.expect_fin();
    drop(client);
    proxy.wait_in_flight(0);

    // A half-closed tunnel stays open, because the other side may still send.
    let (mut client, mut asked) = tunnel(&proxy, &app);
    wait_parked(&proxy, 1);
    client.shutdown();
    assert_eq!(asked.rest(), "");
    asked.send("late");
    client.until("late");
}

#[test]
fn one_in_the_middle_of_a_frame_is_not() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut whole = WebSocket::open(proxy.listen, "/half-frame");
    let mut half = WebSocket::open(proxy.listen, "/half-frame");
    for socket in [&mut whole, &mut half] {
        socket.client.take(6);
    }
    app.release();
    for socket in [&mut whole, &mut half] {
        socket.client.take(6);
    }
    // The first half of a frame of six bytes, from the client.
    half.client.send([0x82, 0x86, 1, 2, 3, 4, 5]);
    app.process.wait_line("half a frame", |line| line.contains("socket got 8286").then_some(()));
    wait_parked(&proxy, 1);
    assert!((0..30).all(|_| {
        std::thread::sleep(MOMENT / 6);
        proxy.parked() == 2
    }));
}

#[test]
fn it_wakes_for_an_app_behind_a_unix_socket() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("parked-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a directory");
    let path = dir.join("app.sock");
    let app = RawApp::unix(&path);
    let proxy = Lameduck::proxy_to(&format!("unix:{}", path.display()), &[]);
    let (mut client, mut asked) = tunnel(&proxy, &app);
    wait_parked(&proxy, 1);
    asked.send("from the app");
    client.until("from the app");
    wait_parked(&proxy, 1);
    client.send("from the client");
    assert_eq!(asked.take(15), "from the client");
    let _ = fs::remove_dir_all(dir);
}
