//! HTTP/2 conformance by h2spec (<https://github.com/summerwind/h2spec>). Ignored, since it needs that program: `go
//! install github.com/summerwind/h2spec/cmd/h2spec@latest`, and then `H2SPEC=h2spec cargo test --locked --test
//! other_makes http2_conformance -- --ignored`.

use crate::common;

use std::net::SocketAddr;
use std::process::Command;

use common::process::{Lameduck, Node};
use common::tls::Authority;

/// Cases that do not apply to lameduck, and why.
const LEFT_OUT: [(&str, &str); 1] = [(
    "Sends invalid connection preface",
    "what doesn't begin with the preface is HTTP/1.1 on this port, and gets a 400 before the connection closes",
)];

/// Runs h2spec against an address and returns the cases that failed.
fn failures(addr: SocketAddr, args: &[&str]) -> Vec<String> {
    let program = std::env::var_os("H2SPEC").expect("H2SPEC names the program");
    let (host, port) = (addr.ip().to_string(), addr.port().to_string());
    let ran = Command::new(program)
        .args(["generic", "http2", "hpack", "--timeout", "5", "--host", &host, "--port", &port])
        .args(args)
        .output()
        .expect("h2spec starts");
    let shown = String::from_utf8_lossy(&ran.stdout).into_owned();
    let (all, failures) = shown.split_once("Failures:").unwrap_or((&shown, ""));
    assert!(all.matches('✔').count() >= 140, "h2spec did not run completely: {shown}");
    let case = |line: &str| line.trim().strip_prefix("× ").map(str::to_owned);
    failures.lines().filter_map(case).collect()
}

#[test]
#[ignore = "needs h2spec, which H2SPEC names"]
fn without_tls() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    expect_none(failures(proxy.listen, &[]));
}

#[test]
#[ignore = "needs h2spec, which H2SPEC names"]
fn with_tls() {
    let app = Node::slow();
    let (_proxy, addr) = Authority::default().proxy(&app.addr.to_string(), &[]);
    expect_none(failures(addr, &["--tls", "--insecure"]));
}

fn expect_none(mut failed: Vec<String>) {
    for (case, why) in LEFT_OUT {
        println!("left out: {case}: {why}");
        failed.retain(|failed| !failed.ends_with(case));
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
