//! TLS to the app: only the right certificate is trusted, and only an announced end (close_notify) counts as one.

use crate::common;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use common::grpc::Call;
use common::http::{Client, End};
use common::port::Port;
use common::process::{Lameduck, Process};
use common::tls::{Authority, Secure, TlsEnd};
use common::{LIMIT, wait_for};
use rustls::ServerConfig;

/// An app with TLS: passes on each connection with a request, together with the request's head.
struct SecureApp {
    addr: SocketAddr,
    asked: Receiver<(Secure, String)>,
}

impl SecureApp {
    fn start(config: Arc<ServerConfig>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        Self::over(listener, config)
    }

    fn over(listener: TcpListener, config: Arc<ServerConfig>) -> Self {
        let addr = listener.local_addr().expect("its address");
        let (sender, asked) = channel();
        thread::spawn(move || {
            loop {
                let (tcp, sender, config) =
                    (listener.accept().expect("accepted").0, sender.clone(), config.clone());
                thread::spawn(move || {
                    let Ok(mut secure) = Secure::accept(tcp, config) else { return };
                    // A readiness check sends no request.
                    if secure.fill(LIMIT) == Some(Ok(())) {
                        let head = secure.until("\r\n\r\n");
                        let _ = sender.send((secure, head));
                    }
                });
            }
        });
        Self { addr, asked }
    }

    fn asked(&self) -> (Secure, String) {
        self.asked.recv_timeout(LIMIT).expect("a request reaches the app")
    }

    fn url(&self) -> String {
        format!("https://localhost:{}", self.addr.port())
    }
}

fn proxy(authority: &Authority, app: &SecureApp, args: &[&str]) -> Lameduck {
    Lameduck::proxy_to(&app.url(), &[&["--upstream-ca", &authority.file()], args].concat())
}

#[test]
fn a_request_and_its_answer_pass_and_the_connection_is_kept() {
    let authority = Authority::default();
    let app = SecureApp::start(authority.server_config(&["localhost"]));
    let proxy = proxy(&authority, &app, &[]);
    let mut client = proxy.client();
    client.request("POST", "/up", &["Content-Length: 300000"]);
    client.send(vec![b'x'; 300_000]);
    let (mut asked, head) = app.asked();
    assert!(head.starts_with("POST /up HTTP/1.1\r\n"), "{head}");
    assert_eq!(asked.take(300_000), vec![b'x'; 300_000]);
    asked.send(format!("HTTP/1.1 200 OK\r\nContent-Length: 500000\r\n\r\n{}", "y".repeat(500_000)));
    let answer = client.answer();
    assert_eq!((answer.body.len(), answer.end), (500_000, End::Whole));
    // The next request uses the same connection.
    client.get("/again");
    assert!(asked.until("\r\n\r\n").starts_with("GET /again"));
    asked.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n");
    client.until("one");
    asked.send("3\r\ntwo\r\n0\r\n\r\n");
    client.until("two\r\n0\r\n\r\n");
}

#[test]
fn an_end_without_close_notify_is_a_cut_where_only_the_end_delimits_the_body() {
    let authority = Authority::default();
    let app = SecureApp::start(authority.server_config(&["localhost"]));
    let proxy = proxy(&authority, &app, &[]);
    for said in [true, false] {
        let mut client = proxy.client();
        client.get("/");
        let (mut asked, _) = app.asked();
        asked.send("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf or whole");
        client.wait_seen("half or whole");
        if said {
            asked.notify();
        }
        asked.truncate();
        let answer = client.answer();
        match said {
            true => assert_eq!(answer.end, End::Whole),
            false => assert_eq!(answer.end, End::CutByRst),
        }
    }
    // A body with a Content-Length is complete without close_notify.
    let mut client = proxy.client();
    client.get("/");
    let (mut asked, _) = app.asked();
    asked.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
    asked.truncate();
    assert_eq!(client.answer().end, End::Whole);
}

