//! The lame-duck phase lasts until no new connections arrive, however busy kept-alive ones were before: those get
//! `Connection: close`, and do not show whether a load balancer still sends new connections.

use crate::common;

use std::time::{Duration, Instant};

use common::process::{Lameduck, Node};

#[test]
fn busy_kept_alive_connections_do_not_shorten_it() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "60s"]);
    let mut kept = proxy.client();
    let began = Instant::now();
    // Three new connections within about a second, and continuous requests over one kept-alive connection.
    let mut callers = 1;
    while callers < 3 {
        kept.get("/");
        assert_eq!(kept.answer().head.status, 200);
        if began.elapsed() >= Duration::from_millis(400) * callers {
            let mut new = proxy.client();
            new.get("/");
            assert_eq!(new.answer().head.status, 200);
            callers += 1;
        }
    }
    // Seven times the mean gap between connections. Gaps between requests would give the minimum of one second.
    let least = began.elapsed() * 7 / 3;
    let begun = Instant::now();
    proxy.terminate();
    // The log, not the phase: with nothing in flight, Draining lasts only a moment.
    proxy.wait_log("new connections are refused");
    let took = begun.elapsed();
    assert!(took >= least.mul_f64(0.9), "{took:?} of {least:?}");
    drop(kept);
    proxy.expect_clean_exit();
}
