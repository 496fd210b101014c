//! Third-party clients and servers work through the proxy: the `ws` package on both sides, socket.io by long polling,
//! `eventsource` with Express's `compression`, Python's httpx and grpcio, and nghttp2's client (`nghttp2-client` in
//! Debian). Those of curl, Node and Go are tested in `http2`, `tls_terminates`, `grpc` and `grpc_interop`.
//!
//! ```text
//! npm install --prefix libraries ws@8 socket.io@4 socket.io-client@4 eventsource@4 express@5 compression@1
//! python3 -m venv libraries/python
//! libraries/python/bin/pip install 'httpx[http2]' grpcio grpcio-health-checking
//! LIBRARIES=libraries cargo test --test other_makes clients_of_other_makes -- --ignored --nocapture
//! ```

use crate::common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::http::Client;
use common::process::{Lameduck, Node, Process};
use common::tls::Authority;
use common::wait_for;
use rustix::process::Signal;

fn libraries() -> PathBuf {
    let dir = std::env::var_os("LIBRARIES").expect("LIBRARIES names the folder with the packages");
    Path::new(&dir).canonicalize().expect("the folder is there")
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common").join(name)
}

/// Runs one of the scripts that need packages from npm.
fn node(name: &str) -> Command {
    let mut node = Command::new("node");
    node.env("NODE_PATH", libraries().join("node_modules")).arg(script(name));
    node
}

/// Starts a script's app; returns the process and its port.
fn serve(name: &str, command: &mut Command) -> (Process, u16) {
    let app = Process::start(name, command.arg("serve"));
    let port = app.wait_line("its port", |line| line.strip_prefix("listens on ")?.trim().parse().ok());
    (app, port)
}

/// Runs a script's checks until it exits.
fn check(name: &str, command: &mut Command) {
    let mut client = Process::start(name, command);
    let code = client.wait_exit();
    println!("{}", client.output());
    assert_eq!(code, 0);
}

#[test]
#[ignore = "needs npm's ws: LIBRARIES"]
fn the_ws_package_on_both_sides() {
    let ws = || node("ws_cases.js");
    let (_app, port) = serve("ws", &mut ws());
    let proxy = Lameduck::proxy_to(&format!("127.0.0.1:{port}"), &[]);
    check("ws", ws().args(["check", &proxy.listen.port().to_string()]));
}

#[test]
#[ignore = "needs npm's socket.io and socket.io-client: LIBRARIES"]
fn socket_io_by_long_polling_over_a_hold_and_a_drain() {
    let (app, port) = serve("socket.io", &mut node("socketio_cases.js"));
    let upstream = format!("127.0.0.1:{port}");
    let mut proxy = Lameduck::proxy_to(&upstream, &[]);
    let listen = proxy.listen.to_string();
    let client = |what: &str| {
        let port = proxy.listen.port().to_string();
        Process::start("client", node("socketio_cases.js").args([what, &port]))
    };
    let waiting = client("wait");
    waiting.wait_line("a session", |line| (line == "client: connect").then_some(()));
    wait_for("its long poll", || {
        let ledger = Client::unix(&proxy.control)?.try_ask("/ledger", &[])?;
        ledger.text().contains("long-poll").then_some(())
    });
    let mut hold = proxy.command(&["hold", "--until-idle"]);
    assert_eq!(hold.wait_exit(), 0, "{}", hold.output());
    waiting.wait_line("its end", |line| (line == "client: disconnect: transport close").then_some(()));
    app.wait_line("its end", |line| (line == "server: disconnect: transport error").then_some(()));
    assert!(proxy.command_output(&["resume"]).status.success());

    let mut talking = client("talk");
    talking.wait_line("an answer", |line| (line == "client: confirmed").then_some(()));
    proxy.terminate();
    proxy.expect_clean_exit();
    let _next = Lameduck::proxy_to(&upstream, &["--listen", &listen]);
    talking.signal(Signal::INT);
    assert_eq!(talking.wait_exit(), 0, "{}", talking.output());
}

#[test]
#[ignore = "needs npm's eventsource, express and compression: LIBRARIES"]
fn eventsource_with_express_compression_over_a_hold() {
    let (_app, port) = serve("express", &mut node("eventsource_cases.js"));
    let proxy = Lameduck::proxy_to(&format!("127.0.0.1:{port}"), &[]);
    let mut client = Process::start(
        "client",
        node("eventsource_cases.js").args(["listen", &proxy.listen.port().to_string()]),
    );
    client.wait_line("an event", |line| (line == "event 3 by gzip").then_some(()));
    let mut hold = proxy.command(&["hold", "--until-idle"]);
    assert_eq!(hold.wait_exit(), 0, "{}", hold.output());
    client.wait_line("its end", |line| line.starts_with("error: ").then_some(()));
    assert!(proxy.command_output(&["resume"]).status.success());
    assert_eq!(client.wait_exit(), 0, "{}", client.output());
}

#[test]
#[ignore = "needs nghttp"]
fn nghttp_with_and_without_tls() {
    let app = Node::slow();
    let (proxy, https) = Authority::default().proxy(&app.addr.to_string(), &[]);
    for url in [format!("http://{}", proxy.listen), format!("https://localhost:{}", https.port())] {
        let slow = format!("{url}/slow?ms=100");
        let output = Command::new("nghttp").args(["-n", "-s", "-y", &url, &slow]).output().expect("nghttp");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.matches(" 200 ").count() == 2, "{url}: {text}");
    }
}

#[test]
#[ignore = "needs Python's httpx and grpcio: LIBRARIES"]
fn httpx_and_grpcio() {
    let python = || {
        let mut python = Command::new(libraries().join("python/bin/python"));
        python.arg(script("clients.py"));
        python
    };
    let (authority, app) = (Authority::default(), Node::slow());
    let (_front, https) = authority.proxy(&app.addr.to_string(), &[]);
    let (_grpc_app, port) = serve("grpcio", &mut python());
    let proxy = Lameduck::proxy_to(&format!("127.0.0.1:{port}"), &[]);
    let (https, grpc) = (https.port().to_string(), proxy.listen.port().to_string());
    check("python", python().args(["check", &https, &authority.file(), &grpc]));
}
