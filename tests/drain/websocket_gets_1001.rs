//! A WebSocket gets Close 1001 on both sides, on a frame boundary.

use crate::common;

use common::process::{Lameduck, Node};
use common::websocket::{TEXT, WebSocket};
use common::{LIMIT, MOMENT};
use std::time::{Duration, Instant};

#[test]
fn both_sides_of_a_chat_hear_1001() {
    let app = Node::chat();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut socket = WebSocket::open(proxy.listen, "/chat?name=ada");
    assert!(socket.receive().text().contains("joined"));
    socket.send(TEXT, b"is anybody there?");
    assert!(socket.receive().text().contains("is anybody there?"));
    proxy.wait_in_flight(1);

    proxy.terminate();
    socket.expect_close(1001);
    // `ws` rejects unmasked frames, so this code shows that the proxy's Close was masked.
    app.process.wait_line("ada's end", |line| (line == "ada left with code 1001").then_some(()));
    proxy.expect_clean_exit();
}

#[test]
fn a_frame_that_is_half_sent_is_finished_first() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut socket = WebSocket::open(proxy.listen, "/half-frame");
    let mut begun = socket.client.take(6);

    proxy.terminate();
    proxy.wait_phase("draining");
    assert!(socket.client.is_quiet_for(MOMENT), "something came in the middle of a frame");
    app.release();
    begun.extend(socket.client.take(6));
    assert_eq!(begun, b"\x81\x0ahalf-whole");
    socket.expect_close(1001);
    // The app's Close frame: final, opcode 8, masked, two bytes or more.
    app.process.wait_line("the Close frame", |line| line.contains("socket got 888").then_some(()));
    drop(app);
    proxy.process.wait_exit();
}

#[test]
fn a_client_that_does_not_answer_is_not_waited_for_long() {
    let app = Node::chat();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s"]);
    let mut socket = WebSocket::open(proxy.listen, "/chat?name=silent");
    socket.receive();

    let begun = Instant::now();
    proxy.terminate();
    assert_eq!(socket.receive().close_code(), Some(1001));
    proxy.process.wait_exit();
    assert!(begun.elapsed() < LIMIT.min(Duration::from_secs(10)), "{:?}", begun.elapsed());
}
