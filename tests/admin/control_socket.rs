//! The control socket and control over TCP: who may use them, what they report and what they change.

use crate::common;

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use common::http::{Answer, Client};
use common::process::{Lameduck, Node, Process, lameduck};
use common::wait_for;
use serde_json::{Value, json};

fn ask(proxy: &Lameduck, line: &str) -> Answer {
    let mut client = Client::unix(&proxy.control).expect("control");
    client.send(format!("{line} HTTP/1.1\r\nHost: x\r\n\r\n"));
    client.answer()
}

fn json_of(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).expect("JSON")
}

/// An empty directory for this test.
fn scratch(name: &str) -> std::path::PathBuf {
    let dir = std::env::temp_dir().join(format!("lameduck-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("a directory");
    dir
}

/// Starts a proxy with this control socket and these additional arguments.
fn with_socket(path: &Path, more: &[&str]) -> Process {
    let mut program = lameduck();
    program.args(["proxy", "--upstream", ":1", "--listen", "127.0.0.1:0", "--log-format", "json"]);
    if !more.contains(&"--probe-listen") {
        program.args(["--probe-listen", "off"]);
    }
    Process::start("lameduck", program.args(more).arg("--control").arg(path))
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it is there").permissions().mode() & 0o777
}

fn wait_listening(proxy: &Process) {
    proxy.wait_line("the addresses", |line| line.contains("\"listening\"").then_some(()));
}

#[test]
fn the_control_socket_is_for_its_user_alone_and_goes_with_the_process() {
    let dir = scratch("mode");
    let socket = dir.join("run/control.sock");
    let mut proxy = with_socket(&socket, &[]);
    wait_listening(&proxy);
    assert_eq!((mode(&socket), mode(&dir.join("run"))), (0o600, 0o700));
    proxy.signal(rustix::process::Signal::TERM);
    assert_eq!(proxy.wait_exit(), 0);
    assert!(!socket.exists());
    let _ = fs::remove_dir_all(dir);
}

#[test]
fn a_stale_control_socket_is_replaced_and_a_live_one_or_a_file_is_not() {
    let dir = scratch("stale");
    let socket = dir.join("c.sock");
    drop(UnixListener::bind(&socket).expect("a socket that is left behind"));
    let mut first = with_socket(&socket, &[]);
    wait_listening(&first);
    let mut second = with_socket(&socket, &[]);
    assert_eq!(second.wait_exit(), 1);
    assert!(second.output().contains("another lameduck uses this control socket"), "{}", second.output());
    UnixStream::connect(&socket).expect("the first still answers");

    // The proxy must not remove a socket that another process bound at the same path.
    fs::remove_file(&socket).expect("removed");
    let _other = UnixListener::bind(&socket).expect("another socket");
    first.signal(rustix::process::Signal::TERM);
    first.wait_exit();
    UnixStream::connect(&socket).expect("the other process's socket is still there");

    let file = dir.join("notes.txt");
    fs::write(&file, "mine").expect("written");
    let mut third = with_socket(&file, &[]);
    assert_eq!(third.wait_exit(), 1);
    assert!(third.output().contains("is not a socket"), "{}", third.output());
    assert_eq!(fs::read(&file).expect("read"), b"mine");
    let _ = fs::remove_dir_all(dir);
}

#[test]
fn a_port_in_use_is_reported_with_its_flag() {
    let dir = scratch("taken");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("its address").to_string();
    for flag in ["--control-listen", "--probe-listen", "--listen"] {
        let mut proxy = with_socket(&dir.join("c.sock"), &[flag, &addr]);
        assert_eq!(proxy.wait_exit(), 1);
        let output = proxy.output();
        assert!(output.contains(flag) && output.contains(&addr) && output.contains("in use"), "{output}");
    }
    let _ = fs::remove_dir_all(dir);
}

#[test]
fn status_and_ledger_show_what_is_in_flight() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let (mut client, mut stream) = (proxy.client(), proxy.client());
    client.get("/hang?token=secret");
    app.wait_active(1);
    stream.get("/stream?n=1000&ms=50");
    stream.wait_seen("line 1");
    wait_for("ready", || (proxy.ready().head.status == 200).then_some(()));
    let status = json_of(&ask(&proxy, "GET /status"));
    for (name, value) in [
        ("phase", json!("serving")),
        ("in_flight", json!(2)),
        ("held", json!(0)),
        ("connections", json!(2)),
        ("ready", json!(true)),
        ("reasons", json!([])),
        ("trigger", Value::Null),
    ] {
        assert_eq!(status[name], value, "{name} in {status}");
    }
    // The ledger shows a response once its first bytes are written; the client may read them a moment earlier.
    let ledger = wait_for("a response in the ledger", || {
        Some(json_of(&ask(&proxy, "GET /ledger"))).filter(|rows| rows[1]["class"] == "response")
    });
    let rows = ledger.as_array().expect("rows");
    assert_eq!(rows.len(), 2);
    for (row, (path, class)) in rows.iter().zip([("/hang", "request"), ("/stream", "response")]) {
        assert_eq!((&row["method"], &row["path"]), (&json!("GET"), &json!(path)), "{row}");
        assert_eq!(row["class"], class, "{row}");
        assert!(
            row["age_ms"].is_u64() && row["peer"].as_str().is_some_and(|peer| peer.starts_with("127.0.0.1:"))
        );
    }
}

#[test]
fn an_operator_drains_with_or_without_a_deadline_and_resumes() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);
    for target in ["timeout=soon", "timeout=0s", "timeout=9999years", "wait=perhaps", "timeot=1s"] {
        assert_eq!(ask(&proxy, &format!("POST /drain?{target}")).head.status, 400, "{target}");
    }
    assert_eq!(proxy.status().expect("a status")["phase"], "serving");

    let mut waiting = Client::unix(&proxy.control).expect("control");
    waiting.send("POST /drain?timeout=1m30s HTTP/1.1\r\nHost: x\r\n\r\n");
    let status = proxy.wait_status("a drain", |status| status["phase"] != "serving");
    assert_eq!(status["trigger"], "operator");
    let left = status["deadline_ms"].as_i64().expect("milliseconds");
    assert!((70_000..=90_000).contains(&left), "{left}");
    let begun = ask(&proxy, "POST /drain?wait=false");
    assert_eq!((begun.head.status, json_of(&begun)), (202, json!({"outcome": "begun"})));
    assert_eq!(json_of(&ask(&proxy, "POST /resume")), json!({"outcome": "resumed"}));
    assert_eq!(json_of(&waiting.answer()), json!({"outcome": "resumed"}));

    ask(&proxy, "POST /drain?wait=false");
    let status = proxy.wait_phase("draining");
    assert_eq!((&status["deadline_ms"], &status["round"]), (&Value::Null, &json!(1)));
    app.release();
    let done = ask(&proxy, "POST /drain");
    assert_eq!(json_of(&done), json!({"outcome": "drained", "verdict": "clean"}));
}

