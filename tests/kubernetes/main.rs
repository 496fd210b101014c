//! On a real cluster, no client request is lost while pods come and go.
//!
//! ```text
//! LAMEDUCK_CLUSTER=path/to/cluster cargo test --test kubernetes -- --ignored --nocapture --test-threads 2
//! ```
//!
//! The engine is a program with `up`, `load` and `run`; next to it is a program `image` that makes image archives.
//! `LAMEDUCK_BIN` names a static binary to test instead of building one. As many cases run at a time as there are test
//! threads; a case that removes a node or the webhook runs alone.

mod bypassed;
mod calls;
mod captured;
mod cluster;
mod come_and_go;
mod databases;
mod deploy;
mod endings;
mod headless;
mod images;
mod ipv6;
mod jobs;
mod load;
mod manifests;
mod pods;
mod recipes;
mod restarts;
mod rollouts;
mod runtimes;
mod webhook;

use std::time::Duration;

/// Pause before and after each operation on the pods, so that clients of every kind are active during it.
const WARM: Duration = Duration::from_secs(5);
