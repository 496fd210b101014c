//! An app counts the proxies in front of it by `X-Forwarded-*`: a sidecar does not count, a front door does.

use crate::common;

use std::process::Command;

use common::app::RawApp;
use common::process::Lameduck;

/// From an ingress that has added one hop. Like most, it sends no port.
const INGRESS: &str = "X-Forwarded-For: 1.1.1.1\r\nx-forwarded-for: 2.2.2.2\r\nX-Forwarded-Proto: https\r\n\
                       X-Forwarded-Host: b\r\n";

/// The forwarded fields that the app receives.
fn lines(args: &[&str], sent: &str) -> Vec<String> {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, args);
    let mut client = proxy.client();
    client.send(format!("GET / HTTP/1.1\r\nHost: a:81\r\n{sent}\r\n"));
    let head = app.asked().head;
    let about = |line: &&str| line.to_lowercase().starts_with("x-f") || line.starts_with("Forwarded");
    head.split("\r\n").filter(about).map(str::to_owned).collect()
}

fn added(port: &str) -> [String; 4] {
    ["For: 127.0.0.1", "Proto: http", "Host: a:81", &format!("Port: {port}")]
        .map(|rest| format!("X-Forwarded-{rest}"))
}

fn sent(lines: &str) -> Vec<String> {
    lines.split_terminator("\r\n").map(str::to_owned).collect()
}

#[test]
fn each_mode_does_what_its_name_says() {
    let append = ["--forwarded", "append"];
    assert_eq!(
        lines(&append, INGRESS),
        [
            "X-Forwarded-For: 1.1.1.1",
            "x-forwarded-for: 2.2.2.2, 127.0.0.1",
            "X-Forwarded-Proto: https",
            "X-Forwarded-Host: b"
        ],
        "the proxy's port is not the port of the https URL"
    );
    assert_eq!(lines(&append, ""), added("81"));
    let replace = ["--forwarded", "replace"];
    let all = INGRESS.to_owned() + "X-Forwarded-Port: 443\r\nForwarded: for=1.1.1.1;proto=https\r\n";
    assert_eq!(lines(&replace, &all), added("81"));
    let if_none = ["--forwarded", "if-none"];
    assert_eq!(lines(&if_none, &all), sent(&all));
    assert_eq!(lines(&if_none, ""), added("81"));
    let keep = ["--forwarded", "keep"];
    assert_eq!(lines(&keep, &all), sent(&all));
    assert_eq!(lines(&keep, ""), [""; 0]);
}

#[test]
fn a_request_with_one_of_them_gets_no_others() {
    for line in [
        "X-Forwarded-For: 1.1.1.1\r\n",
        "X-Forwarded-Proto: https\r\n",
        "X-Forwarded-Host: b\r\n",
        "X-Forwarded-Port: 443\r\n",
        "Forwarded: for=1.1.1.1\r\n",
    ] {
        assert_eq!(lines(&["--forwarded", "if-none"], line), sent(line));
    }
}

#[test]
fn a_sidecar_and_run_add_no_hop_and_a_front_door_adds_one() {
    for mode in ["native", "ordinary"] {
        assert_eq!(lines(&["--sidecar", mode], INGRESS), sent(INGRESS));
        assert_eq!(lines(&["--sidecar", mode], ""), added("81"));
    }
    assert!(lines(&[], INGRESS).contains(&"x-forwarded-for: 2.2.2.2, 127.0.0.1".to_owned()));
    // The rule of Express' `trust proxy: 1`, proxy-addr's `compile(1)`.
    let script = "require('node:http').createServer((req, res) =>
                  res.end((req.headers['x-forwarded-for'] ?? '').split(/ *, */).at(-1)))
                  .listen(process.env.PORT)";
    let run = Lameduck::run(&[], &["node", "-e", script]);
    for (fields, client) in [(&["X-Forwarded-For: 8.8.8.8, 9.9.9.9"][..], "9.9.9.9"), (&[], "127.0.0.1")] {
        let mut asking = run.client();
        asking.request("GET", "/", fields);
        assert_eq!(asking.answer().text(), client);
    }
}

#[test]
fn http2_requests_get_the_same_fields() {
    let app = RawApp::start().answer_all("HTTP/1.1 204 No Content\r\n\r\n");
    let proxy = Lameduck::proxy(app.addr, &["--sidecar", "native"]);
    let curl = |fields: &[&str]| {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--fail", "--http2-prior-knowledge", &format!("http://{}/", proxy.listen)]);
        curl.args(fields.iter().flat_map(|field| ["--header", field]));
        assert!(curl.status().expect("curl starts").success());
    };
    curl(&["X-Forwarded-For: 8.8.8.8"]);
    assert!(app.seen().contains("x-forwarded-for: 8.8.8.8\r\n"), "{}", app.seen());
    assert!(!app.seen().contains("X-Forwarded-"), "{}", app.seen());
    curl(&[]);
    let port = format!("X-Forwarded-Port: {}\r\n", proxy.listen.port());
    assert!(
        app.seen().contains("X-Forwarded-For: 127.0.0.1\r\n") && app.seen().contains(&port),
        "{}",
        app.seen()
    );
}

#[test]
fn the_port_is_the_one_that_the_client_has_in_its_urls() {
    for (host, port) in [("a", "80"), ("a:8443", "8443"), ("[::1]", "80"), ("[::1]:9", "9"), ("a1", "80")] {
        let app = RawApp::start();
        let proxy = Lameduck::proxy(app.addr, &[]);
        let mut client = proxy.client();
        client.send(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        let asked = app.asked();
        assert!(asked.has_line(&format!("X-Forwarded-Port: {port}")), "{host}: {}", asked.head);
    }
    // Without a `Host` the port is unknown.
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.send("GET / HTTP/1.0\r\n\r\n");
    let asked = app.asked();
    assert!(asked.has_line("X-Forwarded-For: 127.0.0.1") && asked.has_line("X-Forwarded-Proto: http"));
    assert!(
        !asked.head.contains("X-Forwarded-Host") && !asked.head.contains("X-Forwarded-Port"),
        "{}",
        asked.head
    );
}
