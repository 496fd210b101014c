//! What is measured of a running proxy: CPU and memory from `/proc`, load by wrk, idle connections.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use socket2::SockRef;

use crate::proxy::Instance;
use crate::server::{Result, get, stat};

/// Clock ticks per second in `/proc/<pid>/stat`: `USER_HZ`, 100 on every platform we build for.
const TICKS: f64 = 100.0;

/// How long idle connections are left alone before their memory is read; longer than lameduck's parking delay.
const SETTLE: Duration = Duration::from_secs(3);

/// What one load looks like.
pub struct Scenario {
    /// As the table names it.
    pub name: &'static str,
    /// Keep-alive connections that each ask again as soon as they are answered.
    pub connections: u32,
    /// The request's target.
    pub path: &'static str,
}

/// What came of one load.
pub struct Load {
    /// Of all the proxy's processes, in µs; none where there is no proxy.
    pub cpu_per_request: Option<f64>,
    /// Answers per second.
    pub rate: f64,
    /// The median answer, in µs.
    pub p50: f64,
    /// The slowest hundredth begins here, in µs.
    pub p99: f64,
    /// wrk's own words on failed requests, if any failed.
    pub errors: Option<String>,
}

/// Puts one load on a proxy for that many seconds.
pub fn load(wrk: &Path, instance: &Instance, scenario: &Scenario, seconds: u64) -> Result<Load> {
    let mut command = Command::new(wrk);
    // One thread: it keeps up with any proxy here, and more would take turns with the proxy on two cores.
    command.args(["--latency", "--threads", "1", "--connections", &scenario.connections.to_string()]);
    command.args([
        "--duration",
        &format!("{seconds}s"),
        &format!("http://{}{}", instance.address, scenario.path),
    ]);
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

/// What follows a label at a line's beginning.
fn value<'a>(text: &'a str, label: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.trim().strip_prefix(label)).map(str::trim)
}

/// A time as wrk writes it, in µs.
fn micros(text: &str) -> Option<f64> {
    let units = [("us", 1.0), ("ms", 1e3), ("s", 1e6), ("m", 6e7)];
    let (number, factor) =
        units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))?;
    Some(number.parse::<f64>().ok()? * factor)
}

/// User and system time of the processes, in seconds.
fn cpu(pids: &[u32]) -> Result<f64> {
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
    /// Each process's resident set, summed; pages that they share count once for each.
    pub rss: f64,
    /// Each page divided by how many processes of the machine share it.
    pub pss: f64,
}

/// Reads it from `/proc/<pid>/smaps_rollup`.
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

/// Bytes that a proxy holds for each of `count` idle kept connections which each made one request.
/// Also how many of them it had closed by then.
pub fn idle(instance: &Instance, count: usize) -> Result<(f64, usize)> {
    // Whatever is made once is made before: code pages, the pool's first connections.
    for connection in open(instance.address, 100, 10)? {
        drop(connection);
    }
    thread::sleep(SETTLE);
    let before = memory(instance)?;
    let connections = open(instance.address, count, 1)?;
    thread::sleep(SETTLE);
    let after = memory(instance)?;
    let closed = connections.iter().filter(|connection| !is_open(connection)).count();
    Ok(((after.pss - before.pss) / count as f64, closed))
}

/// Opens connections one after the other; each makes that many requests and is kept.
fn open(address: SocketAddr, count: usize, requests: usize) -> Result<Vec<TcpStream>> {
    let mut connections = Vec::with_capacity(count);
    for _ in 0..count {
        let mut connection = TcpStream::connect(address)?;
        // Closed by a reset in the end, so that no port stays in TIME_WAIT and runs out over the rounds.
        SockRef::from(&connection).set_linger(Some(Duration::ZERO))?;
        for _ in 0..requests {
            let status = get(&mut connection, "/", "")?;
            if status != 200 {
                return Err(format!("answered {status} on an idle connection's request").into());
            }
        }
        connections.push(connection);
    }
    Ok(connections)
}

fn is_open(connection: &TcpStream) -> bool {
    let waits = |error: std::io::Error| error.kind() == std::io::ErrorKind::WouldBlock;
    connection.set_nonblocking(true).is_ok() && connection.peek(&mut [0]).is_err_and(waits)
}
