//! A drain with nothing in flight returns as soon as the lame-duck phase is over, not after the grace period.

use crate::common;

use common::process::{Lameduck, Node, TOKEN};
use std::time::{Duration, Instant};

const LAME_DUCK: Duration = Duration::from_millis(700);
const TIMES: [&str; 4] = ["--grace", "120s", "--lame-duck", "700ms"];

/// At least the lame-duck phase, and far less than the deadline of 115 s; the range is wide for busy machines.
fn assert_only_a_lame_duck(took: Duration) {
    assert!(took >= LAME_DUCK && took < 6 * LAME_DUCK, "{took:?}");
}

#[test]
fn sigterm_with_nothing_in_flight() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &TIMES);
    let begun = Instant::now();
    proxy.terminate();
    proxy.expect_clean_exit();
    assert_only_a_lame_duck(begun.elapsed());
}

#[test]
fn the_hook_with_nothing_in_flight() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &TIMES);
    let begun = Instant::now();
    assert_eq!(proxy.hook("/drain", Some(TOKEN)).answer().head.status, 200);
    assert_only_a_lame_duck(begun.elapsed());
}
