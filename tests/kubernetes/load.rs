//! The load client as a child process inside the cluster's network.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::cluster::inside;
use super::images::{scratch, target_dir};

/// Time limit for the load to end after its input is closed: the longest request, plus the time it may be held.
const TAIL: Duration = Duration::from_secs(150);

/// The running load client.
pub struct Load {
    name: String,
    out: PathBuf,
    child: Child,
}

/// The load client's report.
#[derive(Debug)]
pub struct Outcome(pub Value);

impl Load {
    /// Starts the client with these arguments; `name` is printed with its result.
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        let program = target_dir().join("debug/examples/load");
        let out = scratch(&format!("load-{}.json", name.replace('/', "-")));
        let mut command = inside(program.to_str().expect("a path in UTF-8"));
        command.args(arguments).stdin(Stdio::piped()).stdout(File::create(&out).expect("a file"));
        Self { name: name.to_owned(), out, child: command.spawn().expect("the load client") }
    }

    /// Lets the load end after `--requests` have been made.
    pub fn end(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Ends the load after `--requests` have been made, and returns its report.
    ///
    /// # Panics
    /// If it does not end within [`TAIL`].
    pub fn finish(mut self) -> Outcome {
        self.end();
        let end = Instant::now() + TAIL;
        while self.child.try_wait().expect("a child").is_none() {
            assert!(Instant::now() < end, "the load did not end within {TAIL:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
        let text = std::fs::read_to_string(&self.out).expect("the load's report");
        let outcome: Value = serde_json::from_str(&text).expect("JSON");
        let all = if outcome["lost"] == 0 { String::new() } else { format!(": {outcome:#}") };
        println!("{}: {} requests, {} lost{all}", self.name, outcome["requests"], outcome["lost"]);
        Outcome(outcome)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Outcome {
    /// Checks that no request was lost, out of at least this number.
    pub fn expect_nothing_lost(&self, of_at_least: u64) {
        let untranslated = self.untranslated();
        if untranslated > 0 {
            println!(
                "{untranslated} connections never reached a pod: kube-proxy did not translate the Service's address"
            );
        }
        assert_eq!(self.0["lost"], untranslated, "lost requests: {:#}", self.0["samples"]);
        assert!(self.0["requests"].as_u64().is_some_and(|made| made >= of_at_least), "too few requests");
    }

    /// Number of connections that cannot have reached any pod, at most one. The client's node translates a Service's
    /// address to a pod's. While kube-proxy rewrites its rules, the kernel sometimes sends a packet untranslated (seen
    /// with 3 of about 20 Services). No host answers for the Service's address, so the node's neighbour table has a
    /// FAILED entry for it. A pod that is gone would leave an entry with the pod's address instead.
    fn untranslated(&self) -> u64 {
        let nobody = |sample: &&str| {
            let to = sample.strip_suffix(":80").and_then(|sample| sample.split_once("(os error 113)"));
            let address =
                to.and_then(|(_, rest)| rest.rsplit_once("connect to ")).map(|(_, address)| address);
            address.is_some_and(|address| {
                let neighbour = inside("ip").args(["neigh", "show", address]).output().expect("ip");
                String::from_utf8_lossy(&neighbour.stdout).contains("FAILED")
            })
        };
        let samples = self.0["samples"].as_array().into_iter().flatten().filter_map(Value::as_str);
        samples.filter(nobody).count().min(1) as u64
    }

    /// Checks that the server ended at least this number of streams or WebSockets, each as its protocol provides.
    pub fn expect_announced_ends(&self, kind: &str, at_least: u64) {
        assert!(self.0["announced_ends"][kind].as_u64() >= Some(at_least), "{:#}", self.0);
    }

    /// Number of lost requests of this kind.
    pub fn lost(&self, kind: &str) -> u64 {
        self.0["kinds"][kind]["lost"].as_u64().unwrap_or_default()
    }
}
