//! The app's own preStop hook still runs: once, after the drain, before its SIGTERM, and whatever the drain's result.

use crate::common;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::app::RawApp;
use common::http::{Answer, Client};
use common::port::Port;
use common::process::{Lameduck, Node, Process, TOKEN};
use common::{MOMENT, wait_for};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

/// A proxy that calls `own` after the drain.
fn proxy(app: &Node, own: SocketAddr, args: &[&str]) -> Lameduck {
    let url = format!("http://{own}/bye?now");
    Lameduck::proxy(app.addr, &[&["--after-drain", &url], args].concat())
}

fn app_hook(proxy: &Lameduck) -> Client {
    proxy.hook("/drain?hook=app", Some(TOKEN))
}

#[test]
fn an_http_get_is_called_once_drained_before_the_hook_has_its_answer() {
    let (app, own) = (Node::held(), RawApp::start());
    let args = ["--after-drain-header", "X-Why: it goes", "--after-drain-header", "Host: me.example"];
    let mut proxy = proxy(&app, own.addr, &args);
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);
    // The kubelet may call twice.
    let mut hooks = [app_hook(&proxy), app_hook(&proxy)];
    proxy.wait_phase("draining");
    assert!(own.asked_within(MOMENT).is_none(), "called while a request ran");

    app.release();
    client.answer();
    let mut asked = own.asked();
    assert!(asked.head.starts_with("GET /bye?now HTTP/1.1\r\n"), "{}", asked.head);
    assert!(asked.has_line("x-why: it goes") && asked.has_line("host: me.example"), "{}", asked.head);
    assert!(hooks.iter_mut().all(|hook| hook.is_quiet_for(MOMENT)), "answered before the app's own hook");
    asked.send(OK);
    for hook in &mut hooks {
        assert!(hook.answer().text().contains("clean"));
    }
    assert_eq!(proxy.wait_log("called the app's own preStop hook")["status"], 200);
    // Later calls return at once too.
    assert!(app_hook(&proxy).answer().text().contains("clean"));
    assert!(own.asked_within(MOMENT).is_none(), "called twice");
    proxy.terminate();
    proxy.expect_clean_exit();
}

/// On the command line, every user of the node could read the values.
#[test]
fn its_header_fields_come_from_a_variable_as_well() {
    let (app, own) = (Node::held(), RawApp::start());
    let mut program = common::process::lameduck();
    program.env("LAMEDUCK_AFTER_DRAIN_HEADER", "Authorization: Basic \"a,b\"; $(X) #=:\nAccept: ");
    let (upstream, url) = (app.addr.to_string(), format!("http://{}/", own.addr));
    let mode = ["proxy", "--upstream", &upstream, "--after-drain", &url];
    let proxy = Lameduck::start_as(program, &mode, &[], &[]);
    let mut hook = app_hook(&proxy);
    let mut asked = own.asked();
    assert!(asked.has_line("authorization: Basic \"a,b\"; $(X) #=:"), "{}", asked.head);
    assert!(asked.has_line("accept: "), "{}", asked.head);
    asked.send(OK);
    hook.answer();
}

/// When its hook returns, the kubelet stops the app, even if the drain was resumed.
#[test]
fn a_resume_does_not_skip_it() {
    let (app, own) = (Node::held(), RawApp::start());
    let proxy = proxy(&app, own.addr, &["--sidecar", "native"]);
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);
    let mut hooks = [app_hook(&proxy), proxy.hook("/drain?hook=sidecar", Some(TOKEN))];
    proxy.wait_phase("draining");
    assert!(proxy.command_output(&["resume"]).status.success());
    let mut asked = own.asked();
    assert!(hooks[0].is_quiet_for(MOMENT), "answered before the app's own hook");
    asked.send(OK);
    for hook in &mut hooks {
        assert!(hook.answer().text().contains("resumed"));
    }
    assert_eq!(proxy.status().expect("a status")["phase"], "serving");
}

#[test]
fn a_path_alone_is_the_apps_own() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--after-drain", "/active-requests"]);
    app_hook(&proxy).answer();
    let called = proxy.wait_log("called the app's own preStop hook");
    assert_eq!((&called["status"], &called["url"]), (&200.into(), &"/active-requests".into()));
}

