//! Which processes get the app's SIGTERM: the main process, as without us; if that is a wrapper that would not forward
//! it, the wrapped ones, once; the rest when the main process has exited, or when time runs out.

use crate::common;

use std::fs;
use std::time::{Duration, Instant};

use common::process::Lameduck;
use common::{MOMENT, wait_for};

/// Serves on its `PORT` and prints each SIGTERM; exits a moment later with the code in its argument.
const SERVER: &str = "
    process.on('SIGTERM', () => { console.log('server heard'); setTimeout(() => process.exit(process.argv[1]), 200) });
    require('http').createServer((req, res) => res.end('ok')).listen(process.env.PORT, '127.0.0.1');";

fn heard(run: &Lameduck, who: &str) -> usize {
    run.process.output().lines().filter(|line| *line == format!("{who} heard")).count()
}

fn wait_line(run: &Lameduck, text: &str) {
    run.process.wait_line(text, |line| (line == text).then_some(()));
}

/// Sends SIGTERM while the app serves; returns lameduck with its output, and its exit code.
fn ended(args: &[&str], command: &[&str]) -> (Lameduck, i32) {
    let mut run = Lameduck::run(args, command);
    run.wait_log("the app listens");
    run.terminate();
    let code = run.process.wait_exit();
    assert!(!run.process.output().contains("outlived"), "{}", run.process.output());
    (run, code)
}

#[test]
fn a_server_behind_a_shell_hears_sigterm_once_and_its_end_is_the_shells() {
    // (the shell's script, exit code)
    let table = [
        ("node -e \"$0\" 4", 4),
        ("node -e \"$0\" 4; exit $?", 4),
        ("true && node -e \"$0\" 0", 0),
        ("node -e \"$0\" 4 & wait $!; exit 5", 5),
        // Other processes of the pipeline get the end of their input, not a signal.
        ("node -e \"$0\" 0 | cat", 0),
        ("trap '' TERM; node -e \"$0\" 4; exit 6", 6),
        ("trap '' TERM; node -e \"$0\" 4 & wait; exit 6", 6),
        // A shell with its own handler gets the signal itself.
        ("trap 'echo shell heard; kill $!; wait; exit 7' TERM; node -e \"$0\" 4 & wait", 7),
        ("bash -c 'node -e \"$0\" 4; exit 8' \"$0\"; exit 9", 9),
    ];
    for shell in ["sh", "bash", "dash"] {
        for (script, wanted) in table {
            let (run, code) = ended(&["--grace", "60s", "--reserve", "20s"], &[shell, "-c", script, SERVER]);
            assert_eq!(heard(&run, "server"), 1, "{shell} -c {script}");
            assert_eq!(code, wanted, "{shell} -c {script}");
        }
    }
}

#[test]
fn an_app_that_waits_for_its_working_child_keeps_it() {
    let parent = "
        const { spawn } = require('child_process');
        const work = `const fs = require('fs'); setInterval(() => {
          if (fs.existsSync(process.argv[1])) { console.log('the work is done'); process.exit(0) }
        }, 20)`;
        const child = spawn(process.execPath, ['-e', work, process.argv[1]], { stdio: 'inherit' });
        process.on('SIGTERM', () => { console.log('parent heard'); child.on('exit', (code) => process.exit(code ?? 1)) });
        require('http').createServer((req, res) => res.end('ok')).listen(process.env.PORT, '127.0.0.1');";
    works_on(parent, "parent", 0);
}

#[test]
fn the_workers_of_a_cluster_are_left_to_its_primary() {
    let app = "
        const cluster = require('cluster'), fs = require('fs');
        if (cluster.isPrimary) {
          for (let n = 0; n < 2; n++) cluster.fork();
          process.on('SIGTERM', () => {
            console.log('primary heard');
            setInterval(() => fs.existsSync(process.argv[1]) && cluster.disconnect(() => {
              console.log('the work is done');
              process.exit(3);
            }), 20);
          });
        } else {
          process.on('SIGTERM', () => console.log('worker heard'));
          require('http').createServer((req, res) => res.end('ok')).listen(process.env.PORT, '127.0.0.1');
        }";
    let run = works_on(app, "primary", 3);
    assert_eq!(heard(&run, "worker"), 0);
}

/// Only this part of the app gets SIGTERM, and it works until its file exists.
fn works_on(app: &str, part: &str, code: i32) -> Lameduck {
    let dir = common::process::temporary_directory();
    let done = dir.join("done");
    let command = ["node", "-e", app, done.to_str().expect("UTF-8")];
    let mut run = Lameduck::run(&["--grace", "120s", "--reserve", "60s"], &command);
    run.wait_log("the app listens");
    run.terminate();
    wait_line(&run, &format!("{part} heard"));
    std::thread::sleep(MOMENT);
    assert!(run.process.exited().is_none(), "{}", run.process.output());
    fs::write(done, "").expect("written");
    assert_eq!(run.process.wait_exit(), code);
    assert!(run.process.output().contains("the work is done"), "{}", run.process.output());
    let _ = fs::remove_dir_all(dir);
    run
}

/// Script of a wrapper that starts the server as its child and then runs `then`.
fn unknown_wrapper(then: &str) -> String {
    format!(
        "const child = require('child_process').spawn(process.execPath, ['-e', process.argv[1], process.argv[2]], \
         {{ stdio: 'inherit' }}); {then}"
    )
}

#[test]
fn what_a_main_process_leaves_behind_hears_sigterm_once_that_has_gone() {
    let wrapper = unknown_wrapper("");
    let (run, code) = ended(&["--grace", "60s", "--reserve", "20s"], &["node", "-e", &wrapper, SERVER, "4"]);
    assert_eq!((heard(&run, "server"), code), (1, 128 + 15));
}

#[test]
fn what_an_unknown_wrapper_keeps_to_itself_is_sent_when_time_runs_out() {
    let wrapper =
        unknown_wrapper("process.on('SIGTERM', () => {}); child.on('exit', (code) => process.exit(code))");
    let began = Instant::now();
    let (run, code) = ended(&["--reserve", "4s"], &["node", "-e", &wrapper, SERVER, "4"]);
    assert_eq!((heard(&run, "server"), code), (1, 4));
    assert!(began.elapsed() > Duration::from_secs(3), "the server got SIGTERM too early");
}

#[test]
fn a_shell_that_starts_its_server_again_ends_all_the_same() {
    let shell = "while true; do node -e \"$0\" 0; done";
    let (run, code) = ended(&["--grace", "60s", "--reserve", "20s"], &["sh", "-c", shell, SERVER]);
    assert_eq!(code, 128 + 15);
    assert!(heard(&run, "server") >= 1);
}

#[test]
fn a_signal_for_the_app_reaches_the_server_behind_a_shell_and_ends_no_shell() {
    let reloads = format!("process.on('SIGHUP', () => console.log('reload heard'));{SERVER}");
    let mut run = Lameduck::run(&[], &["sh", "-c", "node -e \"$0\" 4; exit $?", &reloads]);
    run.wait_log("the app listens");
    run.process.signal(rustix::process::Signal::HUP);
    wait_for("the server's line", || (heard(&run, "reload") == 1).then_some(()));
    run.terminate();
    assert_eq!(run.process.wait_exit(), 4);
}
