//! lameduck, nginx, HAProxy and Envoy in front of one fast app, in one run: the cost of each, and the targets.
//!
//! `cargo bench --bench compare -- --rounds 9 --seconds 1 --only lameduck,nginx --part load,quota --json out.json`

mod app;
mod binary;
mod crowd;
mod http2;
mod measure;
mod pace;
mod peers;
mod proxy;
mod quota;
mod report;
mod rows;
mod server;
mod targets;
mod tls;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use app::App;
use crowd::Act;
use peers::find;
use proxy::{Bench, Proxy};
use report::Report;
use server::{Result, Scratch};

const USAGE: &str = "usage: cargo bench --bench compare -- [OPTION...]
  --rounds N         how often each load is put on each proxy (9)
  --seconds S        how long each time (1)
  --only NAME,...    lameduck, lameduck-unix, nginx, haproxy, haproxy-tcp, envoy, direct
  --part NAME,...    load, start, idle, crowd, growth, quota, http2, tls
  --binary PATH      the lameduck to measure (the musl build, made now)
  --image NAME       docker's image whose size is taken (what the Dockerfile makes of the binary)
  --json FILE        every sample and the targets
  --quick            one round and small crowds: whether every row works, not figures";

/// Limit on open files for us and for each server: enough for 10,000 connections through a proxy, two each.
const OPEN_FILES: u64 = 20_000;

/// Proxies that are started only to measure their memory.
const PEERS: [Proxy; 5] = [Proxy::Lameduck, Proxy::Nginx, Proxy::Haproxy, Proxy::HaproxyTcp, Proxy::Envoy];

/// Size of a crowd in a quick run.
const QUICK: usize = 500;

const PARTS: [&str; 8] = ["load", "start", "idle", "crowd", "growth", "quota", "http2", "tls"];

struct Options {
    rounds: usize,
    seconds: u64,
    proxies: Vec<Proxy>,
    parts: Vec<String>,
    binary: Option<PathBuf>,
    image: Option<String>,
    json: Option<PathBuf>,
    quick: bool,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, tcp, unix] = &arguments[..]
        && role == "app"
    {
        return exit(allow_open_files().and_then(|_| app::serve(tcp, unix.as_ref())).map(|()| true));
    }
    if let [role, address] = &arguments[..]
        && role == "grpc-app"
    {
        return exit(http2::serve(address).map(|()| true));
    }
    // `cargo bench` passes --bench, `cargo test --benches` doesn't: for the latter it is enough that this file
    // compiles.
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    exit(Options::parse(&arguments).and_then(run))
}

fn exit(complete: Result<bool>) -> ExitCode {
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
        let mut options = Self {
            rounds: 9,
            seconds: 1,
            proxies: Proxy::ALL.to_vec(),
            parts: PARTS.map(str::to_owned).to_vec(),
            binary: None,
            image: None,
            json: None,
            quick: false,
        };
        let mut arguments = arguments.iter().filter(|argument| *argument != "--bench");
        while let Some(option) = arguments.next() {
            if option == "--quick" {
                (options.quick, options.rounds) = (true, 1);
                continue;
            }
            let value = arguments.next().ok_or(USAGE)?;
            match option.as_str() {
                "--rounds" => options.rounds = value.parse().ok().filter(|n| *n > 0).ok_or(USAGE)?,
                "--seconds" => options.seconds = value.parse().ok().filter(|n| *n > 0).ok_or(USAGE)?,
                "--only" => {
                    let named = |name| Proxy::ALL.into_iter().find(|proxy| proxy.name() == name).ok_or(USAGE);
                    options.proxies = value.split(',').map(named).collect::<std::result::Result<_, _>>()?;
                }
                "--part" => options.parts = value.split(',').map(str::to_owned).collect(),
                "--binary" => options.binary = Some(value.into()),
                "--image" => options.image = Some(value.into()),
                "--json" => options.json = Some(value.into()),
                _ => return Err(USAGE.into()),
            }
        }
        if options.parts.iter().any(|part| !PARTS.contains(&part.as_str())) {
            return Err(USAGE.into());
        }
        Ok(options)
    }
}