#[test]
fn its_failure_is_logged_and_fails_nothing() {
    let app = Node::held();
    let nobody = Port::reserve();
    let gone = proxy(&app, nobody.addr, &[]);
    assert!(app_hook(&gone).answer().text().contains("clean"));
    gone.wait_log("the app's own preStop hook did not answer");

    let own = RawApp::start();
    let failing = proxy(&app, own.addr, &[]);
    let mut hook = app_hook(&failing);
    own.asked().send("HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n");
    assert!(hook.answer().text().contains("clean"));
    assert_eq!(failing.wait_log("the app's own preStop hook failed")["status"], 500);
}

#[test]
fn it_may_take_what_is_left_of_the_grace_and_no_longer() {
    let (app, own) = (Node::held(), RawApp::start());
    let proxy = proxy(&app, own.addr, &["--grace", "2s", "--reserve", "1s"]);
    let began = Instant::now();
    let mut hook = app_hook(&proxy);
    let _silent = own.asked();
    assert!(hook.answer().text().contains("clean"));
    assert!(began.elapsed() > Duration::from_millis(1900), "{:?}", began.elapsed());
}

/// A drain that ends a hold, or follows what looked like a restart, does not start the time limit again.
#[test]
fn neither_does_it_after_a_hold_nor_when_a_restart_becomes_a_deletion() {
    let grace = ["--grace", "5s", "--reserve", "2s", "--restart-grace", "60s", "--sidecar", "native"];
    for held in [true, false] {
        let (app, own) = (Node::held(), RawApp::start());
        let proxy = proxy(&app, own.addr, &grace);
        let mut client = proxy.client();
        client.get("/wait");
        app.wait_active(1);
        if held {
            assert!(proxy.command_output(&["hold"]).status.success());
        }
        let began = Instant::now();
        let mut hook = app_hook(&proxy);
        if !held {
            wait_for("a restart", || proxy.ready().text().contains("requests are held").then_some(()));
        }
        let _other = proxy.hook("/drain?hook=sidecar", Some(TOKEN));
        proxy.wait_phase("draining");
        std::thread::sleep(Duration::from_secs(2).saturating_sub(began.elapsed()));
        app.release();
        let _silent = own.asked();
        assert!(hook.answer().text().contains("clean"));
        let took = began.elapsed();
        let seconds = Duration::from_millis(4900)..Duration::from_millis(6500);
        assert!(seconds.contains(&took), "after a hold: {held}: {took:?}");
    }
}

#[test]
fn no_other_trigger_calls_it() {
    let (app, own) = (Node::held(), RawApp::start());
    let proxy = proxy(&app, own.addr, &[]);
    assert!(proxy.command_output(&["drain"]).status.success());
    proxy.hook("/drain?hook=sidecar", Some(TOKEN)).answer();
    assert!(own.asked_within(MOMENT).is_none(), "the app is not being stopped");
    // Now the pod is deleted.
    let mut hook = app_hook(&proxy);
    own.asked().send(OK);
    hook.answer();
}

#[test]
fn an_ordinary_sidecar_stays_until_it_has_ended() {
    let (app, own) = (Node::held(), RawApp::start());
    let mut proxy = proxy(&app, own.addr, &["--sidecar", "ordinary"]);
    let mut hooks = [app_hook(&proxy), proxy.hook("/drain?hook=sidecar", Some(TOKEN))];
    wait_for("both hooks", || (proxy.status()?["phase"] != "serving").then_some(()));
    proxy.terminate();
    let mut asked = own.asked();
    proxy.wait_phase("drained");
    std::thread::sleep(MOMENT * 3);
    assert_eq!(proxy.process.exited(), None);
    asked.send(OK);
    for hook in &mut hooks {
        assert!(hook.answer().text().contains("clean"));
    }
    proxy.expect_clean_exit();
}

