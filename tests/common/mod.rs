//! Helpers of the end-to-end tests: lameduck and real Node apps as processes, and clients that see every byte.

// Each area's binary uses only a part of this.
#![allow(dead_code)]

pub mod app;
pub mod grpc;
pub mod http;
pub mod http2;
pub mod pod;
pub mod port;
pub mod process;
pub mod random;
pub mod tls;
pub mod users;
pub mod websocket;

use std::thread;
use std::time::{Duration, Instant};

/// Time limit for anything that a test waits for. Generous, so that a busy machine causes no failures.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Time after which a test concludes that something does *not* happen.
pub const MOMENT: Duration = Duration::from_millis(300);

/// Calls `ask` until it returns a value, at growing intervals.
///
/// # Panics
/// After [`LIMIT`], with `what`.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        let waited = begun.elapsed();
        assert!(waited < LIMIT, "{what}: not within {LIMIT:?}");
        thread::sleep((waited / 16).clamp(Duration::from_millis(2), Duration::from_millis(50)));
    }
}
