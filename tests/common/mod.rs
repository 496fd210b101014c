//! What the end-to-end tests share: lameduck and real Node apps as processes, and clients that see every byte.

// Each test file is a program of its own and uses a part of this.
#![allow(dead_code)]

pub mod app;
pub mod grpc;
pub mod http;
pub mod http2;
pub mod pod;
pub mod port;
pub mod process;
pub mod tls;
pub mod users;
pub mod websocket;

use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take before a test gives up. Far more than needed, so that a busy machine fails nothing.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Long enough to see that something does *not* happen.
pub const MOMENT: Duration = Duration::from_millis(300);

/// Asks again and again until there is an answer, less often the longer it takes.
///
/// # Panics
/// After [`LIMIT`], saying `what` never came.
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
