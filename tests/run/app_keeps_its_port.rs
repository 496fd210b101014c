//! `lameduck run` finds the port that the app opens, and serves it under its own number, where the app asked for it.
//! `--listen` and an inherited `PORT` lead to it too.

use crate::common;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use common::http::{Client, End};
use common::port::Port;
use common::process::{Lameduck, OWN_PORTS, lameduck, temporary_directory};
use common::{MOMENT, wait_for};
use rustix::process::Signal;
use serde_json::Value;

/// Listens on each `PORT` or `PORT@HOST` of its arguments and prints where that really is; `own` is its `PORT`, and is
/// opened at SIGUSR2.
const APP: &str = "
    let waiting = [];
    const open = (arg) => {
      const [port, host] = arg.split('@');
      const server = require('http').createServer((req, res) => {
        if (req.url === '/wait') return console.log(`${waiting.push(res)} waiting`);
        if (req.url === '/release') waiting.forEach((res) => res.end('released'));
        res.end(req.url === '/env' ? JSON.stringify(process.env) : arg);
      });
      server.on('error', (error) => { console.log(error.code, error.syscall); process.exit(4); });
      server.listen({ port, host }, () => console.log('up', server.address().address));
    };
    process.on('SIGUSR2', () => open(process.env.PORT));
    process.argv.slice(1).forEach(open);";

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// The app on this port of its own.
fn run_on(port: u16, args: &[&str], apps: &[&str]) -> Lameduck {
    Lameduck::run_at(lameduck(), local(port), args, &[&["node", "-e", APP], apps].concat())
}

/// Where the app itself listens, past lameduck.
fn past(run: &Lameduck, port: u16) -> SocketAddr {
    let ip: IpAddr =
        run.process.wait_line("the app's address", |line| line.strip_prefix("up ")?.parse().ok());
    SocketAddr::new(ip.to_canonical(), port)
}

#[test]
fn an_app_with_a_fixed_port_is_served_there_drained_and_ended() {
    let (reserved, dir) = (Port::reserve_everywhere(), temporary_directory());
    let port = reserved.number();
    let mut program = lameduck();
    program.env("TMPDIR", &dir);
    let text = port.to_string();
    let mut run = Lameduck::run_at(program, local(port), &[], &["node", "-e", APP, &text]);
    assert_eq!(run.wait_log("the app listens")["port"], port);
    let environment: Value = serde_json::from_str(&Client::ask(run.listen, "/env").text()).expect("JSON");
    assert!(environment["PORT"].is_null(), "the app's port is its own affair");
    assert_eq!(run.status().expect("a status")["captured"], serde_json::json!([port]));

    let mut client = run.client();
    client.get("/wait");
    run.process.wait_line("the request", |line| (line == "1 waiting").then_some(()));
    run.terminate();
    run.wait_phase("draining");
    Client::wait_refused(run.listen);
    assert!(client.is_quiet_for(MOMENT) && run.process.exited().is_none());
    Client::connect(past(&run, port)).get("/release");
    let answer = client.answer();
    assert_eq!((answer.text().as_str(), answer.end), ("released", End::Whole));
    assert_eq!(run.process.wait_exit(), 128 + 15);
    assert_eq!(run.wait_log("drained")["verdict"], "clean");
    assert!(!run.process.output().contains("WARN"), "{}", run.process.output());
    assert_eq!(fs::read_dir(&dir).expect("a folder").count(), 0, "no file is left");
    let _ = fs::remove_dir_all(dir);
}

