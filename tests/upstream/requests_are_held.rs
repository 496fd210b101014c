//! A hold: new requests wait within limits, running ones may finish, streams end as announced or stay.

use crate::common;

use std::time::{Duration, Instant};

use common::http::Client;
use common::process::{Lameduck, Node};
use common::websocket::{TEXT, WebSocket};
use common::{MOMENT, wait_for};

#[test]
fn what_runs_may_finish_and_then_a_hold_is_idle() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let (mut running, mut held) = (proxy.client(), proxy.client());
    running.get("/wait");
    app.wait_active(1);

    let mut hold = proxy.command(&["hold", "--until-idle"]);
    proxy.wait_status("a hold", |status| status["hold"]["idle"] == false);
    held.get("/");
    proxy.wait_status("a held request", |status| status["held"] == 1);
    assert!(held.is_quiet_for(MOMENT) && hold.exited().is_none(), "not held, or idle while a request ran");
    app.release();
    assert_eq!(running.answer().text(), "released\n");
    assert_eq!(hold.wait_exit(), 0);
    assert!(held.is_quiet_for(MOMENT), "released by itself");
    assert_eq!(proxy.status().expect("a status")["hold"]["idle"], true);

    assert!(proxy.command_output(&["resume"]).status.success());
    assert_eq!(held.answer().head.status, 200);
    assert!(proxy.status().expect("a status")["hold"].is_null());
}

#[test]
fn past_its_bounds_a_hold_answers_503_with_retry_after() {
    let app = Node::held();
    for bound in [["--max-held", "1"], ["--max-held-bytes", "1KiB"]] {
        let proxy = Lameduck::proxy(app.addr, &bound);
        assert!(proxy.command_output(&["hold"]).status.success());
        let (mut held, mut refused) = (proxy.client(), proxy.client());
        held.get("/");
        proxy.wait_status("held", |status| status["held"] == 1);
        refused.get("/");
        let answer = refused.answer();
        assert_eq!((answer.head.status, answer.head.header("retry-after")), (503, Some("1")));
        assert!(proxy.command_output(&["resume"]).status.success());
        assert_eq!(held.answer().head.status, 200);
    }
}

#[test]
fn a_hold_ends_by_itself_after_its_longest_time() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut running = proxy.client();
    running.get("/wait");
    app.wait_active(1);
    let began = Instant::now();
    let mut hold = proxy.command(&["hold", "--until-idle", "--max", "1s"]);
    proxy.wait_status("a hold", |status| !status["hold"].is_null());
    let mut held = proxy.client();
    held.get("/");
    assert_eq!(held.answer().head.status, 200);
    assert!(began.elapsed() >= Duration::from_secs(1), "released after {:?}", began.elapsed());
    assert_eq!(hold.wait_exit(), 1);
    assert!(hold.output().contains("not idle in time"), "{}", hold.output());
}

#[test]
fn a_drain_ends_a_hold_and_a_hold_does_not_end_a_drain() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut running = proxy.client();
    running.get("/wait");
    app.wait_active(1);
    assert!(proxy.command_output(&["hold"]).status.success());
    let mut held = proxy.client();
    held.get("/");
    proxy.wait_status("held", |status| status["held"] == 1);
    proxy.terminate();
    assert_eq!(held.answer().head.status, 200);
    let refused = proxy.command_output(&["hold"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("a drain or a restart is under way"));
    app.release();
    running.answer();
    proxy.expect_clean_exit();
}

#[test]
fn websockets_end_or_stay_and_delay_no_hold() {
    let app = Node::chat();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut socket = WebSocket::open(proxy.listen, "/chat?name=ada");
    assert!(socket.receive().text().contains("joined"));
    assert!(proxy.command_output(&["hold", "--until-idle", "--keep-streams"]).status.success());
    socket.send(TEXT, b"still here");
    assert!(socket.receive().text().contains("still here"));
    // A new hold may end the streams after all.
    let mut hold = proxy.command(&["hold", "--until-idle"]);
    socket.expect_close(1001);
    assert_eq!(hold.wait_exit(), 0);
    drop(socket);
    // The client reconnects and is held.
    let mut again = WebSocket::begin(proxy.listen, "/chat?name=ada");
    proxy.wait_status("held", |status| status["held"] == 1);
    assert!(proxy.command_output(&["resume"]).status.success());
    again.accepted();
    wait_for("the WebSocket in flight", || (proxy.status()?["in_flight"] == 1).then_some(()));
    assert!(again.receive().text().contains("joined"));
}

/// A held `--tcp` connection is not a kept stream, so it must not be counted in place of a running request.
#[test]
fn a_held_tcp_connection_does_not_count_as_a_kept_stream() {
    let app = Node::held();
    let route = format!("127.0.0.1:0={}", app.addr);
    let proxy = Lameduck::proxy(app.addr, &["--tcp", &route]);
    let mut running = proxy.client();
    running.get("/wait");
    app.wait_active(1);
    let mut hold = proxy.command(&["hold", "--until-idle", "--keep-streams"]);
    proxy.wait_status("a hold", |status| !status["hold"].is_null());
    let _held = Client::connect(proxy.tcp(0));
    proxy.wait_status("held", |status| status["held"] == 1);
    std::thread::sleep(MOMENT);
    assert_eq!((hold.exited(), hold.output().contains("idle:")), (None, false), "idle while a request ran");
    app.release();
    assert_eq!(running.answer().text(), "released\n");
    assert_eq!(hold.wait_exit(), 0);
}
