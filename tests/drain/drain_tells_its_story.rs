//! The log describes a drain in a few lines, and contains requests only if the access log is on.

use crate::common;

use common::process::{Lameduck, Node, Process, lameduck};
use common::wait_for;
use rustix::process::Signal;
use serde_json::{Value, json};

fn access(proxy: &Lameduck) -> Vec<Value> {
    let output = proxy.process.output();
    let entries = output.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    entries.filter(|entry| entry["target"] == "access").collect()
}

#[test]
fn a_drain_is_logged_from_its_cause_to_its_verdict() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "125s"]);
    let mut clients: Vec<_> = (0..6).map(|_| proxy.client()).collect();
    clients.iter_mut().for_each(|client| client.get("/hang?token=secret"));
    let (mut events, mut late) = (proxy.client(), proxy.client());
    events.request("GET", "/events?ms=100", &["Accept: text/event-stream"]);
    proxy.wait_in_flight(7);
    proxy.terminate();

    let began = proxy.wait_log("drain began");
    assert_eq!((&began["trigger"], &began["in_flight"]), (&json!("signal"), &json!(7)));
    let deadline = began["deadline_s"].as_f64().expect("seconds");
    assert!((119.0..=120.0).contains(&deadline), "{deadline}");
    late.get("/");
    late.answer();

    let still = proxy.wait_log("still draining");
    assert_eq!((&still["phase"], &still["in_flight"]), (&json!("draining"), &json!(6)));
    let oldest = still["oldest"].as_str().expect("names");
    let mut ages = Vec::new();
    for name in oldest.split(", ") {
        let [method, path, age, class, peer] = name.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{oldest}")
        };
        assert_eq!((method, path, class), ("GET", "/hang", "request"), "{oldest}");
        assert!(peer.starts_with("127.0.0.1:"), "{oldest}");
        ages.push(age.strip_suffix('s').and_then(|age| age.parse::<u32>().ok()).expect("seconds"));
    }
    assert!(ages.len() == 5 && ages.is_sorted_by(|a, b| a >= b) && ages[4] >= 5, "{oldest}");

    proxy.terminate();
    proxy.process.wait_exit();
    let drained = proxy.wait_log("drained");
    let counts = ["complete", "streams_ended", "unsent", "unanswered", "cut"].map(|name| &drained[name]);
    assert_eq!(counts.map(Value::as_u64), [1, 1, 0, 6, 0].map(Some), "{drained}");
    assert_eq!(drained["verdict"], "6 unanswered");
    assert!(drained["seconds"].as_f64().is_some_and(|seconds| seconds > 5.0), "{drained}");
    assert!(!proxy.process.output().contains("secret"));
}

#[test]
fn requests_are_not_logged_unless_asked_for() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/");
    client.answer();
    proxy.terminate();
    proxy.expect_clean_exit();
    assert_eq!(access(&proxy), Vec::<Value>::new());
}

#[test]
fn the_access_log_has_one_line_per_request_without_its_query() {
    let app = Node::held();
    let mut program = lameduck();
    program.env("LAMEDUCK_ACCESS_LOG", "true");
    let proxy = Lameduck::start_as(program, &["proxy", "--upstream", &app.addr.to_string()], &[], &[]);
    let mut client = proxy.client();
    client.request("POST", "/?token=secret", &["Content-Length: 1000"]);
    client.send([b'x'; 1000]);
    client.answer();
    client.get("/");
    client.answer();
    let mut gone = proxy.client();
    gone.get("/wait");
    app.wait_active(1);
    drop(gone);

    wait_for("three access lines", || (access(&proxy).len() == 3).then_some(()));
    let lines = access(&proxy);
    for (line, (method, path, status, ended)) in lines.iter().zip([
        ("POST", "/", 200, "complete"),
        ("GET", "/", 200, "complete"),
        ("GET", "/wait", 0, "client-gone"),
    ]) {
        assert_eq!(line["method"], method, "{line}");
        assert_eq!((&line["path"], &line["status"]), (&json!(path), &json!(status)), "{line}");
        assert_eq!(line["ended"], ended, "{line}");
        assert!(line["ms"].is_u64() && line["peer"] == "127.0.0.1", "{line}");
    }
    let bytes =
        |line: &Value| (line["received"].as_u64().expect("bytes"), line["sent"].as_u64().expect("bytes"));
    assert!(bytes(&lines[0]).0 >= 1000 && bytes(&lines[0]).1 > 0, "{}", lines[0]);
    assert!(bytes(&lines[1]).0 < 1000, "{}", lines[1]);
    assert_eq!(bytes(&lines[2]).1, 0, "{}", lines[2]);
    assert!(!proxy.process.output().contains("secret"));
}

#[test]
fn the_human_format_has_readable_lines() {
    let control = std::env::temp_dir().join(format!("lameduck-human-{}.sock", std::process::id()));
    let mut program = lameduck();
    program.args(["proxy", "--upstream", ":1", "--listen", "127.0.0.1:0", "--probe-listen", "off"]);
    let mut proxy =
        Process::start("lameduck", program.args(["--log-format", "human", "--control"]).arg(control));
    proxy.wait_line("the addresses", |line| {
        line.contains(" INFO listening listen=\"127.0.0.1:").then_some(())
    });
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait_exit(), 0);
    let output = proxy.output();
    assert!(output.contains(" INFO drained verdict=\"clean\" seconds="), "{output}");
    assert!(!output.contains('\x1b') && !output.contains('{'), "{output}");
}

/// The termination log's content after a drain, if there is such a file.
fn termination_log(make: bool, args: &[&str], code: i32) -> Option<String> {
    let app = Node::held();
    let file =
        std::env::temp_dir().join(format!("lameduck-termination-{}-{make}-{code}", std::process::id()));
    if make {
        std::fs::write(&file, "").expect("a file");
    }
    let path = file.to_str().expect("a path in ASCII");
    let mut proxy = Lameduck::proxy(app.addr, &[&["--termination-log", path], args].concat());
    let mut client = proxy.client();
    client.get(if code == 0 { "/" } else { "/wait" });
    if code == 0 {
        client.answer();
    } else {
        app.wait_active(1);
    }
    proxy.terminate();
    assert_eq!(proxy.process.wait_exit(), code);
    let told = std::fs::read_to_string(&file).ok();
    let _ = std::fs::remove_file(file);
    told
}

#[test]
fn the_verdict_is_the_containers_termination_message() {
    let told = termination_log(true, &[], 0).expect("a file");
    assert!(told.starts_with("lameduck: drained in ") && told.ends_with(" s: clean\n"), "{told}");
    let told = termination_log(true, &["--grace", "1s", "--reserve", "500ms"], 3).expect("a file");
    assert!(told.ends_with(" s: 1 unanswered\n"), "{told}");
    assert_eq!(termination_log(false, &[], 0), None);
}