#[test]
fn it_is_served_on_the_addresses_that_it_asked_for_and_no_others() {
    let (v4, v6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
    for (host, served, refused) in [
        ("", &[v4, v6][..], &[][..]),
        ("@::", &[v4, v6], &[]),
        ("@0.0.0.0", &[v4], &[v6]),
        ("@127.0.0.1", &[v4], &[v6]),
        ("@::1", &[v6], &[v4]),
    ] {
        let reserved = Port::reserve_everywhere();
        let port = reserved.number();
        let arg = format!("{port}{host}");
        let run = run_on(port, &[], &[&arg]);
        for ip in served {
            assert_eq!(Client::ask(SocketAddr::new(*ip, port), "/").text(), arg, "{arg} by {ip}");
        }
        for ip in refused {
            assert!(Client::try_connect(SocketAddr::new(*ip, port)).is_err(), "{arg} by {ip}");
        }
        assert_ne!(past(&run, port).ip(), v4, "requests would not be counted");
    }
}

/// As a server for everybody and one for this machine's administrator.
#[test]
fn two_servers_on_one_port_have_their_own_addresses_and_clients() {
    let reserved = Port::reserve_everywhere();
    let port = reserved.number();
    let (v4, v6) = (format!("{port}@127.0.0.1"), format!("{port}@::1"));
    let run = run_on(port, &[], &[&v4, &v6]);
    let second = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
    wait_for("the second server", || Client::try_connect(second).ok());
    assert_eq!(Client::ask(run.listen, "/").text(), v4);
    assert_eq!(Client::ask(second, "/").text(), v6);
    assert_eq!(run.status().expect("a status")["captured"], serde_json::json!([port]));
    assert!(!run.process.output().contains("WARN"), "{}", run.process.output());
}

/// Dev servers look for a free port so.
#[test]
fn one_that_tries_a_port_on_all_addresses_is_served_where_it_listens_then() {
    let reserved = Port::reserve_everywhere();
    let port = reserved.number();
    let script = "const http = require('http'), port = process.argv[1], trial = http.createServer();
        trial.listen(port, () => trial.close(() =>
            http.createServer((_, res) => res.end('private')).listen(port, '127.0.0.1', () => console.log('up'))));";
    let text = port.to_string();
    let run = Lameduck::run_at(lameduck(), local(port), &[], &["node", "-e", script, &text]);
    run.process.wait_line("the app listens", |line| (line == "up").then_some(()));
    assert_eq!(Client::ask(run.listen, "/").text(), "private");
    assert!(Client::try_connect((Ipv6Addr::LOCALHOST, port).into()).is_err());
    wait_for("readiness", || (run.ready().head.status == 200).then_some(()));
}

/// As a dev server and its hot reload.
#[test]
fn every_port_of_an_app_is_served_and_the_drain_waits_for_all() {
    let (first, second) = (Port::reserve_everywhere(), Port::reserve_everywhere());
    let ports = [&first, &second].map(|port| port.number().to_string());
    let mut run = run_on(first.number(), &[], &[&ports[0], &ports[1]]);
    let second = local(second.number());
    wait_for("the second port", || Client::try_connect(second).ok());
    assert_eq!(Client::ask(run.listen, "/").text(), ports[0]);
    let mut client = Client::connect(second);
    client.get("/wait");
    run.process.wait_line("the request", |line| (line == "1 waiting").then_some(()));
    run.terminate();
    run.wait_phase("draining");
    Client::wait_refused(run.listen);
    Client::connect(past(&run, second.port())).get("/release");
    assert_eq!(client.answer().text(), "released");
    assert_eq!(run.process.wait_exit(), 128 + 15);
}

#[test]
fn a_server_in_python_is_found_behind_a_shell() {
    let reserved = Port::reserve_everywhere();
    let port = reserved.number();
    let script = format!("python3 -m http.server {port} --bind 127.0.0.1; exit $?");
    let run = Lameduck::run_at(lameduck(), local(port), &[], &["sh", "-c", &script]);
    assert_eq!(Client::ask(run.listen, "/").head.status, 200);
    wait_for("the request counted", || {
        (run.metric("lameduck_requests_total{code=\"2xx\"}") == 1.0).then_some(())
    });
}

/// As nodemon and its like do.
#[test]
fn requests_wait_while_the_app_restarts_its_server() {
    let reserved = Port::reserve_everywhere();
    let parent = "
        const { spawn } = require('child_process');
        const start = () => spawn(process.execPath, ['-e', process.argv[1], process.argv[2]], { stdio: 'inherit' });
        let child = start();
        process.on('SIGUSR2', () => { child.kill(); child.on('exit', () => console.log('restarting', child = start())); });";
    let port = reserved.number();
    let text = port.to_string();
    let run = Lameduck::run_at(lameduck(), local(port), &[], &["node", "-e", parent, APP, &text]);
    assert_eq!(Client::ask(run.listen, "/").text(), text);
    run.process.signal(Signal::USR2);
    run.process.wait_line("the restart", |line| line.starts_with("restarting").then_some(()));
    assert_eq!(Client::ask(run.listen, "/").text(), text);
}

#[test]
fn behind_listen_a_fixed_port_needs_no_flag() {
    let reserved = Port::reserve_everywhere();
    let port = reserved.number().to_string();
    let run = Lameduck::run(&[], &["node", "-e", APP, &port]);
    assert_eq!(Client::ask(run.listen, "/").text(), port, "{}", run.process.output());
    assert_eq!(Client::ask(local(reserved.number()), "/").text(), port);
    assert_eq!(run.wait_log("the app listens")["port"], reserved.number());
    // The port that it was given is better, whenever it opens.
    run.process.signal(Signal::USR2);
    wait_for("its PORT", || (Client::ask(run.listen, "/").text() != port).then_some(()));
}

#[test]
fn an_app_that_serves_metrics_while_it_boots_gets_no_other_requests_there() {
    let metrics = Port::reserve_everywhere();
    let port = metrics.number().to_string();
    let run = Lameduck::run(&[], &["node", "-e", APP, &port]);
    past(&run, metrics.number());
    let mut early = run.client();
    early.get("/");
    assert!(early.is_quiet_for(5 * MOMENT));
    run.process.signal(Signal::USR2);
    let own = run.wait_log("the app listens")["port"].to_string();
    assert_eq!(early.answer().text(), own);
    assert_ne!(own, port);
}

#[test]
fn a_foreign_process_on_the_port_is_not_taken_for_an_app_that_listens_elsewhere() {
    let reserved = Port::reserve_everywhere();
    let port = reserved.number().to_string();
    let run = Lameduck::run(&[], &["node", "-e", APP, &port]);
    let given = run.wait_log("started the app")["port"].as_u64().expect("a number");
    past(&run, reserved.number());
    let _somebody = TcpListener::bind(local(given.try_into().expect("a port"))).expect("free until now");
    assert_eq!(Client::ask(run.listen, "/").text(), port, "{}", run.process.output());
}

/// An image with `ENV PORT=3000` whose app says 3000 itself.
#[test]
fn an_app_that_asks_for_lameducks_own_port_is_served_there() {
    for inherited in [false, true] {
        let reserved = Port::reserve_everywhere();
        let port = reserved.number().to_string();
        let listen = format!("127.0.0.1:{port}");
        let (mut program, mut args) = (lameduck(), vec!["--listen", listen.as_str()]);
        if inherited {
            program.env("PORT", &port);
            args.clear();
        }
        let run = Lameduck::start_as(program, &["run"], &args, &["node", "-e", APP, &port]);
        assert_eq!(Client::ask(local(reserved.number()), "/").text(), port);
        assert!(!run.process.output().contains("EADDRINUSE"), "{}", run.process.output());
    }
}

#[test]
fn an_app_that_opens_no_port_is_a_clear_error() {
    let deaf = ["node", "-e", "setTimeout(() => {}, 60_000)"];
    let (code, output) = Lameduck::run_to_its_end(&[OWN_PORTS, "--start-timeout", "700ms"], &deaf);
    assert_eq!(code, 1);
    assert!(output.contains("the app does not listen on any port after 700ms"), "{output}");
    let (code, output) = Lameduck::run_to_its_end(&[OWN_PORTS], &["node", "-e", "process.exit(3)"]);
    assert_eq!(code, 3);
    assert!(output.contains("the app exited with code 3 before it listened:"), "{output}");
}
