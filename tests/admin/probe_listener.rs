//! The probe port: responses for the kubelet and Prometheus, and who may not start a drain there.

use crate::common;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use common::http::{Answer, Client};
use common::port::Port;
use common::process::{Lameduck, Node, Process, TOKEN, lameduck};
use common::{LIMIT, MOMENT, wait_for};
use serde_json::{Value, json};

fn ask(proxy: &Lameduck, line: &str, headers: &str) -> Answer {
    let mut client = Client::connect(proxy.probe);
    client.send(format!("{line} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"));
    let head = client.head();
    client.body(line.split(' ').next().expect("a method"), head)
}

fn phase(proxy: &Lameduck) -> Value {
    proxy.status().expect("a status")["phase"].clone()
}

#[test]
fn alive_is_not_ready() {
    let nobody = Port::reserve();
    let proxy = Lameduck::proxy(nobody.addr, &[]);
    let live = ask(&proxy, "GET /livez", "");
    assert_eq!((live.head.status, live.text().as_str()), (200, "ok\n"));
    assert_eq!(ask(&proxy, "HEAD /livez", "").text(), "");
    let ready = ask(&proxy, "GET /readyz", "");
    assert_eq!((ready.head.status, ready.text().as_str()), (503, "the app does not answer\n"));
    let status = proxy.status().expect("a status");
    assert_eq!((&status["ready"], &status["reasons"]), (&json!(false), &json!(["the app does not answer"])));
}

#[test]
fn ready_means_that_the_checked_path_answers() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &["--ready-check", "/no-such-page"]);
    std::thread::sleep(MOMENT);
    assert_eq!(proxy.ready().head.status, 503, "that page is a 404");
    let proxy = Lameduck::proxy(app.addr, &["--ready-check", "/active-requests"]);
    wait_for("ready", || (proxy.ready().text() == "ok\n").then_some(()));
}

#[test]
fn warm_up_comes_before_the_first_ready_as_often_as_asked() {
    // The response to the sixth request waits.
    let script = "let n = 0, last;
        require('http').createServer((req, res) => {
          if (req.url === '/go') { last.end(); return res.end(); }
          console.log(`${req.method} ${req.url}`);
          if (++n === 6) last = res; else res.end();
        }).listen(0, '127.0.0.1', function () { console.log(`listens on port ${this.address().port}`); });";
    let app = Process::start("node", std::process::Command::new("node").args(["-e", script]));
    let port = app.wait_line("the port", |line| line.strip_prefix("listens on port ")?.parse::<u16>().ok());
    let addr = ([127, 0, 0, 1], port).into();
    let args = ["--warm-up", "GET /a", "--warm-up", "HEAD /b?c", "--warm-up-count", "3"];
    let proxy = Lameduck::proxy(addr, &args);
    let sixth = || (app.output().lines().count() == 7).then_some(());
    wait_for("six warm-up requests", sixth);
    let ready = proxy.ready();
    assert_eq!((ready.head.status, ready.text().as_str()), (503, "warm-up is not done\n"));
    Client::ask(addr, "/go");
    wait_for("ready", || (proxy.ready().head.status == 200).then_some(()));
    let pair = "\nGET /a\nHEAD /b?c";
    assert_eq!(app.output(), format!("listens on port {port}{}", pair.repeat(3)));
}

#[test]
fn metrics_are_prometheus_text() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/no-such-page");
    client.answer();
    let asked = || {
        let text = ask(&proxy, "GET /metrics", "").text();
        text.contains("lameduck_requests_total{code=\"4xx\"} 1\n").then_some(text)
    };
    let text = wait_for("the request's count", asked);
    check_exposition(&text);
    let on_control =
        Client::unix(&proxy.control).expect("control").try_ask("/metrics", &[]).expect("an answer");
    check_exposition(&on_control.text());
    assert_eq!(on_control.head.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    assert!(text.contains("\nlameduck_connections 1\n") && text.contains("\nlameduck_phase 0\n"), "{text}");
    let hook = proxy.hook("/drain", Some(TOKEN)).answer();
    assert_eq!(hook.head.status, 200);
    let text = ask(&proxy, "GET /metrics", "").text();
    check_exposition(&text);
    for line in ["lameduck_phase 4", "lameduck_ready 0", "lameduck_drains_total{verdict=\"clean\"} 1"] {
        assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
    }
}

/// Prometheus' text format: each family appears once, as HELP, TYPE and samples, and no sample is repeated.
fn check_exposition(text: &str) {
    assert!(text.ends_with('\n'));
    let (mut families, mut samples) = (HashSet::new(), HashSet::new());
    let (mut family, mut kind) = ("", "");
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').expect("a help text");
            assert!(families.insert(name) && !words.is_empty(), "{line}");
            let typed =
                lines.next().and_then(|line| line.strip_prefix("# TYPE ")).expect("a TYPE after its HELP");
            (family, kind) = typed.split_once(' ').expect("a type");
            assert_eq!(family, name);
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{typed}");
            assert!(
                name.starts_with("lameduck_") && (kind == "counter") == name.ends_with("_total"),
                "{name}"
            );
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').expect("a sample");
        assert!(samples.insert(sample), "twice: {line}");
        assert!(value.parse::<f64>().is_ok_and(|value| value >= 0.0), "{line}");
        let name = sample.split('{').next().unwrap_or_default();
        assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{line}");
        let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{line} under {family}"));
        let known = if kind == "histogram" { ["_bucket", "_sum", "_count"].as_slice() } else { &[""] };
        assert!(known.contains(&suffix), "{line}");
        let labels = sample.strip_prefix(name).unwrap_or_default();
        assert!(labels.is_empty() || (labels.starts_with('{') && labels.ends_with("\"}")), "{line}");
    }
    assert!(text.contains("_bucket{le=\"+Inf\"} ") && !text.contains("\"inf\""), "{text}");
    assert!(families.len() > 10 && samples.len() > 30, "{text}");
}

