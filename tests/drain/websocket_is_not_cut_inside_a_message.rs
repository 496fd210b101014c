//! A message that is being sent when WebSockets end is completed, however slowly its reader takes it; a WebSocket that
//! is cut anyway is never reported as clean.

use crate::common;

use std::thread;
use std::time::Duration;

use common::MOMENT;
use common::http::{Client, Fill};
use common::process::{Lameduck, Node};
use common::websocket::{TEXT, WebSocket};

/// Size of the frame that `/big-frame` sends, in bytes.
const BIG: usize = 24 << 20;
/// Longer than the proxy waits for the peer's Close.
const PAST_CLOSING: Duration = Duration::from_millis(2500);

/// A client that has read only the header of the big frame.
fn slow_reader(proxy: &Lameduck) -> WebSocket {
    let mut socket = WebSocket::begin_over(Client::connect_narrow(proxy.listen), "/big-frame");
    socket.accepted();
    assert_eq!(socket.client.take(10), [&[0x82, 127][..], &(BIG as u64).to_be_bytes()].concat());
    socket
}

/// Whether the app has received a Close frame: final, opcode 8, masked, two bytes.
fn app_heard_close(app: &Node) -> bool {
    app.process.output().contains("socket got 8882")
}

#[test]
fn a_frame_to_a_slow_reader_is_finished_first() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s"]);
    let mut socket = slow_reader(&proxy);

    proxy.terminate();
    proxy.wait_phase("draining");
    thread::sleep(PAST_CLOSING);
    assert_eq!(proxy.status().expect("still there")["in_flight"], 1);
    // If the app received a Close during its own frame, it would give up on that frame after a while.
    assert!(!app_heard_close(&app), "{}", app.process.output());
    // Meanwhile the other direction still works.
    socket.send(TEXT, b"more");
    app.process.wait_line("the client's message", |line| line.starts_with("socket got 8184").then_some(()));
    assert_eq!(socket.client.take(BIG).len(), BIG);
    socket.expect_close(1001);
    app.process.wait_line("the Close frame", |line| line.contains("socket got 8882").then_some(()));
    proxy.expect_clean_exit();
}

#[test]
fn a_hold_waits_for_it_too() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut socket = slow_reader(&proxy);
    let mut hold = proxy.command(&["hold", "--until-idle"]);
    proxy.wait_status("a hold", |status| !status["hold"].is_null());
    thread::sleep(PAST_CLOSING);
    assert_eq!(hold.exited(), None, "idle in the middle of a frame");
    assert_eq!(socket.client.take(BIG).len(), BIG);
    socket.expect_close(1001);
    assert_eq!(hold.wait_exit(), 0, "{}", hold.output());
}

#[test]
fn a_frame_from_a_slow_sender_is_finished_first() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s"]);
    let mut socket = WebSocket::open(proxy.listen, "/half-frame");
    socket.client.take(6);
    app.release();
    socket.client.take(6);
    // The first half of a frame of six bytes.
    socket.client.send([0x82, 0x86, 1, 2, 3, 4, 5]);
    app.process.wait_line("half a frame", |line| line.contains("socket got 8286").then_some(()));

    proxy.terminate();
    proxy.wait_phase("draining");
    // If the client received a Close during its own frame, it would never send the rest.
    assert!(socket.client.is_quiet_for(PAST_CLOSING), "something came in the middle of a frame");
    socket.client.send([6, 7, 8, 9, 10]);
    app.process.wait_line("the rest", |line| line.contains("socket got 060708090a").then_some(()));
    assert_eq!(socket.receive().close_code(), Some(1001));
    drop(socket);
    drop(app);
    proxy.expect_clean_exit();
}

#[test]
fn a_message_in_several_frames_is_finished_first() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut socket = WebSocket::open(proxy.listen, "/fragments");
    assert_eq!(socket.receive().text(), "first");

    proxy.terminate();
    proxy.wait_phase("draining");
    assert!(socket.client.is_quiet_for(MOMENT), "something came in the middle of a message");
    app.release();
    let last = socket.receive();
    assert_eq!((last.text().as_str(), last.fin), ("-last", true));
    socket.expect_close(1001);
    proxy.expect_clean_exit();
}

#[test]
fn one_that_does_not_end_by_the_deadline_counts_as_cut() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "5s", "--reserve", "1s"]);
    let mut socket = slow_reader(&proxy);
    proxy.terminate();
    assert_eq!(proxy.process.wait_exit(), 3);
    assert_eq!(proxy.wait_log("drained")["verdict"], "1 cut");
    assert_eq!(socket.client.read_to_end().1, Fill::Rst);
}

#[test]
fn one_whose_app_dies_counts_as_lost() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut socket = WebSocket::open(proxy.listen, "/half-frame");
    socket.client.take(6);
    proxy.terminate();
    proxy.wait_phase("draining");
    drop(app);
    let (rest, _) = socket.client.read_to_end();
    assert!(!rest.starts_with(&[0x88]), "a Close in the middle of a frame");
    drop(socket);
    assert_eq!(proxy.process.wait_exit(), 3);
    assert_eq!(proxy.wait_log("drained")["verdict"], "1 app-gone");
}
