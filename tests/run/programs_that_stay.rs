//! A program that can't load the shim keeps its socket: `lameduck run` says so at once and what to do, and serves it where
//! it can.

use crate::common;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::http::Client;
use common::port::Port;
use common::process::{Lameduck, lameduck};
use common::wait_for;

/// A statically linked server, `tests/run/server.c`; none without a static libc, which is printed.
fn server(name: &str) -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/run/server.c");
    let compiled = Command::new("cc").args(["-static", "-O1", "-o"]).arg(&program).arg(source).output();
    let compiled = compiled.expect("a C compiler, which Rust needs too");
    if !compiled.status.success() {
        let why = String::from_utf8_lossy(&compiled.stderr);
        eprintln!("LEFT OUT: a static program was not tested: {why}");
        return None;
    }
    Some(program)
}

#[test]
fn it_is_reported_at_once_with_the_flag_to_use_and_runs_on() {
    let Some(server) = server("stays") else { return };
    let reserved = Port::reserve_everywhere();
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, reserved.number()));
    let port = reserved.number().to_string();
    let began = Instant::now();
    let mut run = Lameduck::run_at(lameduck(), at, &[], &[server.to_str().expect("UTF-8"), &port]);
    let told = run.process.wait_line("the advice", |line| {
        line.contains("--app-port").then(|| serde_json::from_str::<serde_json::Value>(line).expect("JSON"))
    });
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!((&told["level"], &told["address"]), (&"WARN".into(), &format!("0.0.0.0:{port}").into()));
    assert_eq!(Client::ask(run.listen, "/").text(), "static");
    assert_eq!(run.status().expect("a status")["bypassed"][0]["reason"], "not-moved");
    run.terminate();
    assert_eq!(run.process.wait_exit(), 128 + 15);
}

/// nginx's and Python's pair of sockets: lameduck serves IPv4 only, and IPv6's clients reach the app past it.
#[test]
fn a_socket_that_stays_beside_one_that_moved_is_reported() {
    const APP: &str = "const [port] = process.argv.slice(1);
        const open = (host) => require('http').createServer((_, res) => res.end(host)).listen({ port, host, ipv6Only: true });
        open('0.0.0.0').on('listening', () => open('::'));";
    let reserved = Port::reserve_everywhere();
    let port = reserved.number().to_string();
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, reserved.number()));
    let run = Lameduck::run_at(lameduck(), at, &[], &["node", "-e", APP, &port]);
    run.process.wait_line("the warning", |line| {
        (line.contains("WARN") && line.contains(&format!("[::]:{port}"))).then_some(())
    });
    assert_eq!(Client::ask(run.listen, "/").text(), "0.0.0.0");
}

#[test]
fn with_app_port_or_listen_it_is_served_and_drained_as_any_app() {
    let Some(server) = server("given") else { return };
    let server = server.to_str().expect("UTF-8");
    let (reserved, other) = (Port::reserve_everywhere(), Port::reserve_everywhere());
    let (port, fixed) = (reserved.number().to_string(), other.number().to_string());
    // (lameduck's arguments, the app's)
    for (args, command) in [
        (&["--app-port", &port][..], &[server][..]),
        (&[], &[server]),
        // It doesn't read PORT.
        (&[], &[server, &fixed]),
    ] {
        let mut run = Lameduck::run(args, command);
        assert_eq!(Client::ask(run.listen, "/").text(), "static");
        wait_for("the request counted", || {
            (run.metric("lameduck_requests_total{code=\"2xx\"}") == 1.0).then_some(())
        });
        run.terminate();
        assert_eq!(run.process.wait_exit(), 128 + 15);
    }
}