#[test]
fn an_unknown_path_or_method_gets_the_known_ones() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    for (line, status, help) in [
        ("GET /drain", 405, "use POST"),
        ("GET /resume", 405, "use POST"),
        ("POST /status", 405, "use GET, HEAD"),
        ("GET /", 404, "not found; the routes are GET /status"),
    ] {
        let answer = ask(&proxy, line);
        assert_eq!(answer.head.status, status, "{line}");
        assert!(answer.text().starts_with(help), "{}", answer.text());
        assert_eq!(answer.head.header("allow").is_some(), status == 405, "{line}");
    }
}

#[test]
fn control_by_tcp_refuses_what_a_web_page_could_send() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--control-listen", "127.0.0.1:0"]);
    let addr = proxy.wait_log("listening")["control_tcp"].as_str().and_then(|addr| addr.parse().ok());
    let addr: SocketAddr = addr.expect("an address");
    let status = |line: &str, headers: &str| {
        let mut client = Client::connect(addr);
        client.send(format!("{line} HTTP/1.1\r\n{headers}\r\n"));
        client.answer().head.status
    };
    for headers in [
        "",
        "Host: evil.example\r\n",
        "Host: 127.0.0.1.evil.example:4882\r\n",
        "Host: localhost.evil.example\r\n",
        "Host: 10.0.0.7:4882\r\n",
        "Host: 127.0.0.1:4882\r\nOrigin: http://evil.example\r\n",
        "Host: localhost\r\nOrigin: null\r\n",
    ] {
        for line in ["GET /status", "POST /drain"] {
            assert_eq!(status(line, headers), 403, "{line} {headers}");
        }
    }
    // A server that can be tricked into posting to any address cannot add a header of the attacker's choice.
    for line in ["POST /drain", "POST /switch?to=127.0.0.1:1", "POST /hold"] {
        assert_eq!(status(line, "Host: 127.0.0.1:4882\r\n"), 403, "{line}");
    }
    assert_eq!(proxy.status().expect("a status")["phase"], "serving");
    assert_eq!(status("POST /resume", "Host: 127.0.0.1:4882\r\nLameduck-Control: 1\r\n"), 200);
    for host in ["127.0.0.1:4882", "localhost:4882", "LocalHost", "127.0.0.1", "[::1]:4882"] {
        assert_eq!(status("GET /status", &format!("Host: {host}\r\n")), 200, "{host}");
    }
}

/// `--timeout` means: the drain ends within this time, whatever triggered it.
#[test]
fn a_timeout_brings_the_deadline_of_a_drain_that_runs_forward_and_never_back() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);
    let mut first = proxy.command(&["drain"]);
    proxy.wait_phase("draining");
    let sooner = |args: &[&str]| {
        let begun = proxy.command_output(args);
        assert!(begun.status.success(), "{begun:?}");
        let left = proxy.status().expect("a status")["deadline_ms"].as_i64();
        (left.expect("a deadline"), String::from_utf8_lossy(&begun.stderr).into_owned())
    };
    let (left, _) = sooner(&["drain", "--no-wait", "--timeout", "60s"]);
    assert!((40_000..=60_000).contains(&left), "{left}");
    assert_eq!(proxy.wait_log("the drain's deadline is another one now")["trigger"], "operator");
    let (left, told) = sooner(&["drain", "--no-wait", "--timeout", "90s"]);
    assert!(left <= 60_000, "{left}");
    assert!(told.contains("a drain is already running and cuts remaining requests in "), "{told}");
    sooner(&["drain", "--no-wait", "--timeout", "1s"]);
    assert_eq!(first.wait_exit(), 3);
    assert_eq!(client.answer().head.status, 504);
    proxy.terminate();
    assert_eq!(proxy.process.wait_exit(), 3);
}
