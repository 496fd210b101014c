//! A WebSocket handshake that is in progress at SIGTERM still gets its `Upgrade`.

use crate::common;

use common::process::{Lameduck, Node};
use common::websocket::{TEXT, WebSocket};

fn handshake_answered_in(phase: &str) {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--lame-duck", "2s"]);
    let mut socket = WebSocket::begin(proxy.listen, "/late-handshake");
    app.wait_active(1);

    proxy.terminate();
    proxy.wait_phase(phase);
    app.release();
    socket.accepted();
    if phase == "lame-duck" {
        socket.send(TEXT, b"hi");
        // Masked as it was sent: 0x81, 0x82, the mask, two bytes.
        app.process.wait_line("the frame", |line| line.contains("socket got 81825ac30f9932aa").then_some(()));
    }
    socket.expect_close(1001);
}

#[test]
fn a_handshake_answered_in_the_lame_duck_keeps_its_upgrade() {
    handshake_answered_in("lame-duck");
}

#[test]
fn a_handshake_answered_while_draining_keeps_its_upgrade() {
    handshake_answered_in("draining");
}
