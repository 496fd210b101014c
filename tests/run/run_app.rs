//! `lameduck run`: ports and environment, the order of a drain and the app's end, and whose exit code is returned.

use crate::common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::http::{Client, End};
use common::port::Port;
use common::process::{Lameduck, lameduck};
use common::{LIMIT, MOMENT};
use rustix::process::Signal;
use serde_json::Value;

/// An app on its `PORT`. Its argument is what it does on SIGTERM: exit with a code, or nothing (`deaf`).
const APP: &str = "
    for (const signal of ['SIGHUP', 'SIGUSR2']) process.on(signal, () => console.log(`heard ${signal}`));
    const [mode, port] = process.argv.slice(1);
    if (mode) process.on('SIGTERM', () => {
      console.log('heard SIGTERM');
      if (mode !== 'deaf') process.exit(Number(mode));
    });
    let waiting = [];
    require('http').createServer((req, res) => {
      if (req.url === '/crash') process.exit(9);
      if (req.url === '/wait') return console.log(`${waiting.push(res)} waiting`);
      if (req.url === '/stream') return res.write('first', () => console.log(`${waiting.push(res)} waiting`));
      if (req.url === '/release') waiting.forEach((res) => res.end('released'));
      res.end(JSON.stringify(process.env));
    }).listen(port || process.env.PORT, '127.0.0.1');";

/// Address of the app, to reach it directly.
fn app(run: &Lameduck) -> SocketAddr {
    let port = run.wait_log("the app listens")["port"].as_u64().expect("a number");
    ([127, 0, 0, 1], port.try_into().expect("a port")).into()
}

/// Releases the waiting responses. The response to this request is not read, as the app may exit before it is sent.
fn release(run: &Lameduck) -> Client {
    let mut client = Client::connect(app(run));
    client.get("/release");
    client
}

fn wait_line(run: &Lameduck, text: &str) {
    run.process.wait_line(text, |line| (line == text).then_some(()));
}

fn has_line(run: &Lameduck, text: &str) -> bool {
    run.process.output().lines().any(|line| line == text)
}

/// The app's environment, which it returns through the proxy.
fn environment(run: &Lameduck) -> Value {
    let mut client = run.client();
    client.get("/");
    serde_json::from_slice(&client.answer().body).expect("JSON")
}

/// Starts the app with this argument, and sends a request that waits in the app.
fn busy(args: &[&str], mode: &str) -> (Lameduck, Client) {
    let run = Lameduck::run(args, &["node", "-e", APP, mode]);
    let mut client = run.client();
    client.get("/wait");
    wait_line(&run, "1 waiting");
    (run, client)
}

/// Kubernetes sets `LAMEDUCK_APP_PORT` in every container if a Service is named lameduck-app.
#[test]
fn a_service_named_lameduck_app_does_not_choose_the_apps_port() {
    let mut program = lameduck();
    program.env("LAMEDUCK_APP_PORT", "tcp://10.0.0.1:80");
    let run = Lameduck::start_as(program, &["run"], &[], &["node", "-e", APP]);
    assert_eq!(environment(&run)["PORT"], app(&run).port().to_string());
}

#[test]
fn the_inherited_port_is_the_proxys_and_the_app_gets_a_free_one() {
    let reserved = Port::reserve();
    let port = reserved.number();
    let mut program = lameduck();
    program.env("PORT", port.to_string()).env("LAMEDUCK_TOKEN", "a-secret");
    program.env("LIKE_LAMEDUCK_TOKEN", "kept");
    let run = Lameduck::start_as(program, &["run"], &[], &["node", "-e", APP]);
    assert_eq!(run.listen.port(), port);
    let environment = environment(&run);
    let apps_port = environment["PORT"].as_str().expect("a PORT");
    assert_ne!(apps_port, port.to_string());
    assert_eq!(apps_port, app(&run).port().to_string());
    assert_eq!(environment["LIKE_LAMEDUCK_TOKEN"], "kept");
}