/// Measures and prints; returns false if lameduck itself had to be left out.
fn run(mut options: Options) -> Result<bool> {
    let open_files = allow_open_files()?;
    let mut report = Report::default();
    let binary = binary::choose(options.binary.as_deref(), "release", &mut report.notes)?;
    report.add("binary", "MB", Proxy::Lameduck, fs::metadata(&binary)?.len() as f64 / 1e6);
    let image = measure::image_size(options.image.as_deref(), &binary)?;
    report.add("image", "MB", Proxy::Lameduck, image as f64 / 1e6);
    println!("{}", machine());
    let scratch = Scratch::new("compare")?;
    let bench = Bench { binary, app: App::start(&scratch)?, scratch };
    let asked_for_us = options.proxies.contains(&Proxy::Lameduck);
    options.proxies.retain(|proxy| match bench.start(*proxy) {
        Ok(_) => true,
        Err(error) => {
            report.notes.push(format!("{} left out: {error}; {}", proxy.name(), proxy.how_to_get()));
            false
        }
    });
    let has_us = options.proxies.contains(&Proxy::Lameduck);
    if options.quick {
        report.notes.push(format!("--quick: where a figure says 10,000, it is {QUICK}"));
    }
    for part in PARTS.into_iter().filter(|part| options.parts.iter().any(|wanted| wanted == part)) {
        eprintln!("{part}");
        // A failure in one part does not discard the figures of the others.
        if let Err(error) = measure_part(part, &options, &bench, &mut report, open_files) {
            report.notes.push(format!("{part}: {error}"));
        }
    }

    println!("\nMedians of {} rounds (ratio to nginx):\n", options.rounds);
    println!("{}\n{}", report.table(&options.proxies), targets::markdown(&report));
    report.notes.iter().for_each(|note| println!("{note}"));
    if let Some(file) = &options.json {
        let mut json = report.json();
        json["targets"] = targets::json(&report);
        let text = serde_json::to_string_pretty(&json)?;
        fs::write(file, text + "\n").map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(has_us || !asked_for_us)
}

fn measure_part(
    part: &str,
    options: &Options,
    bench: &Bench,
    report: &mut Report,
    open_files: usize,
) -> Result<()> {
    let Options { rounds, seconds, quick, .. } = *options;
    let among = |proxies: &[Proxy]| {
        options.proxies.iter().copied().filter(|proxy| proxies.contains(proxy)).collect::<Vec<_>>()
    };
    // Some parts need fewer rounds than the noisy ones.
    let few = rounds.min(3);
    let all = if quick { QUICK } else { 10_000 };
    // Each tunnel takes two connections of the proxy.
    let tunnels = (all / 2).min(open_files.saturating_sub(500) / 2);
    let in_flight = all.min(open_files.saturating_sub(500) / 2);
    match part {
        "load" => {
            let instances =
                options.proxies.iter().map(|proxy| bench.start(*proxy)).collect::<Result<Vec<_>>>()?;
            for round in 1..=rounds {
                eprintln!("  round {round} of {rounds}");
                rows::loads(bench, report, &instances, seconds)?;
            }
        }
        "start" => {
            for _ in 0..few {
                for proxy in among(&PEERS) {
                    rows::start(bench, report, proxy)?;
                }
            }
        }
        "idle" => {
            for proxy in among(&[Proxy::Lameduck, Proxy::Nginx, Proxy::Haproxy, Proxy::Envoy]) {
                // HAProxy reserves two files for each connection from the start.
                let count = if proxy == Proxy::Haproxy { in_flight } else { all };
                rows::idle(bench, report, proxy, count, Act::Rest)?;
                rows::idle(bench, report, proxy, tunnels, Act::WebSocket)?;
            }
        }
        "crowd" => {
            for proxy in among(&[Proxy::Lameduck, Proxy::Nginx]) {
                rows::burst(bench, report, proxy, all)?;
            }
            for _ in 0..few {
                rows::drain(bench, report, all)?;
            }
        }
        "growth" => {
            if in_flight < all {
                report.notes.push(format!(
                    "10,000 in flight are {in_flight}: open files are limited to {open_files}"
                ));
            }
            rows::growth(bench, report, Act::Rest, all, few, seconds)?;
            rows::growth(bench, report, Act::Hang, in_flight, few, seconds)?;
        }
        "http2" => http2::all(bench, report, &among(&http2::PROXIES), rounds, seconds)?,
        "tls" => tls::all(bench, report, &among(&tls::PROXIES), few, all / 5)?,
        _ => rows::quota(bench, report, few, seconds)?,
    }
    Ok(())
}

/// Raises the limit on open files, also for the servers, which inherit it; returns the new limit.
fn allow_open_files() -> Result<usize> {
    let limit = getrlimit(Resource::Nofile);
    let files = limit.maximum.unwrap_or(OPEN_FILES).min(OPEN_FILES);
    setrlimit(Resource::Nofile, Rlimit { current: Some(files), maximum: limit.maximum })?;
    Ok(files as usize)
}

/// Describes the machine and the versions behind the figures.
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
