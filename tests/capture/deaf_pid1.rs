//! SIGTERM ends a PID 1 without a handler of its own, in any language and under glibc and musl. One with a handler
//! decides itself, and no program sees that a handler is there which it did not set.

use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};

use crate::common::process::{Process, children};
use crate::common::{LIMIT, MOMENT, wait_for};
use crate::{file, shim, with_each_libc};

const UNSHARE: [&str; 4] = ["--pid", "--fork", "--mount-proc", "--kill-child"];
/// Exit code of a PID 1 that SIGTERM ended.
const TERMINATED: i32 = 128 + 15;

/// Starts the command as the first process of a PID namespace with these variables, and waits until it is ready; none
/// where that isn't permitted, and loudly so.
fn pid_1(variables: &[&str], command: &[&str]) -> Option<Process> {
    let allowed = Command::new("unshare").args(UNSHARE).arg("true").output();
    if !allowed.as_ref().is_ok_and(|allowed| allowed.status.success()) {
        eprintln!("LEFT OUT: a deaf PID 1 was not tested, as no PID namespace may be made: {allowed:?}");
        return None;
    }
    let mut unshare = Command::new("unshare");
    unshare.args(UNSHARE).args(["env", "-u", "NODE_OPTIONS"]).args(variables).args(command);
    let process = Process::start("PID 1", &mut unshare);
    process.wait_line("ready", |line| (line == "ready").then_some(()));
    Some(process)
}

fn with_shim(command: &[&str]) -> Option<Process> {
    pid_1(&[&format!("LD_PRELOAD={}", shim().display())], command)
}

/// SIGTERM from outside, as the kubelet sends it.
fn terminate(process: &Process) {
    let pid = children(process.pid())[0];
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), Signal::TERM).unwrap();
}

/// What the process wrote until its end by SIGTERM, and its exit code.
fn ended(mut process: Process) -> (i32, String) {
    terminate(&process);
    let code = process.wait_exit();
    (code, process.output())
}

#[test]
fn without_the_shim_it_is_deaf() {
    let Some(mut deaf) = pid_1(&[], &["sh", "-c", "echo ready; sleep 100; true"]) else { return };
    terminate(&deaf);
    std::thread::sleep(MOMENT);
    assert_eq!(deaf.exited(), None, "else nothing is tested here");
    let variables = [&*format!("LD_PRELOAD={}", shim().display()), "LAMEDUCK_PID1=leave"];
    let Some(mut left) = pid_1(&variables, &["sh", "-c", "echo ready; sleep 100; true"]) else { return };
    terminate(&left);
    std::thread::sleep(MOMENT);
    assert_eq!(left.exited(), None);
}

#[test]
fn it_ends_in_any_language() {
    let serve = "require('http').createServer().listen(0, () => console.log('ready'))";
    let cluster = "const cluster = require('cluster');
        if (cluster.isPrimary) { cluster.fork(); cluster.on('listening', () => console.log('ready')); }
        else require('http').createServer().listen(0);";
    let cluster = file("cluster-pid1.js", cluster);
    for command in [
        &["node", "-e", "setInterval(() => {}, 1000); console.log('ready')"][..],
        &["node", "-e", serve],
        &["node", cluster.to_str().unwrap()],
        &["python3", "-uc", "import time; print('ready'); time.sleep(100)"],
        &["sh", "-c", "echo ready; sleep 100; true"],
        &["bash", "-c", "echo ready; sleep 100; true"],
        &["perl", "-e", "$| = 1; print \"ready\\n\"; sleep 100"],
    ] {
        if Command::new(command[0]).arg("--version").output().is_err() {
            eprintln!("LEFT OUT: {} is not installed", command[0]);
            continue;
        }
        let Some(process) = with_shim(command) else { return };
        let (code, output) = ended(process);
        assert_eq!(code, TERMINATED, "{command:?}: {output}");
    }
}

