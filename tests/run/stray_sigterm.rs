//! Signals in an order that a drain can't use: SIGTERM to all processes at once, and SIGKILL to lameduck.

use crate::common;

use std::path::Path;

use common::http::End;
use common::process::{Lameduck, children};
use common::wait_for;
use rustix::process::{Pid, Signal, kill_process};

const STRAY: &str = "the app got a SIGTERM that lameduck did not send";

/// An app with a graceful shutdown: it finishes running requests.
const GRACEFUL: &str = "
    let waiting;
    const server = require('http').createServer((req, res) => {
      if (req.url === '/wait') return console.log(`${(waiting = res) && 1} waiting`);
      res.end('ok');
    }).listen(process.env.PORT, '127.0.0.1');
    process.on('SIGUSR2', () => waiting.end('released'));
    process.on('SIGTERM', () => server.close(() => process.exit(0)));";

const PLAIN: &str =
    "require('http').createServer((q, a) => a.end('ok')).listen(process.env.PORT, '127.0.0.1')";

fn app(run: &Lameduck) -> Pid {
    Pid::from_raw(children(run.process.pid())[0].try_into().expect("a pid")).expect("a pid")
}

fn wait_stray(run: &Lameduck) {
    run.process
        .wait_line(STRAY, |line| (line.contains(STRAY) && line.contains("KillMode=mixed")).then_some(()));
}

/// systemd does this by default, and Heroku always.
#[test]
fn a_sigterm_for_every_process_at_once_is_reported() {
    let mut run = Lameduck::run(&["--grace", "120s"], &["node", "-e", PLAIN]);
    run.wait_log("the app listens");
    let app = app(&run);
    run.terminate();
    kill_process(app, Signal::TERM).expect("the app is there");
    assert_eq!(run.process.wait_exit(), 128 + 15);
    wait_stray(&run);
}

#[test]
fn a_sigterm_for_the_app_alone_is_reported() {
    let mut run = Lameduck::run(&["--grace", "120s"], &["node", "-e", PLAIN]);
    run.wait_log("the app listens");
    kill_process(app(&run), Signal::TERM).expect("the app is there");
    assert_eq!(run.process.wait_exit(), 128 + 15);
    wait_stray(&run);
}

#[test]
fn an_app_that_shuts_down_early_finishes_its_requests_and_is_reported() {
    let mut run = Lameduck::run(&["--grace", "120s"], &["node", "-e", GRACEFUL]);
    run.wait_log("the app listens");
    let mut client = run.client();
    client.get("/wait");
    run.process.wait_line("the request", |line| (line == "1 waiting").then_some(()));
    let app = app(&run);
    run.terminate();
    kill_process(app, Signal::TERM).expect("the app is there");
    // The warning comes while the request is still running.
    wait_stray(&run);
    run.process.signal(Signal::USR2);
    let answer = client.answer();
    assert_eq!((answer.text().as_str(), answer.end), ("released", End::Whole));
    assert_eq!(run.process.wait_exit(), 0);
    assert_eq!(run.wait_log("drained")["verdict"], "clean");
    assert_eq!(run.process.output().matches(STRAY).count(), 1, "{}", run.process.output());
}

/// The kernel kills the app through its parent death signal. That signal is sent when the *thread* that forked exits,
/// so threads that come and go must not trigger it.
#[test]
fn when_lameduck_is_killed_its_app_is_killed_too_and_not_before() {
    let mut run = Lameduck::run(&["--threads", "2"], &["node", "-e", PLAIN]);
    run.wait_log("the app listens");
    // DNS lookups and file operations start threads that exit again.
    for _ in 0..3 {
        assert_eq!(common::http::Client::ask(run.listen, "/").head.status, 200);
    }
    let app = app(&run);
    assert!(kill_process(app, Signal::CONT).is_ok());
    run.process.kill();
    let gone = || (!Path::new(&format!("/proc/{app}")).exists()).then_some(());
    wait_for("the app's end", gone);
}
