//! The promises of `lameduck run` about the app that it starts, with real processes.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use crate::common;

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::port::Port;
use lameduck::supervise::{App, Exit, StartError};
use rustix::process::Signal;

/// Time limit of every wait, generous for a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Serves on `PORT` of its argument's address, by default 127.0.0.1. Like all apps here it exits after a minute.
const SERVER: &str = "setTimeout(() => process.exit(99), 60e3).unref();
    require('http').createServer((q, a) => a.end('ok')).listen(process.env.PORT, process.argv[1] || '127.0.0.1');";

/// Runs a test in its own process, because the reaper waits for all children of the process.
fn alone<F: Future<Output = ()>>(name: &str, test: impl FnOnce() -> F) {
    const INSIDE: &str = "LAMEDUCK_TEST_ALONE";
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime
            .block_on(async { tokio::time::timeout(PATIENCE, test()).await.expect("the test hangs") });
    }
    // The output goes to a file, because processes that a failed test leaves behind would keep a pipe open.
    let path = scratch(name).join("output");
    let output = std::fs::File::create(&path).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &in_full(name), "--nocapture"]).env(INSIDE, "1").stdin(Stdio::null());
    let status = command.stdout(output.try_clone().unwrap()).stderr(output).status().unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    assert!(status.success() && text.contains("1 passed"), "{text}");
}

/// A test's full name, which begins with its module's.
fn in_full(name: &str) -> String {
    let (_, module) = module_path!().split_once("::").expect("a module of the test program");
    format!("{module}::{name}")
}

/// A port that stays reserved until this process exits, and with it its only test.
fn reserved() -> u16 {
    let port = Port::reserve();
    let number = port.number();
    std::mem::forget(port);
    number
}

async fn start(argv: &[&str]) -> App {
    App::start(argv, reserved()).await.unwrap()
}

