//! The measurements of each part, and the figures of the report that they fill.

use std::thread;
use std::time::{Duration, Instant};

use crate::crowd::{Act, gather};
use crate::measure::{self, Scenario};
use crate::pace;
use crate::proxy::{Bench, Instance, Proxy};
use crate::quota::Quota;
use crate::report::Report;
use crate::server::{Result, TOKEN, get};

/// Time before the memory of idle connections is read; longer than lameduck's parking delay.
pub const SETTLE: Duration = Duration::from_secs(3);

const fn scenario(name: &'static str, connections: u32, path: &'static str) -> Scenario {
    Scenario { name, connections, path, upload: false }
}

/// A load and the proxies to put it on.
type Loads = (Scenario, &'static [Proxy]);

const LOADS: [Loads; 5] = [
    (scenario("64 connections", 64, "/"), &Proxy::ALL),
    (
        scenario("1 connection", 1, "/"),
        &[Proxy::Lameduck, Proxy::Nginx, Proxy::Haproxy, Proxy::Envoy, Proxy::Direct],
    ),
    (scenario("64 KB answer", 64, "/64k"), &[Proxy::Lameduck, Proxy::Nginx]),
    (scenario("1 MB answer", 16, "/1m"), &[Proxy::Lameduck, Proxy::Nginx]),
    (
        Scenario { name: "1 MB upload", connections: 16, path: "/upload", upload: true },
        &[Proxy::Lameduck, Proxy::Nginx],
    ),
];

/// Each load on each proxy in turn, then the open loop on each.
pub fn loads(bench: &Bench, report: &mut Report, instances: &[Instance], seconds: u64) -> Result<()> {
    for (scenario, proxies) in &LOADS {
        for instance in instances.iter().filter(|instance| proxies.contains(&instance.proxy)) {
            load(bench, report, instance, scenario, seconds)?;
        }
    }
    let paced = [Proxy::Lameduck, Proxy::Nginx, Proxy::Direct];
    for instance in instances.iter().filter(|instance| paced.contains(&instance.proxy)) {
        let paced = pace::run(instance.address, 200, 16, Duration::from_secs(2 * seconds))?;
        report.add("latency p50, 200 requests/s", "µs", instance.proxy, paced.p50);
        report.add("latency p99, 200 requests/s", "µs", instance.proxy, paced.p99);
    }
    Ok(())
}

fn load(
    bench: &Bench,
    report: &mut Report,
    instance: &Instance,
    scenario: &Scenario,
    seconds: u64,
) -> Result<()> {
    let (proxy, name) = (instance.proxy, scenario.name);
    let load = measure::load(bench, instance, scenario, seconds)
        .map_err(|error| format!("{}, {name}: {error}", proxy.name()))?;
    if let Some(cpu) = load.cpu_per_request {
        report.add(&format!("CPU per request, {name}"), "µs", proxy, cpu);
    }
    report.add(&format!("throughput, {name}"), "requests/s", proxy, load.rate);
    if scenario.path == "/" {
        report.add(&format!("latency p50, {name}"), "µs", proxy, load.p50);
        report.add(&format!("latency p99, {name}"), "µs", proxy, load.p99);
    }
    if let Some(errors) = load.errors {
        report.notes.push(format!("{}, {name}: {errors}", proxy.name()));
    }
    Ok(())
}

/// Start-up time, and memory right after it.
pub fn start(bench: &Bench, report: &mut Report, proxy: Proxy) -> Result<()> {
    let instance = bench.start(proxy)?;
    let at_start = measure::memory(&instance)?;
    report.add("start to first answer", "ms", proxy, instance.start_up.as_secs_f64() * 1e3);
    report.add("resident at start (RSS)", "MB", proxy, at_start.rss / 1e6);
    report.add("resident at start (PSS)", "MB", proxy, at_start.pss / 1e6);
    Ok(())
}

/// Memory of each of `count` silent connections, and of all of them together.
pub fn idle(bench: &Bench, report: &mut Report, proxy: Proxy, count: usize, act: Act) -> Result<()> {
    let instance = bench.start(proxy)?;
    // Excludes one-time costs: code pages, the first connections of the pool.
    drop(gather(instance.address, 100, 10, act)?.whole()?);
    thread::sleep(SETTLE / 2);
    let before = measure::memory(&instance)?;
    let crowd = gather(instance.address, count, 1, act)?.whole()?;
    thread::sleep(SETTLE);
    let after = measure::memory(&instance)?;
    let each = (after.pss - before.pss) / count as f64;
    if act == Act::WebSocket {
        report.add("per idle WebSocket", "bytes", proxy, each);
    } else {
        report.add("per idle connection", "bytes", proxy, each);
        report.add("resident with 10,000 idle (RSS)", "MB", proxy, after.rss / 1e6);
    }
    match crowd.closed() {
        0 => {}
        closed => report.notes.push(format!("{} closed {closed} silent connections ({act:?})", proxy.name())),
    }
    Ok(())
}

/// Connections that all open at the same time.
pub fn burst(bench: &Bench, report: &mut Report, proxy: Proxy, count: usize) -> Result<()> {
    let instance = bench.start(proxy)?;
    let crowd = gather(instance.address, count, count, Act::Rest)?;
    report.add("10,000 connections at once: failed", "connections", proxy, crowd.failed as f64);
    report.add("10,000 connections at once: all answered", "ms", proxy, crowd.took.as_secs_f64() * 1e3);
    Ok(())
}

/// A drain that closes a crowd of idle connections: the time of the hook without the lame-duck phase.
pub fn drain(bench: &Bench, report: &mut Report, count: usize) -> Result<()> {
    let instance = bench.start(Proxy::Lameduck)?;
    let crowd = gather(instance.address, count, 64, Act::Rest)?.whole()?;
    thread::sleep(SETTLE / 2);
    let leaving = thread::spawn(move || crowd.leave_when_told().map_err(|error| error.to_string()));
    let asked = Instant::now();
    let mut hook = std::net::TcpStream::connect(instance.probe)?;
    let status = get(&mut hook, "/drain", &format!("Lameduck-Token: {TOKEN}\r\n"))?;
    let took = asked.elapsed();
    let stayed = leaving.join().map_err(|_| "the crowd panicked")??;
    if status != 200 || stayed > 0 {
        report.notes.push(format!("the drain: the hook got {status}, {stayed} connections were not closed"));
    }
    let log = instance.log();
    let at = |message| moment(&log, message).ok_or_else(|| format!("the log lacks '{message}'"));
    let lame_duck = at("new connections are refused")? - at("drain began")?;
    report.add("drain of 10,000 idle", "ms", Proxy::Lameduck, took.as_secs_f64() * 1e3 - lame_duck);
    Ok(())
}

/// Time at which a message was logged, in ms of the day.
fn moment(log: &str, message: &str) -> Option<f64> {
    let line = log.lines().find(|line| line.contains(message))?;
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    let (_, time) = line["timestamp"].as_str()?.trim_end_matches('Z').split_once('T')?;
    let mut parts = time.split(':').map(str::parse::<f64>);
    let mut part = || parts.next()?.ok();
    Some(((part()? * 60.0 + part()?) * 60.0 + part()?) * 1e3)
}

/// Cost of a request beside few and many other connections, which are idle or have a request in flight.
pub fn growth(
    bench: &Bench,
    report: &mut Report,
    act: Act,
    most: usize,
    rounds: usize,
    seconds: u64,
) -> Result<()> {
    let kind = if act == Act::Hang { "in flight" } else { "open" };
    let mut among = Vec::new();
    for (label, count) in [("1", 1), ("100", 100), ("10,000", most)] {
        let instance = bench.start(Proxy::Lameduck)?;
        let crowd = gather(instance.address, count, 64, act)?.whole()?;
        among.push((format!("CPU per request beside {label} {kind}"), instance, crowd));
    }
    thread::sleep(SETTLE / 2);
    for _ in 0..rounds {
        for (figure, instance, _) in &among {
            let load = measure::load(bench, instance, &scenario("growth", 16, "/"), seconds)?;
            report.add(figure, "µs", Proxy::Lameduck, load.cpu_per_request.unwrap_or_default());
        }
    }
    Ok(())
}

/// A tenth of a CPU: lameduck with its default number of threads, nginx with one worker.
pub fn quota(bench: &Bench, report: &mut Report, rounds: usize, seconds: u64) -> Result<()> {
    let mut confined = Vec::new();
    for proxy in [Proxy::Lameduck, Proxy::Nginx] {
        let quota = Quota::new(proxy.name())?;
        // Order matters: the group is removed after its processes have ended.
        confined.push((bench.start_confined(proxy, &quota)?, quota));
    }
    let ours = &confined[0].0;
    let threads = ours.pids().into_iter().map(|pid| measure::threads(pid, "data-")).sum::<Result<usize>>()?;
    report.add("data-plane threads at 0.1 CPU", "threads", Proxy::Lameduck, threads as f64);
    for _ in 0..rounds {
        for (instance, _) in &confined {
            let paced = pace::run(instance.address, 500, 32, Duration::from_secs(2 * seconds))?;
            report.add("latency p50, 500 requests/s at 0.1 CPU", "µs", instance.proxy, paced.p50);
            report.add("latency p99, 500 requests/s at 0.1 CPU", "µs", instance.proxy, paced.p99);
        }
    }
    Ok(())
}
