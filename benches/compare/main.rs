//! lameduck, nginx and HAProxy before one fast upstream, in one run: a table and ratios to nginx.
//!
//! `cargo bench --bench compare -- --rounds 5 --seconds 3 --only lameduck,nginx --json out.json`

mod measure;
mod proxy;
mod report;
mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use measure::Scenario;
use proxy::{Instance, Proxy, find, start_upstream};
use report::Report;
use server::{Result, Scratch};

const INSTALL: &str = "get it with: apt-get install nginx-light haproxy wrk";

const USAGE: &str =
    "usage: cargo bench --bench compare -- [--rounds N] [--seconds S] [--only NAME,...] [--json FILE]
names: lameduck, nginx, haproxy, haproxy-tcp, direct";

const SCENARIOS: &[Scenario] = &[
    Scenario { name: "64 connections", connections: 64, path: "/" },
    Scenario { name: "1 connection", connections: 1, path: "/" },
];

/// Open files that we and each server may have: enough for the idle connections through HAProxy, two each.
const OPEN_FILES: u64 = 20_000;

struct Options {
    rounds: usize,
    seconds: u64,
    proxies: Vec<Proxy>,
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // `cargo bench` says --bench, `cargo test --benches` doesn't: there it is enough that this file compiles.
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let complete = Options::parse(&arguments).and_then(|options| run(&options));
    match complete {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self> {
        let mut options = Self { rounds: 5, seconds: 3, proxies: Proxy::ALL.to_vec(), json: None };
        let mut arguments = arguments.iter().filter(|argument| *argument != "--bench");
        while let Some(option) = arguments.next() {
            let value = arguments.next().ok_or(USAGE)?;
            match option.as_str() {
                "--rounds" => options.rounds = value.parse().ok().filter(|n| *n > 0).ok_or(USAGE)?,
                "--seconds" => options.seconds = value.parse().ok().filter(|n| *n > 0).ok_or(USAGE)?,
                "--only" => {
                    let named = |name| Proxy::ALL.into_iter().find(|proxy| proxy.name() == name).ok_or(USAGE);
                    options.proxies = value.split(',').map(named).collect::<std::result::Result<_, _>>()?;
                }
                "--json" => options.json = Some(value.into()),
                _ => return Err(USAGE.into()),
            }
        }
        Ok(options)
    }
}

/// Measures and prints; false when lameduck itself had to be left out.
fn run(options: &Options) -> Result<bool> {
    let idle_connections = allow_open_files()?;
    if find("nginx").is_none() {
        return Err(format!("nginx is the upstream as well and is not installed; {INSTALL}").into());
    }
    println!("{}", machine());
    let mut report = Report::default();
    let wrk = find("wrk");
    if wrk.is_none() {
        report.notes.push(format!("no load figures: wrk is not installed; {INSTALL}"));
    }
    let scratch = Scratch::new("compare")?;
    let (_upstream, upstream) = start_upstream(&scratch)?;
    let mut instances = Vec::new();
    for &proxy in &options.proxies {
        match Instance::start(proxy, &scratch, upstream) {
            Ok(instance) => instances.push(instance),
            Err(error) if error.to_string().ends_with("not installed") => {
                report.notes.push(format!("{} left out: {error}; {INSTALL}", proxy.name()));
            }
            Err(error) => report.notes.push(format!("{} left out: {error}", proxy.name())),
        }
    }

    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        if let Some(wrk) = &wrk {
            for scenario in SCENARIOS {
                load_round(&mut report, wrk, &instances, scenario, options.seconds)?;
            }
        }
        for instance in instances.iter().filter(|instance| instance.proxy != Proxy::Direct) {
            let fresh = Instance::start(instance.proxy, &scratch, upstream)?;
            memory_round(&mut report, &fresh, idle_connections)?;
        }
    }

    let proxies: Vec<Proxy> = instances.iter().map(|instance| instance.proxy).collect();
    println!("\nMedian of {} rounds (ratio to nginx):\n\n{}", options.rounds, report.table(&proxies));
    for note in &report.notes {
        println!("{note}");
    }
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&report.json())?;
        fs::write(file, text + "\n").map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(proxies.contains(&Proxy::Lameduck) || !options.proxies.contains(&Proxy::Lameduck))
}

/// One load on each proxy in turn.
fn load_round(
    report: &mut Report,
    wrk: &Path,
    instances: &[Instance],
    scenario: &Scenario,
    seconds: u64,
) -> Result<()> {
    let name = scenario.name;
    for instance in instances {
        let proxy = instance.proxy;
        let load = measure::load(wrk, instance, scenario, seconds)
            .map_err(|error| format!("{}, {name}: {error}", proxy.name()))?;
        if let Some(cpu) = load.cpu_per_request {
            report.add(&format!("CPU per request, {name}"), "µs", proxy, cpu);
        }
        report.add(&format!("throughput, {name}"), "requests/s", proxy, load.rate);
        report.add(&format!("latency p50, {name}"), "µs", proxy, load.p50);
        report.add(&format!("latency p99, {name}"), "µs", proxy, load.p99);
        if let Some(errors) = load.errors {
            report.notes.push(format!("{}, {name}: {errors}", proxy.name()));
        }
    }
    Ok(())
}

/// Start-up and memory of a proxy that has just started.
fn memory_round(report: &mut Report, instance: &Instance, idle_connections: usize) -> Result<()> {
    let proxy = instance.proxy;
    let mut add = |name: &str, unit, sample| report.add(name, unit, proxy, sample);
    let at_start = measure::memory(instance)?;
    add("start to first answer", "ms", instance.start_up.as_secs_f64() * 1e3);
    add("resident at start (RSS)", "MB", at_start.rss / 1e6);
    add("resident at start (PSS)", "MB", at_start.pss / 1e6);
    let (bytes, closed) = measure::idle(instance, idle_connections)?;
    add(&format!("per idle connection ({idle_connections})"), "bytes", bytes);
    if closed > 0 {
        report.notes.push(format!("{} closed {closed} of the idle connections", proxy.name()));
    }
    Ok(())
}

/// Raises the limit on open files, for us and the servers that inherit it; returns how many idle connections fit.
fn allow_open_files() -> Result<usize> {
    let limit = getrlimit(Resource::Nofile);
    let files = limit.maximum.unwrap_or(OPEN_FILES).min(OPEN_FILES);
    setrlimit(Resource::Nofile, Rlimit { current: Some(files), maximum: limit.maximum })?;
    Ok(5000.min(files as usize / 3))
}

/// What the figures were made on and with.
fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let version = |program: &str| {
        let output = find(program).and_then(|path| Command::new(path).arg("-v").output().ok())?;
        let text = [output.stderr, output.stdout].concat();
        String::from_utf8_lossy(&text).lines().next().map(str::to_owned)
    };
    let mut lines = vec![format!(
        "{cores} cores, {}, Linux {}, load average before: {}",
        model.map_or("unknown CPU", |(_, name)| name),
        read("/proc/sys/kernel/osrelease").trim(),
        read("/proc/loadavg").split(' ').next().unwrap_or_default()
    )];
    lines.extend(["nginx", "haproxy", "wrk"].into_iter().filter_map(version));
    lines.join("\n")
}
