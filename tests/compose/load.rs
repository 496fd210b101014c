//! The load client as a child process.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Time limit for the load to end after its input is closed: the longest request, plus the time it may be held.
const TAIL: Duration = Duration::from_secs(120);
/// Number of clients of each kind, 60 in all. For cases in which new requests wait for running ones: the longest
/// request is a stream of 10 s.
pub const HELD: &str = "keep-alive:16,new:8,slow:10,stream:6,upload:4,download:2,idle:4,events:4,websocket:6";
/// The same for cases in which no request waits for another one; responses take up to 20 s.
pub const LONG: &str =
    "keep-alive:14,new:8,slow:10,long:2,stream:6,upload:4,download:2,idle:4,events:4,websocket:6";

/// The running load client.
pub struct Load(Child);

/// The load client's report.
#[derive(Debug)]
pub struct Outcome(Value);

impl Load {
    /// Starts the client and gives all its connections time to open.
    pub fn start(port: u16, kinds: &str) -> Self {
        let me = std::env::current_exe().expect("a path");
        // target/debug/deps/me
        let program = me.ancestors().nth(2).expect("target/debug").join("examples/load");
        let mut command = Command::new(program);
        command.args(["--addr", &format!("127.0.0.1:{port}"), "--kinds", kinds]);
        command.stdin(Stdio::piped()).stdout(File::create(out()).expect("a file"));
        let load = Self(command.spawn().expect("the load client"));
        sleep(Duration::from_secs(3));
        load
    }

    /// Runs the load for three more seconds, ends it and returns its report.
    ///
    /// # Panics
    /// If it does not end within [`TAIL`].
    pub fn finish(mut self) -> Outcome {
        sleep(Duration::from_secs(3));
        drop(self.0.stdin.take());
        let end = Instant::now() + TAIL;
        while self.0.try_wait().expect("a child").is_none() {
            assert!(Instant::now() < end, "the load did not end within {TAIL:?}");
            sleep(Duration::from_millis(50));
        }
        let text = std::fs::read_to_string(out()).expect("the load's report");
        Outcome(serde_json::from_str(&text).expect("JSON"))
    }
}

fn out() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("compose-load.json")
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Outcome {
    /// Number of requests made, and of those lost.
    pub fn counts(&self) -> (u64, u64) {
        let number = |name: &str| self.0[name].as_u64().expect("a number");
        (number("requests"), number("lost"))
    }

    /// Number of lost requests by kind of loss.
    pub fn losses(&self) -> &Value {
        &self.0["losses"]
    }

    /// Duration of the slowest short request.
    pub fn pause(&self) -> Duration {
        let slowest = |kind: &str| self.0["kinds"][kind]["slowest_ms"].as_u64().unwrap_or(0);
        Duration::from_millis(slowest("keep-alive").max(slowest("new")))
    }

    /// Checks that no request was lost, out of at least this number.
    pub fn expect_nothing_lost(&self, of_at_least: u64) {
        let (made, lost) = self.counts();
        assert_eq!(lost, 0, "lost requests: {:#}", self.0);
        assert!(made >= of_at_least, "only {made} requests were made");
    }
}
