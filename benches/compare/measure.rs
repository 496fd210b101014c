//! Measures a running proxy: CPU time and memory from `/proc`, load by wrk. Also the size of its image.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::app::LARGE;
use crate::peers::find;
use crate::proxy::{Bench, Instance};
use crate::server::{Result, stat};

/// Clock ticks per second in `/proc/<pid>/stat`: `USER_HZ`, 100 on every platform we build for.
const TICKS: f64 = 100.0;

/// Parameters of one load.
pub struct Scenario {
    /// Name in the table.
    pub name: &'static str,
    /// Number of keep-alive connections, each with one request at a time.
    pub connections: u32,
    /// Target of the requests.
    pub path: &'static str,
    /// Whether each request carries 1 MiB.
    pub upload: bool,
}

/// Result of one load.
pub struct Load {
    /// CPU time of all of the proxy's processes per request, in µs; none without a proxy.
    pub cpu_per_request: Option<f64>,
    /// Responses per second.
    pub rate: f64,
    /// Median latency, in µs.
    pub p50: f64,
    /// 99th percentile of the latency, in µs.
    pub p99: f64,
    /// wrk's report of failed requests, if any failed.
    pub errors: Option<String>,
}

/// Puts one load on a proxy for this number of seconds.
pub fn load(bench: &Bench, instance: &Instance, scenario: &Scenario, seconds: u64) -> Result<Load> {
    let mut command = Command::new(find("wrk").ok_or("wrk is not installed")?);
    // One thread: it keeps up with every proxy here, and more would compete with the proxy for the two cores.
    command.args(["--latency", "--threads", "1", "--connections", &scenario.connections.to_string()]);
    command.args(["--duration", &format!("{seconds}s")]);
    if scenario.upload {
        let script = bench.scratch.dir("wrk")?.join("upload.lua");
        fs::write(&script, format!("wrk.method = \"POST\"\nwrk.body = string.rep(\"x\", {LARGE})\n"))?;
        command.arg("--script").arg(script);
    }
    command.arg(format!("http://{}{}", instance.address, scenario.path));
    let pids = instance.pids();
    let before = cpu(&pids)?;
    let output = command.output()?;
    let after = cpu(&pids)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let bad = || format!("wrk said what we can't read:\n{text}{}", String::from_utf8_lossy(&output.stderr));

    let requests =
        text.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse::<f64>().ok());
    let requests = requests.filter(|requests| *requests > 0.0).ok_or_else(bad)?;
    let rate = value(&text, "Requests/sec:").and_then(|rate| rate.parse().ok()).ok_or_else(bad)?;
    let p50 = value(&text, "50%").and_then(micros).ok_or_else(bad)?;
    let p99 = value(&text, "99%").and_then(micros).ok_or_else(bad)?;
    let failed = |line: &&str| line.contains("Socket errors") || line.contains("Non-2xx");
    let errors = text.lines().map(str::trim).filter(failed).collect::<Vec<_>>().join("; ");
    Ok(Load {
        cpu_per_request: (!pids.is_empty()).then(|| (after - before) / requests * 1e6),
        rate,
        p50,
        p99,
        errors: (!errors.is_empty()).then_some(errors),
    })
}

/// Text after a label at the beginning of a line.
fn value<'a>(text: &'a str, label: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.trim().strip_prefix(label)).map(str::trim)
}

/// Parses wrk's notation of a time; returns µs.
fn micros(text: &str) -> Option<f64> {
    let units = [("us", 1.0), ("ms", 1e3), ("s", 1e6), ("m", 6e7)];
    let (number, factor) =
        units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))?;
    Some(number.parse::<f64>().ok()? * factor)
}

/// User and system time of the processes, in seconds.
pub fn cpu(pids: &[u32]) -> Result<f64> {
    let mut ticks = 0;
    for &pid in pids {
        let fields = stat(pid)?;
        for field in [11, 12] {
            ticks += fields.get(field).ok_or("/proc/<pid>/stat is too short")?.parse::<u64>()?;
        }
    }
    Ok(ticks as f64 / TICKS)
}

/// Resident memory of a proxy's processes, in bytes.
pub struct Memory {
    /// Sum of the resident sets of its processes; shared pages count once per process.
    pub rss: f64,
    /// Sum in which each page is divided by the number of processes that share it.
    pub pss: f64,
}

/// Reads both from `/proc/<pid>/smaps_rollup`.
pub fn memory(instance: &Instance) -> Result<Memory> {
    let mut memory = Memory { rss: 0.0, pss: 0.0 };
    for pid in instance.pids() {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let bytes = |label| {
            let kib = value(&text, label).and_then(|value| value.strip_suffix(" kB"));
            Ok::<_, std::num::ParseIntError>(kib.unwrap_or("0").trim().parse::<u64>()? as f64 * 1024.0)
        };
        memory.rss += bytes("Rss:")?;
        memory.pss += bytes("Pss:")?;
    }
    Ok(memory)
}

/// Number of threads of a process whose name begins with `name`.
pub fn threads(pid: u32, name: &str) -> Result<usize> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    let named = |task: &fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.starts_with(name))
    };
    Ok(tasks.filter(named).count())
}

/// Size of an image in bytes: as docker reports it for this name, or else computed for the Dockerfile's two layers, the
/// empty `/run/lameduck` and the binary. A layer is a tar archive with blocks of 512 bytes, one before each entry and
/// two after the last.
pub fn image_size(name: Option<&str>, binary: &Path) -> Result<u64> {
    const BLOCK: u64 = 512;
    let Some(name) = name else {
        let content = fs::metadata(binary)?.len().next_multiple_of(BLOCK);
        return Ok((2 + 2) * BLOCK + BLOCK + content + 2 * BLOCK);
    };
    let output = Command::new("docker").args(["image", "inspect", "--format", "{{.Size}}", name]).output()?;
    let size = String::from_utf8_lossy(&output.stdout).trim().parse();
    size.map_err(|_| format!("docker: {}", String::from_utf8_lossy(&output.stderr).trim()).into())
}