#[test]
fn the_proxys_settings_and_its_token_stay_out_of_the_apps_environment() {
    let mut program = lameduck();
    program.env("LAMEDUCK_TOKEN", "a-secret").env("LAMEDUCK_GRACE", "20s");
    let run = Lameduck::start_as(program, &["run"], &[], &["node", "-e", APP]);
    assert_eq!(
        run.hook("/drain?hook=nobodys", Some("a-secret")).answer().head.status,
        400,
        "the token is not set"
    );
    let environment = environment(&run);
    let names = environment.as_object().expect("variables").keys();
    assert_eq!(names.filter(|name| name.starts_with("LAMEDUCK_")).collect::<Vec<_>>(), Vec::<&String>::new());
    assert!(environment["PATH"].is_string());
}

#[test]
fn an_app_with_a_port_of_its_own_is_found_there() {
    let reserved = Port::reserve();
    let port = reserved.number().to_string();
    let run = Lameduck::run(&["--app-port", &port], &["node", "-e", APP, "", &port]);
    assert_eq!(environment(&run)["PORT"], port);
}

/// Sends SIGTERM with a request in flight: the app gets its SIGTERM only after that request, and `run` exits with the
/// app's code.
fn drains_then_ends(mode: &str, code: i32) {
    let (mut run, mut client) = busy(&[], mode);
    run.terminate();
    run.wait_phase("draining");
    assert!(client.is_quiet_for(MOMENT));
    assert!(!has_line(&run, "heard SIGTERM"), "the app got its SIGTERM while it worked");
    let _unread = release(&run);
    let answer = client.answer();
    assert_eq!((answer.text().as_str(), answer.end), ("released", End::Whole));
    assert_eq!(run.process.wait_exit(), code);
    assert_eq!(run.wait_log("drained")["verdict"], "clean");
    assert!(!run.process.output().contains("WARN"), "{}", run.process.output());
}

#[test]
fn a_plain_app_ends_by_sigterm_after_the_drain() {
    drains_then_ends("", 128 + 15);
}

#[test]
fn an_app_that_ends_in_order_ends_the_container_in_order() {
    drains_then_ends("0", 0);
}

#[test]
fn an_apps_own_code_is_the_containers() {
    drains_then_ends("7", 7);
}

#[test]
fn behind_a_wrapper_that_swallows_signals_the_app_is_drained_and_ended_too() {
    let wrapper = "trap '' TERM; node -e \"$0\" 4 & wait; wait; exit 5";
    let mut run = Lameduck::run(&[], &["sh", "-c", wrapper, APP]);
    let mut client = run.client();
    client.get("/wait");
    wait_line(&run, "1 waiting");
    run.terminate();
    run.wait_phase("draining");
    assert!(!has_line(&run, "heard SIGTERM"));
    let _unread = release(&run);
    assert_eq!(client.answer().text(), "released");
    assert_eq!(run.process.wait_exit(), 5);
    assert!(has_line(&run, "heard SIGTERM"));
}

#[test]
fn an_app_deaf_to_sigterm_is_killed_after_the_reserve_and_the_log_says_so() {
    let mut run = Lameduck::run(&["--reserve", "1s"], &["node", "-e", APP, "deaf"]);
    app(&run);
    run.terminate();
    wait_line(&run, "heard SIGTERM");
    let heard = Instant::now();
    assert_eq!(run.process.wait_exit(), 128 + 9);
    assert!(heard.elapsed() > Duration::from_millis(700), "{:?}", heard.elapsed());
    let killed = run.wait_log("the app outlived its SIGTERM and was killed");
    assert_eq!(killed["level"], "WARN");
}

#[test]
fn a_second_signal_forces_the_drain() {
    let (mut run, mut client) = busy(&["--grace", "120s"], "3");
    run.terminate();
    run.wait_phase("draining");
    run.terminate();
    assert_eq!(client.answer().head.status, 504);
    assert_eq!(run.process.wait_exit(), 3);
}

#[test]
fn a_second_signal_while_the_app_ends_kills_it() {
    let args = ["--grace", "180s", "--reserve", "120s"];
    let mut run = Lameduck::run(&args, &["node", "-e", APP, "deaf"]);
    app(&run);
    run.process.signal(Signal::INT);
    wait_line(&run, "heard SIGTERM");
    run.process.signal(Signal::INT);
    assert_eq!(run.process.wait_exit(), 128 + 9);
}