#[test]
fn without_a_token_of_its_own_every_hook_is_refused() {
    let app = Node::held();
    let control = std::env::temp_dir().join(format!("lameduck-no-token-{}.sock", std::process::id()));
    let mut program = lameduck();
    program.args([
        "proxy",
        "--listen",
        "127.0.0.1:0",
        "--probe-listen",
        "127.0.0.1:0",
        "--log-format",
        "json",
    ]);
    program.args(["--upstream", &app.addr.to_string(), "--control"]).arg(control);
    let proxy = Process::start("lameduck", &mut program);
    let probe = proxy.wait_line("the addresses", |line| {
        serde_json::from_str::<Value>(line).ok()?["probe"].as_str()?.parse().ok()
    });
    for token in ["", "Lameduck-Token: \r\n", "Lameduck-Token: x\r\n"] {
        let mut client = Client::connect(probe);
        client.send(format!("GET /drain HTTP/1.1\r\nHost: x\r\n{token}\r\n"));
        let answer = client.answer();
        assert_eq!(answer.head.status, 403);
        assert!(answer.text().contains("no token is configured"), "{}", answer.text());
    }
    assert!(!proxy.output().contains("drain began"), "{}", proxy.output());
    // The kubelet does not report a hook's status, so the log has to.
    proxy.wait_line("the refusal", |line| line.contains("refused /drain").then_some(()));
}

#[test]
fn a_mistyped_hook_starts_no_drain() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let token = format!("Lameduck-Token: {TOKEN}\r\n");
    for line in ["GET /drain?hok=app", "GET /drain?hook=ap", "GET /drain?hook=app&x"] {
        assert_eq!(ask(&proxy, line, &token).head.status, 400, "{line}");
    }
    assert_eq!(ask(&proxy, "POST /drain", &token).head.status, 405);
    assert_eq!(phase(&proxy), "serving");
}

#[test]
fn other_paths_and_methods_get_the_known_ones_and_no_control() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let token = format!("Lameduck-Token: {TOKEN}\r\n");
    for (line, status, help) in [
        ("POST /livez", 405, "use GET, HEAD"),
        ("DELETE /metrics", 405, "use GET, HEAD"),
        ("HEAD /drain", 405, ""),
        ("GET /ledger", 404, "not found; the routes are GET /livez"),
        ("GET /status", 404, "not found; the routes are GET /livez"),
        ("POST /resume", 404, "not found; the routes are GET /livez"),
    ] {
        let answer = ask(&proxy, line, &token);
        assert_eq!(answer.head.status, status, "{line}");
        assert!(answer.text().starts_with(help), "{}", answer.text());
        assert_eq!(answer.head.header("allow").is_some(), status == 405, "{line}");
    }
}

#[test]
fn a_caller_who_goes_away_does_not_end_the_drain_for_others() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);
    let gone = proxy.hook("/drain", Some(TOKEN));
    proxy.wait_phase("draining");
    let mut other = proxy.hook("/drain", Some(TOKEN));
    drop(gone);
    assert!(other.is_quiet_for(MOMENT));
    assert_eq!(phase(&proxy), "draining");
    app.release();
    assert!(other.answer().text().contains("clean"));
}

#[test]
fn connections_over_the_limit_wait() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut silent: Vec<_> = (0..256).map(|_| Client::connect(proxy.probe)).collect();
    let mut waits = Client::connect(proxy.probe);
    waits.get("/livez");
    assert!(waits.is_quiet_for(MOMENT), "answered although the connection limit is reached");
    // The control listener has its own limit.
    assert_eq!(phase(&proxy), "serving");
    silent.pop();
    assert_eq!(waits.answer().head.status, 200);
}

#[test]
fn a_head_that_is_too_slow_or_too_large_ends_the_connection() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let start = Instant::now();
    let mut slow = Client::connect(proxy.probe);
    slow.send("GET /livez HTTP/1.1\r\nHost");
    let mut large = Client::connect(proxy.probe);
    large.send(format!("GET /livez HTTP/1.1\r\nX: {}", "x".repeat(17 << 10)));
    // Closing with unread input resets the connection, and the reset may overtake the response.
    let (answer, _) = large.read_to_end();
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&answer));
    slow.read_to_end();
    assert!((Duration::from_secs(9)..LIMIT).contains(&start.elapsed()), "{:?}", start.elapsed());
}