#[test]
fn the_apps_own_handler_decides() {
    for (command, code, says) in [
        (
            &[
                "node",
                "-e",
                "process.on('SIGTERM', () => { console.log('own'); process.exit(7) }); \
            require('http').createServer().listen(0, () => console.log('ready'))",
            ][..],
            7,
            "own",
        ),
        // As signal-exit does.
        (
            &[
                "node",
                "-e",
                "process.once('SIGTERM', () => { console.log('own'); process.kill(process.pid, 'SIGTERM') }); \
            setInterval(() => {}, 1000); console.log('ready')",
            ],
            TERMINATED,
            "own",
        ),
        (&["sh", "-c", "trap 'echo trapped; exit 9' TERM; echo ready; sleep 100 & wait; true"], 9, "trapped"),
        (
            &[
                "python3",
                "-uc",
                "import signal, sys, time\nsignal.signal(15, lambda *_: (print('own'), sys.exit(5)))\n\
            print('ready'); time.sleep(100)",
            ],
            5,
            "own",
        ),
        // As uvicorn does: it restores what it found, and raises the signal anew.
        (
            &[
                "python3",
                "-uc",
                "import os, signal, time\ndef own(*_):\n  print('own'); signal.signal(15, was); os.kill(1, 15)\n\
            was = signal.signal(15, own); print('ready'); time.sleep(100)",
            ],
            TERMINATED,
            "own",
        ),
    ] {
        let Some(process) = with_shim(command) else { return };
        let (ended, output) = ended(process);
        assert_eq!(ended, code, "{command:?}: {output}");
        assert!(output.contains(says), "{command:?}: {output}");
    }
}

/// `sh -c` is PID 1, and its child the app: it hears SIGTERM, and has its time.
#[test]
fn it_ends_after_all_the_others() {
    let app = "process.on('SIGTERM', () => setTimeout(() => { console.log('done'); process.exit(0) }, 200)); \
               setInterval(() => {}, 1000); console.log('ready')";
    let Some(process) = with_shim(&["sh", "-c", "sleep 100 & node -e \"$0\"; true", app]) else { return };
    let (code, output) = ended(process);
    assert_eq!((code, output.contains("done")), (TERMINATED, true), "{output}");
}

/// npm passes SIGTERM on, waits, and then sends it to itself, which it survives as a PID 1 without the shim.
#[test]
fn npm_ends_as_under_any_other_pid_and_its_app_before_it() {
    let dir = crate::folder().join("capture-npm");
    std::fs::create_dir_all(&dir).unwrap();
    let app = "process.on('SIGTERM', () => setTimeout(() => { console.log('done'); process.exit(3) }, 200)); \
               setInterval(() => {}, 1000); console.log('ready')";
    std::fs::write(dir.join("app.js"), app).unwrap();
    std::fs::write(dir.join("package.json"), r#"{"scripts": {"start": "node app.js"}}"#).unwrap();
    let Some(process) = with_shim(&["npm", "--prefix", dir.to_str().unwrap(), "start"]) else { return };
    let (code, output) = ended(process);
    assert_eq!((code, output.contains("done")), (TERMINATED, true), "{output}");
}

/// A worker that a PID 1 forks dies of SIGTERM itself, as its parent sees.
#[test]
fn a_fork_of_it_dies_of_the_signal() {
    let script = "import os, time\npid = os.fork()\nif not pid: time.sleep(100)\nos.kill(pid, 15)\n\
                  print(os.WTERMSIG(os.waitpid(pid, 0)[1])); print('ready'); time.sleep(100)";
    let Some(process) = with_shim(&["python3", "-uc", script]) else { return };
    let (code, output) = ended(process);
    assert_eq!((code, output.lines().next()), (TERMINATED, Some("15")), "{output}");
}

fn says(program: &Path, how: &str) -> Option<(i32, String)> {
    Some(ended(with_shim(&[program.to_str().unwrap(), how])?))
}

#[test]
fn a_program_sees_only_its_own_handlers() {
    for program in with_each_libc("sigterm") {
        for (how, after, code) in [
            ("default", "after default, one-shot 0", TERMINATED),
            ("own", "after own, one-shot 0", 7),
            ("signal", "after own, one-shot 0", 7),
            ("one-shot", "after raises, one-shot 1", TERMINATED),
            ("restore", "after default, one-shot 0", TERMINATED),
        ] {
            let Some((ended, output)) = says(&program, how) else { return };
            assert_eq!(ended, code, "{how}: {output}");
            let lines: Vec<_> = output.lines().collect();
            let after = format!("{after}, errno 4242");
            assert_eq!(lines[..3], ["before default", &*after, "other own own 1"], "{how}");
            assert_eq!(lines.contains(&"once"), how == "one-shot", "{how}: {output}");
        }
    }
}

/// As any other process: the shim leaves SIGTERM alone.
#[test]
fn another_pid_dies_of_the_signal_as_ever() {
    for program in with_each_libc("sigterm") {
        for (how, code) in
            [("default", TERMINATED), ("own", 7), ("one-shot", TERMINATED), ("restore", TERMINATED)]
        {
            let mut process = Process::start("sigterm", crate::preloaded(&program).arg(how));
            process.wait_line("ready", |line| (line == "ready").then_some(()));
            process.signal(Signal::TERM);
            let exited = wait_for("its end", || process.exited());
            assert_eq!(exited, code, "{how} within {LIMIT:?}");
        }
    }
}
