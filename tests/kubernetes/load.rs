//! The load client as a child process inside the cluster's network.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::cluster::inside;
use super::images::{scratch, target_dir};

/// How long the load may still run once it was told to end: its longest request, and being held.
const TAIL: Duration = Duration::from_secs(150);

/// Load that runs.
pub struct Load {
    name: String,
    out: PathBuf,
    child: Child,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome(pub Value);

impl Load {
    /// Starts it with these arguments; its name is for the one who reads along.
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        let program = target_dir().join("debug/examples/load");
        let out = scratch(&format!("load-{}.json", name.replace('/', "-")));
        let mut command = inside(program.to_str().expect("a path in UTF-8"));
        command.args(arguments).stdin(Stdio::piped()).stdout(File::create(&out).expect("a file"));
        Self { name: name.to_owned(), out, child: command.spawn().expect("the load client") }
    }

    /// Ends it once it has made the requests it was asked for, and returns what came of them.
    ///
    /// # Panics
    /// When it doesn't end.
    pub fn finish(mut self) -> Outcome {
        drop(self.child.stdin.take());
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
    /// At least so many requests were made, and none was lost.
    pub fn expect_nothing_lost(&self, of_at_least: u64) {
        let untranslated = self.untranslated();
        if untranslated > 0 {
            println!(
                "{untranslated} connections never left the client's node: kube-proxy left them the Service's address"
            );
        }
        assert_eq!(self.0["lost"], untranslated, "requests were lost: {:#}", self.0["samples"]);
        assert!(self.0["requests"].as_u64().is_some_and(|made| made >= of_at_least), "too few requests");
    }

    /// How many connections no pod can have seen, one at most. A packet for a Service's address is translated to a pod's
    /// by the client's own node. While kube-proxy writes its rules anew, the kernel lets one pass now and then (seen at three of
    /// some twenty Services): it asks the network who the Service's address is, nobody answers, and that stands in the node's
    /// table of neighbours. A pod that has gone leaves its own address there.
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

    /// At least so many streams or WebSockets were ended by the server, each in the way that its protocol has for it.
    pub fn expect_announced_ends(&self, kind: &str, at_least: u64) {
        assert!(self.0["announced_ends"][kind].as_u64() >= Some(at_least), "{:#}", self.0);
    }

    /// How many requests of this kind were lost.
    pub fn lost(&self, kind: &str) -> u64 {
        self.0["kinds"][kind]["lost"].as_u64().unwrap_or_default()
    }
}