/// A listener with TLS and an app with TLS.
fn proxy_between(authority: &Authority, app: &SecureApp) -> (Lameduck, SocketAddr) {
    authority.proxy(&app.url(), &["--upstream-ca", &authority.file()])
}

#[test]
fn a_client_that_leaves_is_seen_to_have_left() {
    const UPLOAD: &str = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n";
    const WHOLE: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let authority = Authority::default();
    let app = SecureApp::start(authority.server_config(&["localhost"]));
    let (proxy, addr) = proxy_between(&authority, &app);
    let leave: [fn(Secure); 3] = [drop, Secure::reset, |mut client| {
        client.truncate();
        // Only the client's sending side is closed, as an attacker may do.
        let _ = client.read_to_end();
    }];
    for request in [UPLOAD, WHOLE] {
        for (way, leave) in leave.iter().enumerate() {
            for answering in [false, true] {
                let mut client = authority.client(addr);
                client.send(request);
                let (mut asked, _) = app.asked();
                if request == UPLOAD {
                    asked.take(7);
                }
                if answering {
                    asked.send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf");
                    client.until("half");
                }
                let begun = Instant::now();
                thread::scope(|scope| {
                    scope.spawn(|| leave(client));
                    let (rest, end) = asked.read_to_end();
                    let what = format!("{request:?}, way {way}, answering: {answering}");
                    assert_eq!(rest, "", "no last chunk: {what}");
                    assert_ne!(end, TlsEnd::Notified, "{what}");
                    assert!(begun.elapsed() < Duration::from_secs(5), "at once: {what}");
                });
                proxy.wait_in_flight(0);
            }
        }
    }
}

#[test]
fn a_tunnel_ends_on_one_side_as_it_ends_on_the_other() {
    let authority = Authority::default();
    let app = SecureApp::start(authority.server_config(&["localhost"]));
    let (proxy, addr) = proxy_between(&authority, &app);
    for seen in [TlsEnd::Notified, TlsEnd::Reset] {
        for by_client in [true, false] {
            let mut client = authority.client(addr);
            client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n");
            let (mut asked, _) = app.asked();
            asked.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n");
            client.until("\r\n\r\n");
            let (from, to) = if by_client { (&mut client, &mut asked) } else { (&mut asked, &mut client) };
            from.send("all or half");
            to.until("all or half");
            match seen {
                TlsEnd::Notified => from.notify(),
                _ => from.truncate(),
            }
            assert_eq!(to.read_to_end(), (String::new(), seen), "by the client: {by_client}");
            drop((client, asked));
            proxy.wait_in_flight(0);
        }
    }
}

#[test]
fn an_app_that_agrees_on_http2_gets_grpc_calls_and_requests_by_it() {
    let authority = Authority::default();
    authority.sign(&["localhost"]).write(&authority.dir);
    let script = "const read = (name) => fs.readFileSync(`${process.env.DIR}/tls.${name}`);
        const server = http2.createSecureServer({ cert: read('crt'), key: read('key') });
        server.on('stream', (stream, fields) => {
            console.log(`${stream.session.alpnProtocol} ${fields[':scheme']} ${fields[':path']}`);
            stream.respond({ 'content-type': 'application/grpc' }, { waitForTrailers: true });
            stream.on('wantTrailers', () => stream.sendTrailers({ 'grpc-status': '0' }));
            stream.pipe(stream);
        });
        server.listen(0, '127.0.0.1', () => console.log(`on port ${server.address().port}`));";
    let app = Process::start("node", Command::new("node").args(["-e", script]).env("DIR", &authority.dir));
    let port: u16 = app.wait_line("the app's port", |line| line.strip_prefix("on port ")?.parse().ok());
    let ca = authority.file();
    let args = ["--upstream-ca", &ca, "--upstream-protocol", "http2"];
    let (proxy, _) = authority.proxy(&format!("https://localhost:{port}"), &args);
    let call = Call::begin(proxy.listen, "/t.T/Chat", &["one"]);
    assert_eq!(call.json("trailers")["grpc-status"], "0");
    assert_eq!(call.json("data"), "one");
    let mut client = proxy.client();
    client.request("POST", "/up", &["Content-Length: 2"]);
    client.send("hi");
    assert_eq!(client.answer().text(), "hi");
    for path in ["/t.T/Chat", "/up"] {
        app.wait_line(path, |line| (line.starts_with("h2 ") && line.ends_with(path)).then_some(()));
    }
}

