//! An app on a unix socket: its probes reach it, and the socket file that it leaves behind when it dies does not
//! prevent its restart.

use crate::common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::app::RawApp;
use common::http::{Answer, Client};
use common::process::{Lameduck, Node, Process, temporary_directory};
use common::wait_for;

fn node(socket: &Path) -> Process {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/held.js");
    // An unmodified app may call `listen(process.env.PORT)`, which accepts a path; the host has to be removed here.
    let text = std::fs::read_to_string(script).expect("held.js").replace(", '127.0.0.1', ()", ", ()");
    let text = text.replace("${server.address().port}", "${server.address()}");
    let node = Process::start("node", Command::new("node").args(["-e", &text]).env("PORT", socket));
    node.wait_line("the app", |line| line.contains("listens on port").then_some(()));
    node
}

fn socket() -> PathBuf {
    temporary_directory().join("app.sock")
}

fn proxy(socket: &Path, args: &[&str]) -> Lameduck {
    Lameduck::proxy_to(&format!("unix:{}", socket.display()), args)
}

#[test]
fn an_app_that_was_killed_can_listen_again_and_nothing_is_lost() {
    let socket = socket();
    let mut app = node(&socket);
    let proxy = proxy(&socket, &["--upstream-wait", "60s"]);
    assert_eq!(Client::ask(proxy.listen, "/").head.status, 200);
    wait_for("ready", || (proxy.ready().head.status == 200).then_some(()));
    for _ in 0..3 {
        app.kill();
        let mut client = proxy.client();
        client.get("/");
        wait_for("the file to go", || (!socket.exists()).then_some(()));
        // Otherwise the app would exit with EADDRINUSE.
        app = node(&socket);
        assert_eq!(client.answer().head.status, 200);
        wait_for("ready again", || (proxy.ready().head.status == 200).then_some(()));
    }
    proxy.wait_log("removed the socket that the app left behind");
}

#[test]
fn the_apps_probes_are_passed_on_past_the_proxy_and_nothing_else_is() {
    let socket = socket();
    let app = RawApp::unix(&socket);
    let proxy = proxy(&socket, &["--app-probe", "/healthz?full=1", "--app-probe", "/active"]);
    let mut probe = Client::connect(proxy.probe);
    probe.request("GET", "/app-probe/healthz?full=1", &["X-Probe: me", "User-Agent: kube-probe/1.34"]);
    let mut asked = app.asked();
    assert!(asked.head.starts_with("GET /healthz?full=1 HTTP/1.1\r\n"), "{}", asked.head);
    assert!(asked.has_line("x-probe: me") && asked.has_line("user-agent: kube-probe/1.34"), "{}", asked.head);
    asked.send("HTTP/1.1 418 Teapot\r\ncontent-type: text/x\r\ncontent-length: 3\r\n\r\nno\n");
    let answer = probe.answer();
    assert_eq!((answer.head.status, answer.text().as_str()), (418, "no\n"));
    assert!(answer.head.has("content-type", "text/x"));
    assert_eq!(proxy.status().expect("a status")["in_flight"], 0);

    let ask = |target: &str| -> Answer { Client::ask(proxy.probe, target) };
    for target in ["/app-probe/healthz", "/app-probe/", "/app-probe/active?x", "/app-probe/admin"] {
        assert_eq!(ask(target).head.status, 404, "{target}");
    }
    let mut post = Client::connect(proxy.probe);
    post.request("POST", "/app-probe/active", &["Content-Length: 0"]);
    assert_eq!(post.answer().head.status, 405);
    assert!(app.asked_within(common::MOMENT).is_none());
}

/// The kubelet reads at most 10 KiB.
#[test]
fn a_probes_answer_is_bounded_and_an_app_that_is_down_is_a_502() {
    let socket = socket();
    let app = RawApp::unix(&socket);
    let proxy = proxy(&socket, &["--app-probe", "/healthz"]);
    let mut probe = Client::connect(proxy.probe);
    probe.get("/app-probe/healthz");
    let mut asked = app.asked();
    asked.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
    asked.send(format!("4000\r\n{}\r\n", "x".repeat(0x4000)));
    let answer = probe.answer();
    assert_eq!((answer.head.status, answer.body.len()), (200, 10 << 10), "the response is cut at the limit");

    std::fs::remove_file(&socket).expect("the socket");
    assert_eq!(Client::ask(proxy.probe, "/app-probe/healthz").head.status, 502);
}

/// lameduck's own liveness probe and its hooks use the same port.
#[test]
fn probes_of_an_app_that_hangs_delay_no_other_requests() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--app-probe", "/wait"]);
    let mut probes: Vec<_> = (0..300).map(|_| Client::connect(proxy.probe)).collect();
    for probe in &mut probes {
        probe.get("/app-probe/wait");
    }
    assert_eq!(Client::ask(proxy.probe, "/livez").head.status, 200);
    app.wait_active(32);
    app.release();
    let statuses: Vec<_> = probes.into_iter().map(|mut probe| probe.answer().head.status).collect();
    let count = |wanted: u16| statuses.iter().filter(|status| **status == wanted).count();
    assert_eq!((count(200), count(503)), (32, 268));
    // Probes that have ended make room for others.
    let mut again = Client::connect(proxy.probe);
    again.get("/app-probe/wait");
    app.wait_active(1);
    app.release();
    assert_eq!(again.answer().head.status, 200);
}