#[test]
fn each_restart_of_the_app_alone_calls_it() {
    let mut app = Node::held();
    let (port, own) = (app.addr.port(), RawApp::start());
    let proxy = proxy(&app, own.addr, &["--sidecar", "native"]);
    for _ in 0..2 {
        let mut hook = app_hook(&proxy);
        let mut asked = own.asked();
        assert!(hook.is_quiet_for(MOMENT), "the app may not stop yet");
        asked.send(OK);
        assert!(hook.answer().text().contains("app-may-stop"));
        app.process.kill();
        app = Node::held_at(port);
        let status = || Client::ask(proxy.listen, "/").head.status;
        assert_eq!(status(), 200);
        wait_for("ready again", || (proxy.ready().head.status == 200).then_some(()));
    }
}

/// The shared copy of the program, which another user must be able to run.
fn program(shared: &Path) -> Command {
    let mut command = Command::new(shared.join("lameduck"));
    if rustix::process::geteuid().is_root() {
        command.uid(65534).gid(65534);
    }
    command
}

fn sharing(app: &Node) -> (Lameduck, std::path::PathBuf, String) {
    let shared = common::process::temporary_directory();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o777)).expect("ours");
    let args = ["--share-dir", &shared.display().to_string(), "--control-listen", "127.0.0.1:0"];
    let proxy = Lameduck::proxy(app.addr, &args);
    let listening = proxy.wait_log("listening");
    let control = format!("--control={}", listening["control_tcp"].as_str().expect("by TCP"));
    (proxy, shared, control)
}

#[test]
fn an_exec_runs_after_the_drain_as_any_user() {
    let app = Node::held();
    let (proxy, shared, control) = sharing(&app);
    let mode = |name: &str| fs::metadata(shared.join(name)).expect("written").permissions().mode() & 0o777;
    assert_eq!((mode("lameduck"), mode("preload.js")), (0o755, 0o644));
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);

    let own = ["drain", "--app-hook", &control, "--", "sh", "-c", "echo \"bye $$ $0\"; exit 7", "word"];
    let mut hook = Process::start("hook", program(&shared).args(own));
    proxy.wait_phase("draining");
    assert_eq!(proxy.status().expect("a status")["trigger"], "hook");
    std::thread::sleep(MOMENT);
    assert_eq!((hook.exited(), hook.output()), (None, String::new()), "ran while a request ran");
    app.release();
    client.answer();
    // The command replaces lameduck: the same process id, and its exit code.
    let id = hook.pid();
    hook.wait_line("the own hook", |line| (line == format!("bye {id} word")).then_some(()));
    assert_eq!(hook.wait_exit(), 7);
    let _ = fs::remove_dir_all(shared);
}

#[test]
fn an_exec_runs_though_no_proxy_answers() {
    let nobody = Port::reserve();
    let control = format!("--control={}", nobody.addr);
    let hook = |command: &[&str]| {
        let args = [&["drain", "--app-hook", &control, "--"], command].concat();
        common::process::lameduck().args(args).output().expect("lameduck starts")
    };
    let ran = hook(&["echo", "bye"]);
    assert_eq!((ran.status.code(), &ran.stdout[..]), (Some(0), &b"bye\n"[..]));
    assert!(String::from_utf8_lossy(&ran.stderr).contains("no lameduck answers on 127.0.0.1:"));
    assert_eq!(hook(&["/nowhere/cmd"]).status.code(), Some(127));
}

#[test]
fn the_control_port_accepts_the_apps_hook_only_without_parameters() {
    let app = Node::held();
    let (proxy, shared, control) = sharing(&app);
    let addr: SocketAddr = control.trim_start_matches("--control=").parse().expect("an address");
    let post = |target: &str| -> Answer {
        let mut client = Client::connect(addr);
        client.send(format!("POST {target} HTTP/1.1\r\nHost: localhost\r\nLameduck-Control: 1\r\n\r\n"));
        client.answer()
    };
    for target in ["/drain?hook=sidecar", "/drain?hook=app&timeout=1s", "/drain?hook=app&wait=false"] {
        assert_eq!(post(target).head.status, 400, "{target}");
    }
    assert_eq!(proxy.status().expect("a status")["phase"], "serving");
    let status = common::process::lameduck().args(["status", &control]).output().expect("lameduck starts");
    assert!(
        String::from_utf8_lossy(&status.stdout).contains("serving"),
        "commands can use the control port too"
    );
    assert!(post("/drain?hook=app").text().contains("clean"));
    let _ = fs::remove_dir_all(shared);
}