async fn refused(argv: &[&str]) -> StartError {
    App::start(argv, reserved()).await.unwrap_err()
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An empty directory for this test.
fn scratch(name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// State, parent and process group of every process.
fn processes() -> Vec<(u32, String, u32, u32)> {
    let pids =
        std::fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        Some((pid, fields.next()?.into(), fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    })
    .collect()
}

fn group_of(app: &App) -> Vec<u32> {
    processes().into_iter().filter(|(.., group)| *group == app.pid()).map(|(pid, ..)| pid).collect()
}

fn children() -> Vec<(u32, String)> {
    let own = std::process::id();
    processes()
        .into_iter()
        .filter(|(_, _, parent, _)| *parent == own)
        .map(|(pid, state, ..)| (pid, state))
        .collect()
}

#[test]
fn waits_until_the_app_listens_on_its_port_on_ipv4() {
    alone("waits_until_the_app_listens_on_its_port_on_ipv4", async || {
        let app = start(&["node", "-e", SERVER]).await;
        let addr = app.wait_listening(PATIENCE).await.unwrap();
        assert_eq!((addr.ip(), addr.port()), (IpAddr::from(Ipv4Addr::LOCALHOST), app.port()));
        assert_eq!(app.terminate(Signal::TERM, PATIENCE).await, Exit { code: 143, killed: false });
    });
}

#[test]
fn waits_until_the_app_listens_on_its_port_on_ipv6() {
    alone("waits_until_the_app_listens_on_its_port_on_ipv6", async || {
        let app = start(&["node", "-e", SERVER, "::1"]).await;
        let addr = app.wait_listening(PATIENCE).await.unwrap();
        assert_eq!((addr.ip(), addr.port()), (IpAddr::from(Ipv6Addr::LOCALHOST), app.port()));
        app.terminate(Signal::TERM, PATIENCE).await;
    });
}

#[test]
fn success_is_code_0_for_everyone_who_asks() {
    alone("success_is_code_0_for_everyone_who_asks", async || {
        let app = start(&["true"]).await;
        assert_eq!(tokio::join!(app.exited(), app.exited()), (0, 0));
        assert_eq!(app.exited().await, 0);
        assert_eq!(app.terminate(Signal::TERM, PATIENCE).await, Exit { code: 0, killed: false });
    });
}

#[test]
fn the_apps_code_is_kept() {
    alone("the_apps_code_is_kept", async || {
        assert_eq!(start(&["sh", "-c", "exit 7"]).await.exited().await, 7);
    });
}

#[test]
fn a_death_by_signal_is_128_plus_its_number() {
    alone("a_death_by_signal_is_128_plus_its_number", async || {
        assert_eq!(start(&["sh", "-c", "kill -SEGV $$"]).await.exited().await, 139);
    });
}

#[test]
fn a_command_that_is_not_there_is_127() {
    alone("a_command_that_is_not_there_is_127", async || {
        let error = refused(&["no-such-command"]).await;
        assert_eq!(error.exit_code(), 127);
        assert!(error.to_string().contains("no-such-command: command not found"), "{error}");
    });
}

#[test]
fn a_command_without_its_interpreter_is_told_apart_from_a_missing_one() {
    alone("a_command_without_its_interpreter_is_told_apart_from_a_missing_one", async || {
        let script = scratch("interpreter").join("app");
        std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
        std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
        let error = refused(&[script.to_str().unwrap()]).await;
        assert_eq!(error.exit_code(), 127);
        assert!(error.to_string().contains("#!"), "{error}");
    });
}

#[test]
fn a_command_that_can_not_be_run_is_126() {
    alone("a_command_that_can_not_be_run_is_126", async || {
        let script = scratch("mode").join("app");
        std::fs::write(&script, "#!/bin/sh\n").unwrap();
        let error = refused(&[script.to_str().unwrap()]).await;
        assert_eq!(error.exit_code(), 126);
        assert!(error.to_string().contains("chmod +x"), "{error}");
    });
}

#[test]
fn a_taken_port_is_seen_before_the_app_starts() {
    alone("a_taken_port_is_seen_before_the_app_starts", async || {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let error = App::start(&["true"], other.local_addr().unwrap().port()).await.unwrap_err();
        assert!(
            matches!(error, StartError::PortTaken(addr) if addr == other.local_addr().unwrap()),
            "{error}"
        );
        assert_eq!(children(), []);
    });
}

#[test]
fn an_app_that_exits_before_it_listens_ends_the_wait_with_its_code() {
    alone("an_app_that_exits_before_it_listens_ends_the_wait_with_its_code", async || {
        let error = start(&["sh", "-c", "exit 7"]).await.wait_listening(PATIENCE * 2).await.unwrap_err();
        assert_eq!(error.exit_code(), 7);
        assert!(error.to_string().contains("exited with code 7 before it listened"), "{error}");
    });
}

#[test]
fn an_app_that_listens_on_another_port_is_told_which() {
    alone("an_app_that_listens_on_another_port_is_told_which", async || {
        let (dir, other) = (scratch("other_port"), reserved());
        let (port, up) = (other.to_string(), dir.join("up"));
        // Behind a wrapper, because the server is seldom the process that lameduck started.
        let script = "node -e \"setTimeout(process.exit, 60e3); require('http').createServer() \
                      .listen($0, '::1', () => fs.writeFileSync('$1', ''))\"; :";
        let app = start(&["sh", "-c", script, &port, up.to_str().unwrap()]).await;
        until("the app listens", || up.exists()).await;
        let error = app.wait_listening(Duration::from_millis(100)).await.unwrap_err();
        let told = format!(
            "the app does not listen on port {}, its PORT, after 100ms: \
             it listens on {other} instead: start lameduck with --app-port {other}",
            app.port()
        );
        assert_eq!(error.to_string(), told);
        app.terminate(Signal::TERM, PATIENCE).await;
    });
}

#[test]
fn an_app_that_listens_on_another_address_is_told_so() {
    alone("an_app_that_listens_on_another_address_is_told_so", async || {
        let up = scratch("other_address").join("up");
        let script = "setTimeout(process.exit, 60e3); \
                      require('http').createServer().listen(process.env.PORT, '127.0.0.2', \
                      () => fs.writeFileSync(process.argv[1], ''))";
        let app = start(&["node", "-e", script, up.to_str().unwrap()]).await;
        until("the app listens", || up.exists()).await;
        let error = app.wait_listening(Duration::from_millis(100)).await.unwrap_err().to_string();
        assert!(error.contains(&format!("it listens on 127.0.0.2:{} only", app.port())), "{error}");
        app.terminate(Signal::TERM, PATIENCE).await;
    });
}

#[test]
fn an_app_that_listens_nowhere_is_given_the_option_for_slow_ones() {
    alone("an_app_that_listens_nowhere_is_given_the_option_for_slow_ones", async || {
        let app = start(&["sleep", "60"]).await;
        let error = app.wait_listening(Duration::from_millis(50)).await.unwrap_err();
        assert!(error.to_string().contains("raise --start-timeout"), "{error}");
        assert_eq!(error.exit_code(), 1);
        app.terminate(Signal::TERM, PATIENCE).await;
    });
}

#[test]
fn a_server_behind_a_wrapper_deaf_to_sigterm_gets_its_own() {
    alone("a_server_behind_a_wrapper_deaf_to_sigterm_gets_its_own", async || {
        let app = start(&["sh", "-c", "trap '' TERM; node -e \"$0\" & wait; exit 5", SERVER]).await;
        app.wait_listening(PATIENCE).await.unwrap();
        assert_eq!(app.terminate(Signal::TERM, PATIENCE).await, Exit { code: 5, killed: false });
        assert_eq!(group_of(&app), Vec::<u32>::new());
    });
}

#[test]
fn npm_start_ends_with_its_server() {
    alone("npm_start_ends_with_its_server", async || {
        let dir = scratch("npm_start");
        let package = r#"{ "name": "app", "scripts": { "start": "node server.js" } }"#;
        std::fs::write(dir.join("package.json"), package).unwrap();
        let graceful = "process.on('SIGTERM', () => setTimeout(() => process.exit(0), 200));";
        let server = SERVER.replace("process.argv[1] ||", "");
        std::fs::write(dir.join("server.js"), format!("{graceful}{server}")).unwrap();
        let app = start(&["npm", "--no-update-notifier", "--prefix", dir.to_str().unwrap(), "start"]).await;
        app.wait_listening(PATIENCE).await.unwrap();
        assert!(group_of(&app).len() >= 2, "npm and node: {:?}", group_of(&app));
        assert!(!app.terminate(Signal::TERM, PATIENCE).await.killed);
        assert_eq!(group_of(&app), Vec::<u32>::new());
    });
}

#[test]
fn a_server_that_outlives_its_wrapper_is_waited_for() {
    alone("a_server_that_outlives_its_wrapper_is_waited_for", async || {
        let done = scratch("outlives").join("done");
        let finishing = "process.on('SIGTERM', () => setTimeout(() => { \
                         fs.writeFileSync(process.argv[2], ''); process.exit(0) }, 300));";
        let server = format!("{finishing}{SERVER}");
        let wrapper = "trap 'exit 3' TERM; node -e \"$0\" 127.0.0.1 \"$1\" & wait";
        let app = start(&["sh", "-c", wrapper, &server, done.to_str().unwrap()]).await;
        app.wait_listening(PATIENCE).await.unwrap();
        let ending = tokio::spawn({
            let app = app.clone();
            async move { app.terminate(Signal::TERM, PATIENCE).await }
        });
        assert_eq!(app.exited().await, 3);
        assert!(!done.exists() && !ending.is_finished(), "the wrapper should be gone before its server");
        assert_eq!(ending.await.unwrap(), Exit { code: 3, killed: false });
        assert!(done.exists(), "the server was killed before it had finished");
    });
}

#[test]
fn an_app_deaf_to_sigterm_is_killed_after_the_reserve() {
    alone("an_app_deaf_to_sigterm_is_killed_after_the_reserve", async || {
        let app = start(&["node", "-e", &format!("process.on('SIGTERM', () => {{}});{SERVER}")]).await;
        app.wait_listening(PATIENCE).await.unwrap();
        let (begin, reserve) = (Instant::now(), Duration::from_millis(300));
        assert_eq!(app.terminate(Signal::TERM, reserve).await, Exit { code: 137, killed: true });
        assert!(begin.elapsed() >= reserve);
        assert_eq!(group_of(&app), Vec::<u32>::new());
    });
}

#[test]
fn what_a_dead_app_left_behind_is_ended_too() {
    alone("what_a_dead_app_left_behind_is_ended_too", async || {
        let app = start(&["sh", "-c", "sleep 60 & exit 4"]).await;
        assert_eq!(app.exited().await, 4);
        assert_eq!(group_of(&app).len(), 1);
        assert_eq!(app.terminate(Signal::TERM, PATIENCE).await, Exit { code: 4, killed: false });
        assert_eq!(group_of(&app), Vec::<u32>::new());
    });
}

#[test]
fn a_stopped_app_still_gets_its_sigterm() {
    alone("a_stopped_app_still_gets_its_sigterm", async || {
        let app = start(&["sleep", "60"]).await;
        app.signal(Signal::STOP);
        until("it is stopped", || children().contains(&(app.pid(), "T".into()))).await;
        assert_eq!(app.terminate(Signal::TERM, PATIENCE).await, Exit { code: 143, killed: false });
    });
}

#[test]
fn orphans_are_reaped_before_and_after_the_apps_own_exit() {
    alone("orphans_are_reaped_before_and_after_the_apps_own_exit", async || {
        // Two orphans, each in its own session; each exits when its file exists.
        let dir = scratch("orphans");
        let orphan = |file| {
            format!("(setsid sh -c 'for i in $(seq 1000); do test -e {file} && exit; sleep 0.02; done' &)")
        };
        let script =
            format!("cd {}; {}; {}; exec sleep 60", dir.display(), orphan("first"), orphan("second"));
        let app = start(&["sh", "-c", &script]).await;
        until("both orphans are ours", || children().len() == 3).await;

        std::fs::write(dir.join("first"), "").unwrap();
        until("the first is reaped", || children().len() == 2).await;

        app.terminate(Signal::TERM, PATIENCE).await;
        assert_eq!(children().len(), 1);
        std::fs::write(dir.join("second"), "").unwrap();
        until("the second is reaped", || children().is_empty()).await;
    });
}