#[test]
fn an_app_that_crashes_ends_the_container_with_its_code_and_fails_what_waits_at_once() {
    let (mut run, mut waiting) = busy(&["--grace", "120s", "--upstream-wait", "60s"], "0");
    let (mut half_sent, mut kept, mut crash) = (run.client(), run.client(), run.client());
    kept.get("/");
    kept.answer();
    half_sent.get("/stream");
    wait_line(&run, "2 waiting");
    half_sent.wait_seen("first");

    let crashed = Instant::now();
    crash.get("/crash");
    assert_eq!(waiting.answer().head.status, 502);
    assert_eq!(crash.answer().head.status, 502);
    let answer = half_sent.answer();
    assert!(matches!(answer.end, End::CutByRst | End::CutByFin), "{answer:?}");
    kept.expect_fin();
    assert_eq!(run.process.wait_exit(), 9);
    // Far less than the grace period.
    assert!(crashed.elapsed() < LIMIT, "{:?}", crashed.elapsed());
    assert_eq!(run.wait_log("the app exited by itself")["code"], 9);
}

#[test]
fn signals_that_do_not_ask_for_an_end_reach_the_app() {
    let run = Lameduck::run(&[], &["node", "-e", APP]);
    environment(&run);
    run.process.signal(Signal::HUP);
    wait_line(&run, "heard SIGHUP");
    run.process.signal(Signal::USR2);
    wait_line(&run, "heard SIGUSR2");
    assert_eq!(run.status().expect("a status")["phase"], "serving");
}

#[test]
fn sigterm_while_the_app_starts_and_no_request_waits_ends_it() {
    let starting =
        "process.on('SIGTERM', () => process.exit(6)); setInterval(() => {}, 1e3); console.log('starting')";
    let mut run = Lameduck::run(&["--start-timeout", "120s"], &["node", "-e", starting]);
    wait_line(&run, "starting");
    let ready = run.ready();
    assert_eq!((ready.head.status, ready.text().as_str()), (503, "the app does not answer\n"));
    run.terminate();
    assert_eq!(run.process.wait_exit(), 6);
    run.wait_log("shutdown requested before the app listens");
}

/// Listens once it gets SIGUSR2.
const BOOTING: &str = "
    const server = require('http').createServer((req, res) => res.end('late'));
    process.on('SIGUSR2', () => server.listen(process.env.PORT, '127.0.0.1'));
    setInterval(() => {}, 1e3);
    console.log('starting');";

/// A request that waits for an app that is booting, after SIGTERM.
fn waits_while_it_boots() -> (Lameduck, Client) {
    let run = Lameduck::run(&["--grace", "120s"], &["node", "-e", BOOTING]);
    wait_line(&run, "starting");
    let mut early = run.client();
    early.get("/");
    run.terminate();
    run.wait_phase("draining");
    assert!(early.is_quiet_for(MOMENT));
    (run, early)
}

#[test]
fn a_request_that_waits_when_sigterm_comes_is_served_if_the_app_listens_in_time() {
    let (mut run, mut early) = waits_while_it_boots();
    run.process.signal(Signal::USR2);
    let answer = early.answer();
    assert_eq!((answer.head.status, answer.text().as_str()), (200, "late"));
    assert_eq!(run.process.wait_exit(), 128 + 15);
}

#[test]
fn a_request_that_waits_when_sigterm_comes_is_answered_503_if_the_app_never_listens() {
    let (mut run, mut early) = waits_while_it_boots();
    run.terminate();
    let answer = early.answer();
    assert!(answer.head.status == 503 && answer.head.has("retry-after", "1"), "{:?}", answer.head);
    assert_eq!(run.process.wait_exit(), 128 + 15);
}

#[test]
fn a_drain_while_the_app_starts_has_nothing_to_wait_for() {
    let starting = "setInterval(() => {}, 1e3); console.log('starting')";
    let mut run = Lameduck::run(&["--start-timeout", "120s"], &["node", "-e", starting]);
    wait_line(&run, "starting");
    let mut early = run.client();
    early.get("/");
    let output = run.command_output(&["drain"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "drained: 1 app-down\n");
    assert_eq!(early.answer().head.status, 503);
    assert!(Client::try_connect(run.listen).is_err());
    run.terminate();
    assert_eq!(run.process.wait_exit(), 128 + 15);
}
