//! Instructions that lameduck executes in user space per request, and in which functions. Counted by callgrind, so a
//! noisy machine makes no difference.
//!
//! `cargo bench --bench instructions -- --case browser --top 30`

#[path = "compare/app.rs"]
mod app;
#[path = "compare/binary.rs"]
mod binary;
#[path = "compare/server.rs"]
mod server;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use app::{App, HELLO};
use server::{Result, Scratch, Server, free_address, lameduck, route};

const USAGE: &str = "usage: cargo bench --bench instructions -- [OPTION...]
  --case NAME     many, one, browser, unix, captured (all)
  --requests N    requests of the shorter of a case's two runs (2000)
  --top N         lines of each profile (15)
  --binary PATH   the lameduck to measure, with its symbols (the musl build in the profile 'profiling', made now)";

/// wrk's request: only a `Host`.
const PLAIN: &str = "GET / HTTP/1.1\r\nHost: bench\r\n\r\n";

/// A browser's request.
const BROWSER: &str = "GET / HTTP/1.1\r\nHost: bench\r\nConnection: keep-alive\r\n\
    User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n\
    Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n\
    Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br, zstd\r\nDNT: 1\r\n\
    Referer: http://bench/page\r\nCookie: session=0123456789abcdef0123456789abcdef; theme=dark\r\n\
    Sec-Fetch-Dest: document\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Site: same-origin\r\n\r\n";

/// How the app is reached.
#[derive(Clone, Copy, PartialEq)]
enum Reached {
    Tcp,
    Unix,
    /// On 127.77.0.1, by a port that was captured.
    Captured,
}

struct Case {
    name: &'static str,
    what: &'static str,
    connections: usize,
    request: &'static str,
    app: Reached,
}

const fn case(name: &'static str, what: &'static str, connections: usize, request: &'static str) -> Case {
    Case { name, what, connections, request, app: Reached::Tcp }
}

const CASES: [Case; 5] = [
    case("many", "64 connections, one field", 64, PLAIN),
    case("one", "1 connection, one field", 1, PLAIN),
    case("browser", "1 connection, a browser's 13 fields", 1, BROWSER),
    Case { app: Reached::Unix, ..case("unix", "64 connections, app by unix socket", 64, PLAIN) },
    Case { app: Reached::Captured, ..case("captured", "64 connections, captured port", 64, PLAIN) },
];

struct Options {
    cases: Vec<&'static Case>,
    requests: usize,
    top: usize,
    binary: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = if let [role, tcp, unix] = &arguments[..]
        && role == "app"
    {
        app::serve(tcp, unix.as_ref())
    } else if arguments.iter().any(|argument| argument == "--bench") {
        Options::parse(&arguments).and_then(|options| run(&options))
    } else {
        // `cargo bench` passes --bench, `cargo test --benches` doesn't: for the latter it is enough that this file
        // compiles.
        println!("{USAGE}");
        Ok(())
    };
    done.map_or_else(
        |error| {
            eprintln!("instructions: {error}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self> {
        let mut options = Self { cases: CASES.iter().collect(), requests: 2000, top: 15, binary: None };
        let mut arguments = arguments.iter().filter(|argument| *argument != "--bench");
        while let Some(option) = arguments.next() {
            let value = arguments.next().ok_or(USAGE)?;
            let number = || value.parse().ok().filter(|n| *n > 0).ok_or(USAGE);
            match option.as_str() {
                "--case" => options.cases.retain(|case| case.name == value),
                "--requests" => options.requests = number()?,
                "--top" => options.top = number()?,
                "--binary" => options.binary = Some(value.into()),
                _ => return Err(USAGE.into()),
            }
        }
        if options.cases.is_empty() { Err(USAGE.into()) } else { Ok(options) }
    }
}

fn run(options: &Options) -> Result<()> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        return Err("valgrind is not installed; get it with: apt-get install valgrind".into());
    }
    let mut notes = Vec::new();
    let binary = binary::choose(options.binary.as_deref(), "profiling", &mut notes)?;
    notes.iter().for_each(|note| println!("{note}"));
    let scratch = Scratch::new("instructions")?;
    let app = App::start(&scratch)?;
    let moved = SocketAddr::from(([127, 77, 0, 1], free_address()?.port()));
    let captured = App::start_at(&scratch, moved)?;
    for case in &options.cases {
        let count = options.requests.next_multiple_of(case.connections);
        let app = if case.app == Reached::Captured { &captured } else { &app };
        let short = profile(&binary, &scratch, app, case, count)?;
        let long = profile(&binary, &scratch, app, case, 2 * count)?;
        let each = |pick: fn(&Profile) -> &Costs| per_request(pick(&short), pick(&long), count);
        let own = each(|profile| &profile.own);
        println!(
            "\n{}: {:.0} instructions per request\n",
            case.what,
            own.iter().map(|(_, n)| n).sum::<f64>()
        );
        println!("   itself");
        print_top(&own, options.top, |_| true);
        println!("\n   with what it calls");
        print_top(&each(|profile| &profile.inclusive), options.top, |name| name.contains("lameduck::"));
    }
    Ok(())
}

