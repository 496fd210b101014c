//! A second SIGTERM or SIGINT forces the end of the drain.

use crate::common;

use common::process::{Lameduck, Node};
use rustix::process::Signal;

fn forced_by(second: Signal) {
    let app = Node::slow();
    // The deadline comes later than any wait of a test would allow.
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "120s"]);
    let mut client = proxy.client();
    client.get("/hang");
    app.wait_active(1);

    proxy.terminate();
    proxy.wait_status("a drain", |status| status["phase"] != "serving");
    proxy.process.signal(second);
    let answer = client.answer();
    assert_eq!(answer.head.status, 504);
    client.expect_fin();
    proxy.process.wait_exit();
    assert_ne!(proxy.wait_log("drained")["verdict"], "clean");
}

#[test]
fn a_second_sigterm_forces() {
    forced_by(Signal::TERM);
}

#[test]
fn a_sigint_after_sigterm_forces() {
    forced_by(Signal::INT);
}
