//! Capture: what the shim moves in real processes, who hears of it, what a PID 1 does at SIGTERM, and what the proxy serves
//! in front of it.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

#[path = "../common/mod.rs"]
mod common;

mod apps_move;
mod bind_rule;
mod captured_ports;
mod deaf_pid1;
mod listening_means_reachable;
mod loading;
mod node_options;
mod ports_come_and_go;
mod run_moves_apps;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::{panic, thread};

use common::process::Process;
use lameduck::inject::share;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Address of the pod that isn't loopback.
const POD: &str = "198.18.1.7";
/// The same of IPv6.
const POD_V6: &str = "2001:db8::7";

fn folder() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// The shim as the sidecar writes it.
fn shim() -> &'static Path {
    static SHIM: OnceLock<PathBuf> = OnceLock::new();
    SHIM.get_or_init(|| {
        let dir = folder().join("shim");
        fs::create_dir_all(&dir).unwrap();
        share::write(&dir).unwrap();
        dir.join("shim.so")
    })
}

/// Runs the test in a network namespace like a pod's, with loopback, [`POD`] and [`POD_V6`]. Processes that it starts
/// are in there too. Without the right to make one: left out, and loudly so.
fn in_pod(test: impl FnOnce() + Send) {
    let setup = format!(
        "ip link set lo up && ip addr add {POD}/32 dev lo && ip addr add {POD_V6}/128 dev lo nodad && echo ready && \
         exec sleep 1000"
    );
    let mut unshare = Command::new("unshare");
    unshare.args(["--net", "sh", "-c", &setup]);
    let allowed = Command::new("unshare").args(["--net", "ip", "link"]).output();
    if !allowed.as_ref().is_ok_and(|allowed| allowed.status.success()) {
        return eprintln!(
            "LEFT OUT: no network namespace may be made, or there is no ip (iproute2): {allowed:?}"
        );
    }
    let pod = Process::start("a pod's network", &mut unshare);
    pod.wait_line("its addresses", |line| (line == "ready").then_some(()));
    let enter = || {
        let namespace = File::open(format!("/proc/{}/ns/net", pod.pid())).unwrap();
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        test();
    };
    let ended = thread::scope(|scope| scope.spawn(enter).join());
    if let Err(failed) = ended {
        panic::resume_unwind(failed);
    }
}

/// A program of C compiled with each libc's compiler; one that is missing is left out, and loudly so.
fn with_each_libc(source: &str) -> Vec<PathBuf> {
    ["cc", "musl-gcc"].into_iter().filter_map(|cc| compile(cc, source, &["-pthread"])).collect()
}

/// Compiles `tests/capture/NAME.c`; none without the compiler.
fn compile(cc: &str, source: &str, options: &[&str]) -> Option<PathBuf> {
    let name = format!("{source}-{cc}{}", options.concat().replace('/', "-"));
    let program = folder().join(&name);
    // Another test may be running it.
    let new = folder().join(format!("{name}.{:?}", thread::current().id()));
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/capture").join(source).with_extension("c");
    let mut command = Command::new(cc);
    command.args(["-Wall", "-Wextra", "-Werror", "-O1", "-o"]).arg(&new).arg(from).args(options);
    let Ok(done) = command.output() else {
        eprintln!("LEFT OUT: {source}.c was not tested with {cc}, which is not installed (musl-tools)");
        return None;
    };
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    fs::rename(new, &program).unwrap();
    Some(program)
}

/// The command with the shim.
fn preloaded(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env("LD_PRELOAD", shim()).env_remove("NODE_OPTIONS");
    command
}

/// A file with this content, for a program that wants one.
fn file(name: &str, content: &str) -> PathBuf {
    let (file, new) = (folder().join(name), folder().join(format!("{name}.{:?}", thread::current().id())));
    fs::write(&new, content).unwrap();
    fs::rename(new, &file).unwrap();
    file
}

/// Runs the command to its end; its standard output.
fn output(command: &mut Command) -> String {
    let done = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().unwrap();
    assert!(
        done.status.success(),
        "{command:?}: {:?}\n{}",
        done.status,
        String::from_utf8_lossy(&done.stdout)
    );
    String::from_utf8(done.stdout).unwrap()
}