/// Instructions by function.
type Costs = BTreeMap<String, f64>;

/// Instructions of one run.
struct Profile {
    /// Of the function itself and what is inlined into it.
    own: Costs,
    /// Including the functions that it calls.
    inclusive: Costs,
}

/// Runs lameduck with one thread under callgrind for this number of requests, then ends it by a drain.
fn profile(binary: &Path, scratch: &Scratch, app: &App, case: &Case, count: usize) -> Result<Profile> {
    let probe = free_address()?;
    let listen = match case.app {
        Reached::Captured => SocketAddr::from(([127, 0, 0, 1], app.tcp.port())),
        _ => free_address()?,
    };
    let dir = scratch.dir(&format!("{}-{count}", case.name))?;
    let route = match case.app {
        Reached::Tcp => route(listen, &app.tcp.to_string()),
        Reached::Unix => route(listen, &format!("unix:{}", app.unix.display())),
        Reached::Captured => vec!["--capture".to_owned()],
    };
    let plain = lameduck(binary, &dir, &route, probe, "60s");
    let out = dir.join("callgrind.out");
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", &format!("--callgrind-out-file={}", out.display())]);
    command.arg(plain.get_program()).args(plain.get_args()).args(["--threads", "1"]);
    // Servers start with an empty environment: valgrind finds its own tools, but we must resolve its path.
    let mut server = Server::start(resolved(command), &dir)?;
    server.wait_for_answer(listen, "/")?;
    ask(listen, case, count)?;
    server.stop(Duration::from_secs(60));
    Ok(Profile { own: annotate(&out, false)?, inclusive: annotate(&out, true)? })
}

/// The command with the path of the program instead of its name.
fn resolved(command: Command) -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(command.get_program()));
    let Some(program) = found.into_iter().find(|file| file.is_file()) else { return command };
    let mut resolved = Command::new(program);
    resolved.args(command.get_args());
    resolved
}

/// Sends a request on every connection, reads all responses, and repeats.
fn ask(address: SocketAddr, case: &Case, count: usize) -> Result<()> {
    let mut lines = Vec::new();
    for _ in 0..case.connections {
        let line = TcpStream::connect(address)?;
        line.set_nodelay(true)?;
        line.set_read_timeout(Some(Duration::from_secs(30)))?;
        lines.push(line);
    }
    for _ in 0..count / case.connections {
        for line in &mut lines {
            line.write_all(case.request.as_bytes())?;
        }
        for line in &mut lines {
            let mut answer = Vec::new();
            let mut room = [0; 1024];
            while !answer.ends_with(HELLO.as_bytes()) {
                let n = line.read(&mut room)?;
                if n == 0 {
                    return Err("lameduck closed a connection".into());
                }
                answer.extend_from_slice(&room[..n]);
            }
        }
    }
    Ok(())
}

/// Parses the output of callgrind_annotate by function.
fn annotate(out: &Path, inclusive: bool) -> Result<Costs> {
    let mut command = Command::new("callgrind_annotate");
    command.args([
        "--threshold=100",
        "--auto=no",
        if inclusive { "--inclusive=yes" } else { "--inclusive=no" },
    ]);
    let output = command.arg(out).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut costs = Costs::new();
    // 1,234 ( 5.6%)  file:function [object]
    for line in text.lines() {
        let Some((count, rest)) = line.trim().split_once(' ') else { continue };
        let Ok(count) = count.replace(',', "").parse::<f64>() else { continue };
        let rest = rest.split_once("%)").map_or(rest, |(_, rest)| rest).trim();
        let Some((file, function)) = rest.split_once(':') else { continue };
        let function = function.split(" [").next().unwrap_or(function);
        // Assembly has no function name.
        let file = file.rsplit('/').next().unwrap_or(file);
        let name = if function.starts_with("0x") { file } else { function };
        let cost = costs.entry(name.to_owned()).or_default();
        // A function has one line per file that code was inlined from.
        *cost = if inclusive { count.max(*cost) } else { *cost + count };
    }
    if costs.is_empty() {
        return Err(format!("no profile: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(costs)
}

/// Difference of the two runs per additional request, largest first. Start-up and the drain cancel out.
fn per_request(short: &Costs, long: &Costs, count: usize) -> Vec<(String, f64)> {
    let more = |(name, n): (&String, &f64)| {
        (name.clone(), (n - short.get(name).copied().unwrap_or_default()) / count as f64)
    };
    let mut each: Vec<_> = long.iter().map(more).collect();
    each.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    each
}

fn print_top(costs: &[(String, f64)], top: usize, wanted: fn(&str) -> bool) {
    for (name, cost) in costs.iter().filter(|(name, _)| wanted(name)).take(top) {
        println!("{cost:>9.1}  {name}");
    }
}
