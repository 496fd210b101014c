//! Time from the last byte of a response to the response of the blocking drain hook: median and p99 of 100 drains.
//!
//! `cargo bench --bench hook_latency -- --runs 100`

#[path = "compare/server.rs"]
mod server;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use server::{Result, Scratch, Server, TOKEN, free_address, get, lameduck, route};

const USAGE: &str = "usage: cargo bench --bench hook_latency -- [--runs N]";

/// The slow response without its last byte.
const ANSWER_BUT_ONE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\nHello, world";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // `cargo bench` passes --bench, `cargo test --benches` doesn't: for the latter it is enough that this file
    // compiles.
    let Some(options) = arguments.iter().position(|argument| argument == "--bench") else {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    };
    let options = [&arguments[..options], &arguments[options + 1..]].concat();
    let runs = match options.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => Some(100),
        ["--runs", n] => n.parse().ok().filter(|n| *n > 0),
        _ => None,
    };
    let measured = runs.ok_or_else(|| USAGE.into()).and_then(measure);
    measured.map_or_else(
        |error| {
            eprintln!("hook_latency: {error}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

fn measure(runs: usize) -> Result<()> {
    let scratch = Scratch::new("hook")?;
    let mut delays = Vec::with_capacity(runs);
    for run in 1..=runs {
        delays.push(drain_once(&scratch, run)?);
        eprint!("\r{run} of {runs} drains");
    }
    eprintln!();
    delays.sort_by(f64::total_cmp);
    let at = |share: f64| delays[((delays.len() as f64 * share).ceil() as usize).clamp(1, delays.len()) - 1];
    println!("the hook answers after the last byte, of {runs} drains:");
    println!(
        "median {:.3} ms, p99 {:.3} ms, least {:.3} ms, most {:.3} ms",
        at(0.5),
        at(0.99),
        at(0.0),
        at(1.0)
    );
    Ok(())
}

/// One proxy, one slow request, one drain. Returns the time in ms from the client's last byte to the hook's response;
/// negative if the hook's caller woke up first.
fn drain_once(scratch: &Scratch, run: usize) -> Result<f64> {
    let app = TcpListener::bind("127.0.0.1:0")?;
    let (listen, probe, upstream) = (free_address()?, free_address()?, app.local_addr()?);
    let dir = scratch.dir(&run.to_string())?;
    // The short grace period only bounds the lame-duck phase (a third of what the grace period leaves), so that a run
    // takes a second or two.
    let binary = Path::new(env!("CARGO_BIN_EXE_lameduck"));
    let command = lameduck(binary, &dir, &route(listen, &upstream.to_string()), probe, "11s");
    let mut server = Server::start(command, &dir)?;
    server.wait_for_answer(probe, "/livez").map_err(|error| format!("lameduck {error}"))?;

    let (asked, is_asked) = channel();
    let (finish, may_finish) = channel();
    thread::spawn(move || slow_app(&app, &asked, &may_finish));
    let client = thread::spawn(move || slow_request(listen));
    is_asked.recv_timeout(Duration::from_secs(5)).map_err(|_| "the slow request did not reach the app")?;

    let hook = thread::spawn(move || call_hook(probe));
    wait_until_closed(listen)?;
    // By now the client and the hook's caller both block in a read.
    thread::sleep(Duration::from_millis(20));
    finish.send(())?;
    let last_byte = client.join().map_err(|_| "the client panicked")??;
    let answered = hook.join().map_err(|_| "the hook's caller panicked")??;
    let late = answered.saturating_duration_since(last_byte).as_secs_f64();
    let early = last_byte.saturating_duration_since(answered).as_secs_f64();
    Ok((late - early) * 1e3)
}

/// Serves one request and holds back the last byte until signalled. Drops connections without a request (readiness
/// checks).
fn slow_app(app: &TcpListener, asked: &Sender<()>, may_finish: &Receiver<()>) {
    for stream in app.incoming() {
        let Ok(mut stream) = stream else { return };
        if !matches!(stream.read(&mut [0; 4096]), Ok(n) if n > 0) {
            continue;
        }
        let sent = stream.write_all(ANSWER_BUT_ONE).is_ok() && asked.send(()).is_ok();
        if sent && may_finish.recv().is_ok() {
            let _ = stream.write_all(b"!");
        }
        return;
    }
}

/// Returns when the last byte of the response was read.
fn slow_request(address: SocketAddr) -> std::io::Result<Instant> {
    let mut stream = TcpStream::connect(address)?;
    let status = get(&mut stream, "/slow", "")?;
    let last_byte = Instant::now();
    // Close at once, as a client does after `Connection: close`: lameduck need not linger for us.
    drop(stream);
    if status == 200 {
        Ok(last_byte)
    } else {
        Err(std::io::Error::other(format!("the slow request got {status}")))
    }
}

/// Returns when the hook has responded.
fn call_hook(probe: SocketAddr) -> std::io::Result<Instant> {
    let mut stream = TcpStream::connect(probe)?;
    let status = get(&mut stream, "/drain", &format!("Lameduck-Token: {TOKEN}\r\n"))?;
    let answered = Instant::now();
    if status == 200 { Ok(answered) } else { Err(std::io::Error::other(format!("the hook got {status}"))) }
}

/// Waits for the end of the lame-duck phase, when the listener is closed. Reads the kernel's table, since a trial
/// connection would count as an arrival and prolong the phase.
fn wait_until_closed(listen: SocketAddr) -> Result<()> {
    let port = format!(":{:04X} ", listen.port());
    let started = Instant::now();
    loop {
        // Columns of proc_net_tcp: number, local address, remote address, state; 0A is LISTEN.
        let table = fs::read_to_string("/proc/net/tcp")?;
        let listens = |line: &str| line.contains(&port) && line.contains(" 00000000:0000 0A ");
        if !table.lines().any(listens) {
            return Ok(());
        }
        if started.elapsed() > Duration::from_secs(5) {
            return Err("the drain did not close the listening socket".into());
        }
        thread::sleep(Duration::from_millis(2));
    }
}