#[test]
fn an_app_with_the_wrong_certificate_gets_nothing_and_the_log_says_why() {
    let (authority, other) = (Authority::default(), Authority::default());
    for (config, why) in [
        (other.server_config(&["localhost"]), "invalid peer certificate: "),
        (authority.server_config(&["other.test"]), "not valid for name"),
    ] {
        let app = SecureApp::start(config);
        let proxy = proxy(&authority, &app, &[]);
        let begun = Instant::now();
        let mut client = proxy.client();
        client.get("/");
        let answer = client.answer();
        assert_eq!(answer.head.status, 502);
        assert!(begun.elapsed() < Duration::from_secs(5), "not retried for --upstream-wait");
        proxy.process.wait_line(why, |line| {
            (line.contains("no TLS connection to the app") && line.contains(why)).then_some(())
        });
        assert_eq!(proxy.ready().head.status, 503);
    }
}

#[test]
fn the_name_that_the_certificate_is_for_can_be_given() {
    let authority = Authority::default();
    let app = SecureApp::start(authority.server_config(&["app.internal"]));
    let proxy = proxy(&authority, &app, &["--upstream-name", "app.internal", "--ready-check", "/ready"]);
    let answering = thread::spawn(move || {
        while let Ok((mut asked, _)) = app.asked.recv_timeout(Duration::from_secs(3)) {
            asked.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        }
    });
    wait_for("readiness", || (proxy.ready().head.status == 200).then_some(()));
    assert_eq!(Client::ask(proxy.listen, "/").head.status, 200);
    drop(proxy);
    answering.join().expect("no panic");
}

#[test]
fn an_app_that_restarts_is_waited_for() {
    let authority = Authority::default();
    let port = Port::reserve();
    let proxy = Lameduck::proxy_to(
        &format!("https://localhost:{}", port.number()),
        &["--upstream-ca", &authority.file()],
    );
    let mut client = proxy.client();
    client.get("/");
    proxy.wait_in_flight(1);
    let app = SecureApp::over(
        TcpListener::bind(port.addr).expect("the port"),
        authority.server_config(&["localhost"]),
    );
    let (mut asked, _) = app.asked();
    asked.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
    assert_eq!(client.answer().text(), "hi");
}

#[test]
fn a_file_of_authorities_that_has_none_is_an_error_at_the_start() {
    let authority = Authority::default();
    let file = authority.dir.join("empty.pem");
    fs::write(&file, "nothing\n").expect("written");
    let file = file.to_str().expect("a path in ASCII");
    let (code, output) =
        common::tls::proxy_to_its_end(&["--upstream", "https://localhost:1", "--upstream-ca", file]);
    assert_eq!(code, 1);
    assert!(output.contains("empty.pem: contains no CA certificate"), "{output}");
}

#[test]
fn requests_go_to_another_app_with_tls() {
    let authority = Authority::default();
    let old = SecureApp::start(authority.server_config(&["localhost"]));
    let new = SecureApp::start(authority.server_config(&["localhost"]));
    let proxy = proxy(&authority, &old, &[]);
    let output = proxy.command_output(&["switch", &new.url()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut client = proxy.client();
    client.get("/");
    let (mut asked, _) = new.asked();
    asked.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
    assert_eq!(client.answer().text(), "hi");
}
