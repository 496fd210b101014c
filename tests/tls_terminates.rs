//! Clients come in by TLS, and find what they find without it.

mod common;

use std::process::Command;

use common::app::RawApp;
use common::process::Node;
use common::tls::Authority;

/// curl's output, which must be a success.
fn curl(args: &[&str]) -> String {
    let output = Command::new("curl").args(["--silent", "--show-error", "--fail"]).args(args).output();
    let output = output.expect("curl starts; is it installed?");
    assert!(output.status.success(), "curl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_real_client_is_answered_over_either_version() {
    let authority = Authority::default();
    let app = Node::slow();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let (ca, url) = (authority.file(), format!("https://localhost:{}/slow?ms=10", addr.port()));
    for version in [["--tlsv1.2", "--tls-max", "1.2"], ["--tlsv1.3", "--tls-max", "1.3"]] {
        let answer = curl(&[&version[..], &["--cacert", &ca, &url]].concat());
        assert_eq!(answer, "done after 10 ms\n");
    }
}

#[test]
fn the_app_is_told_that_it_was_https() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let mut client = authority.client(addr);
    client.get("/");
    let mut asked = app.asked();
    assert!(asked.has_line("X-Forwarded-Proto: https"), "{}", asked.head);
    asked.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
    assert!(client.until("hi").starts_with("HTTP/1.1 200 OK"));
}
