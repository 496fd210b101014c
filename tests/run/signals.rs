//! Signals: TERM, INT and QUIT drain; others are forwarded to the app by `run`, ignored by `proxy`, and end neither.

use crate::common;

use std::process::Command;

use common::http::{Client, End};
use common::process::{Lameduck, Node, lameduck};
use rustix::process::Signal;

/// Signals that are not sent to end a program, although the default action of most does.
const HARMLESS: [(Signal, &str); 7] = [
    (Signal::HUP, "SIGHUP"),
    (Signal::USR2, "SIGUSR2"),
    (Signal::WINCH, "SIGWINCH"),
    (Signal::ALARM, "SIGALRM"),
    (Signal::VTALARM, "SIGVTALRM"),
    (Signal::IO, "SIGIO"),
    (Signal::POWER, "SIGPWR"),
];

/// Handles the signals in its arguments and prints each one that it gets; exits on the last one.
const APP: &str = "
    const names = process.argv.slice(1);
    for (const name of names) process.on(name, () => {
      console.log(`heard ${name}`);
      if (name === names.at(-1)) process.exit(7);
    });
    let waiting;
    require('http').createServer((req, res) => {
      if (req.url === '/wait') return console.log('1 waiting', (waiting = res) && '');
      if (req.url === '/release') waiting.end('released');
      res.end('ok');
    }).listen(process.env.PORT, '127.0.0.1');";

fn run(signals: &[&str]) -> Lameduck {
    let run = Lameduck::run(&[], &[&["node", "-e", APP], signals].concat());
    run.wait_log("the app listens");
    run
}

fn wait_line(run: &Lameduck, text: &str) {
    run.process.wait_line(text, |line| (line.trim() == text).then_some(()));
}

/// Sends the signal with a request in flight, which must finish before the app gets a signal.
fn drains(signal: Signal, handled: &[&str], heard: &str, code: i32) {
    let mut run = run(handled);
    let mut client = run.client();
    client.get("/wait");
    wait_line(&run, "1 waiting");
    run.process.signal(signal);
    run.wait_phase("draining");
    let port = run.wait_log("the app listens")["port"].as_u64().expect("a number");
    let mut release = Client::connect(([127, 0, 0, 1], port.try_into().expect("a port")).into());
    release.get("/release");
    let answer = client.answer();
    assert_eq!((answer.text().as_str(), answer.end), ("released", End::Whole));
    assert_eq!(run.process.wait_exit(), code);
    assert_eq!(run.wait_log("drained")["verdict"], "clean");
    let output = run.process.output();
    let all: Vec<_> = output.lines().filter_map(|line| line.strip_prefix("heard ")).collect();
    assert_eq!(all.join(" "), heard);
}

#[test]
fn sigquit_drains_and_ends_the_app_by_sigterm() {
    drains(Signal::QUIT, &["SIGTERM"], "SIGTERM", 7);
}

#[test]
fn an_app_with_a_handler_for_sigquit_ends_by_that() {
    drains(Signal::QUIT, &["SIGTERM", "SIGQUIT"], "SIGQUIT", 7);
}

#[test]
fn sigint_drains_and_ends_the_app_by_sigterm() {
    drains(Signal::INT, &["SIGINT", "SIGTERM"], "SIGTERM", 7);
}

#[test]
fn an_app_without_any_handler_ends_by_sigterm() {
    drains(Signal::QUIT, &[], "", 128 + 15);
}

#[test]
fn other_signals_go_to_the_app_and_end_nothing() {
    let names: Vec<_> = HARMLESS.iter().map(|(_, name)| *name).chain(["SIGTERM"]).collect();
    let mut run = run(&names);
    for (signal, name) in HARMLESS {
        run.process.signal(signal);
        wait_line(&run, &format!("heard {name}"));
    }
    assert_eq!(run.status().expect("a status")["phase"], "serving");
    run.terminate();
    assert_eq!(run.process.wait_exit(), 7);
}

/// Signals as nodemon and pm2 send them: without a handler they end the app, with or without lameduck.
#[test]
fn a_signal_that_ends_the_app_ends_the_container_with_its_code() {
    let mut run = run(&[]);
    run.process.signal(Signal::HUP);
    assert_eq!(run.process.wait_exit(), 128 + 1);
}

#[test]
fn a_sighup_that_was_to_be_ignored_stays_ignored() {
    let mut program = Command::new("sh");
    program
        .args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_lameduck")])
        .env_remove("PORT");
    let run =
        Lameduck::start_as(program, &["run"], &[], &["node", "-e", APP, "SIGHUP", "SIGUSR2", "SIGTERM"]);
    run.wait_log("the app listens");
    run.process.signal(Signal::HUP);
    run.process.signal(Signal::USR2);
    wait_line(&run, "heard SIGUSR2");
    assert!(!run.process.output().contains("heard SIGHUP"), "{}", run.process.output());
}

#[test]
fn a_proxy_survives_other_signals() {
    let app = Node::held();
    let mut proxy = Lameduck::start_as(lameduck(), &["proxy", "--upstream", &app.addr.to_string()], &[], &[]);
    for (signal, name) in HARMLESS.into_iter().chain([(Signal::USR1, "SIGUSR1")]) {
        proxy.process.signal(signal);
        proxy.process.wait_line(name, |line| line.contains(&format!("\"{name}\"")).then_some(()));
    }
    assert_eq!(Client::ask(proxy.listen, "/").head.status, 200);
    proxy.process.signal(Signal::QUIT);
    proxy.expect_clean_exit();
}
