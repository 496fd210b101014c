//! A control group with a tenth of a CPU, a typical limit of a small pod.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::server::Result;

/// CPU time in µs per period of 0.1 s: 0.1 CPU, as the kubelet writes it for `100m`.
const QUOTA: &str = "10000";
const PERIOD: &str = "100000";

/// The group; removed on drop, after its processes have ended.
pub struct Quota(PathBuf);

impl Quota {
    /// Creates a group; requires write access to the cgroup file system.
    pub fn new(name: &str) -> Result<Self> {
        let name = format!("lameduck-{name}-{}", std::process::id());
        let make = |parent: &Path, files: &[(&str, &str)]| {
            let quota = Self(parent.join(&name));
            fs::create_dir(&quota.0).map_err(|error| format!("{}: {error}", quota.0.display()))?;
            for (file, value) in files {
                let file = quota.0.join(file);
                fs::write(&file, value).map_err(|error| format!("{}: {error}", file.display()))?;
            }
            Ok(quota)
        };
        let (v1, v2) = (Path::new("/sys/fs/cgroup/cpu"), Path::new("/sys/fs/cgroup"));
        if v1.is_dir() {
            return make(v1, &[("cpu.cfs_period_us", PERIOD), ("cpu.cfs_quota_us", QUOTA)]);
        }
        make(v2, &[("cpu.max", &format!("{QUOTA} {PERIOD}"))])
    }

    /// Wraps the command so that it joins the group before it starts.
    pub fn confine(&self, command: &Command) -> Command {
        let mut confined = Command::new("/bin/sh");
        confined.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.0.join("cgroup.procs"));
        confined.arg(command.get_program()).args(command.get_args());
        confined
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        // A process leaves its group only when it is reaped.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}
