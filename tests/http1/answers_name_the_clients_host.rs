//! URLs in a response that name the app's own address, which clients don't know, get the host that the client
//! requested.

use crate::common;

use std::process::Command;

use common::app::RawApp;
use common::http::{Client, Head};
use common::process::{Lameduck, Process, temporary_directory};
use common::tls::Authority;

/// Redirects to itself by the address on which it listens, as Next does.
const APP: &str = r"
const [, mode = 'http'] = process.argv;
const answer = (req, res) => {
  const own = `http://localhost:${server.address().port}`;
  const headers = {
    'Location': `${own}/next?to=${own}/`,
    'Content-Location': `${own.replace('http', 'https')}/doc`,
    'Refresh': `5; url=${own.replace('localhost', '127.0.0.1')}/later`,
    'Link': `<${own}/2>; rel=next, </3>; rel=prev`,
    'X-Own': own,
  };
  res.writeHead(302, headers);
  res.end();
};
const server = require('node:' + mode).createServer(answer);
server.listen(process.env.PORT ?? 0, () => console.log(`listens on port ${server.address().port}`));
";

fn app(mode: &str) -> (Process, String) {
    let process = Process::start("node", Command::new("node").args(["-e", APP, mode]).env("PORT", "0"));
    let port: u16 =
        process.wait_line("the app's port", |line| line.split_once("listens on port ")?.1.parse().ok());
    (process, format!("127.0.0.1:{port}"))
}

/// Checks all fields with URLs. The app reports its own address in `x-own`, which the query keeps.
fn expect(head: &Head, site: &str) {
    let own = head.header("x-own").expect("the app's own address");
    let wanted = [
        ("location", format!("{site}/next?to={own}/")),
        ("content-location", format!("{site}/doc")),
        ("refresh", format!("5; url={site}/later")),
        ("link", format!("<{site}/2>; rel=next, </3>; rel=prev")),
    ];
    for (name, value) in wanted {
        assert_eq!(head.header(name), Some(value.as_str()), "{name}");
    }
}

fn ask(proxy: &Lameduck, request: &str) -> Head {
    let mut client = proxy.client();
    client.send(request);
    client.answer().head
}

/// The response head that curl gets over HTTP/2.
fn by_http2(proxy: &Lameduck) -> Head {
    let url = format!("http://{}/", proxy.listen);
    let args =
        ["--silent", "--http2-prior-knowledge", "--dump-header", "-", "--header", "Host: shop.test:81"];
    let output = Command::new("curl").args(args).arg(url).output().expect("curl starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = text.split("\r\n").filter_map(|line| line.split_once(": "));
    let headers = lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    assert!(text.starts_with("HTTP/2 302"), "{text}");
    Head { status: 302, version: "HTTP/2".to_owned(), headers }
}

#[test]
fn a_redirect_names_the_host_that_the_client_asked_for() {
    let (_app, upstream) = app("http");
    let proxies = [
        Lameduck::run(&[], &["node", "-e", APP]),
        Lameduck::proxy_to(&upstream, &[]),
        Lameduck::proxy_to(&upstream.replace("127.0.0.1", "localhost"), &["--sidecar", "native"]),
    ];
    for proxy in &proxies {
        expect(&ask(proxy, "GET / HTTP/1.1\r\nHost: shop.test:81\r\n\r\n"), "http://shop.test:81");
        expect(&ask(proxy, "GET http://shop.test/ HTTP/1.1\r\nHost: a\r\n\r\n"), "http://shop.test");
        // The scheme is the one in the `X-Forwarded-Proto` that the app receives.
        let behind = "GET / HTTP/1.1\r\nHost: shop.test\r\nX-Forwarded-Proto: https\r\n\r\n";
        expect(&ask(proxy, behind), "https://shop.test");
        // A request without a host gets only a path.
        expect(&ask(proxy, "GET / HTTP/1.0\r\n\r\n"), "");
        expect(&by_http2(proxy), "http://shop.test:81");
    }
    let trusting = Lameduck::proxy_to(&upstream, &["--forwarded", "replace"]);
    let told = "GET / HTTP/1.1\r\nHost: shop.test\r\nX-Forwarded-Proto: https\r\n\r\n";
    expect(&ask(&trusting, told), "http://shop.test");
}

#[test]
fn an_app_of_http2_does_so_too() {
    let (_app, upstream) = app("http2");
    let proxy = Lameduck::proxy_to(&upstream, &["--upstream-protocol", "http2"]);
    expect(&ask(&proxy, "GET / HTTP/1.1\r\nHost: shop.test\r\n\r\n"), "http://shop.test");
    expect(&by_http2(&proxy), "http://shop.test:81");
}

#[test]
fn a_client_by_tls_is_sent_to_https() {
    let authority = Authority::default();
    let (_app, upstream) = app("http");
    let (_proxy, addr) = authority.proxy(&upstream, &[]);
    let mut client = authority.client(addr);
    client.send("GET / HTTP/1.1\r\nHost: shop.test\r\n\r\n");
    let head = client.until("\r\n\r\n");
    assert!(head.contains("\r\nLocation: https://shop.test/next?"), "{head}");
}

#[test]
fn interim_answers_name_it_and_other_urls_stay() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.send("GET / HTTP/1.1\r\nHost: shop.test\r\n\r\n");
    let mut asked = app.asked();
    asked.send(format!("HTTP/1.1 103 Early Hints\r\nLink: <//{}/a.css>; rel=preload\r\n\r\n", app.addr));
    assert_eq!(client.head().header("link"), Some("<//shop.test/a.css>; rel=preload"));
    let others = [
        "http://localhost:1/".to_owned(),
        format!("http://shop.test:{}/", app.addr.port()),
        format!("/login?to=http://{}/", app.addr),
    ];
    let lines: String = others.iter().map(|url| format!("Location: {url}\r\n")).collect();
    asked.send(format!("HTTP/1.1 201 Created\r\n{lines}Content-Length: 0\r\n\r\n"));
    let head = client.head();
    assert_eq!(head.headers.iter().map(|(_, url)| url).take(3).collect::<Vec<_>>(), others.each_ref());
}

#[test]
fn an_app_on_a_unix_socket_has_no_address_of_its_own() {
    let dir = temporary_directory();
    let path = dir.join("app.sock");
    let app = RawApp::unix(&path);
    let proxy = Lameduck::proxy_to(&format!("unix:{}", path.display()), &[]);
    let mut client: Client = proxy.client();
    client.get("/");
    app.asked().send("HTTP/1.1 302 Found\r\nLocation: http://localhost/x\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.head().header("location"), Some("http://localhost/x"));
    let _ = std::fs::remove_dir_all(dir);
}
