//! Clients that connect by TLS get the same service as without.

use crate::common;

use std::process::Command;

use common::app::RawApp;
use common::process::Node;
use common::tls::{Authority, Secure};
use rustls::HandshakeKind;
use rustls::version::{TLS12, TLS13};

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

#[test]
fn a_client_without_a_common_protocol_gets_an_alert() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    for version in [&TLS12, &TLS13] {
        let mut config = authority.client_config(&[version], None);
        config.alpn_protocols = vec![b"smtp".to_vec()];
        let refused = Secure::try_connect(addr, "localhost", config.clone()).err().expect("RFC 7301 §3.2");
        assert!(refused.contains("received fatal alert: NoApplicationProtocol"), "{refused}");
        // One common protocol is enough.
        config.alpn_protocols.push(b"http/1.1".to_vec());
        let client = Secure::connect(addr, "localhost", config);
        assert_eq!(client.session().alpn_protocol(), Some(&b"http/1.1"[..]));
    }
}

#[test]
fn an_upload_and_a_stream_pass_side_by_side() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    for version in [&TLS12, &TLS13] {
        let mut client = Secure::connect(addr, "localhost", authority.client_config(&[version], None));
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n");
        let mut asked = app.asked();
        asked.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        client.until("\r\n\r\n");
        // Each byte arrives before the next one is sent.
        for byte in ["a", "b", "c", "d"] {
            client.send(byte);
            assert_eq!(asked.take(1), byte);
            asked.send(format!("1\r\n{byte}\r\n"));
            client.until(&format!("1\r\n{byte}\r\n"));
        }
        asked.send("0\r\n\r\n");
        client.until("0\r\n\r\n");
    }
}

#[test]
fn a_client_that_sends_byte_by_byte_is_served() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    for version in [&TLS12, &TLS13] {
        let config = authority.client_config(&[version], None);
        let mut client = Secure::connect_by_bytes(addr, "localhost", config);
        let head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\n";
        for _ in 0..2 {
            let records = [head, "one", "two"].map(|part| client.seal(part)).concat();
            client.send_bytes(&records);
            let mut asked = app.asked();
            assert!(asked.head.starts_with("POST / "), "{}", asked.head);
            assert_eq!(asked.take(6), "onetwo");
            asked.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
            client.until("\r\n\r\nhi");
        }
    }
}

#[test]
fn a_record_that_comes_in_parts_is_whole_and_in_order_whatever_is_sent_meanwhile() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let pieces: Vec<String> = [1, 2, 900, 16_384, 3, 50_000, 1]
        .iter()
        .zip('a'..)
        .map(|(length, letter)| letter.to_string().repeat(*length))
        .collect();
    for version in [&TLS12, &TLS13] {
        let mut client = Secure::connect(addr, "localhost", authority.client_config(&[version], None));
        let length: usize = pieces.iter().map(String::len).sum();
        client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n"));
        let mut asked = app.asked();
        asked.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        client.until("\r\n\r\n");
        // The first bytes of a record are sent together with the last byte of the previous record.
        let mut records = pieces.iter().map(|piece| client.seal(piece)).collect::<Vec<_>>().into_iter();
        let mut left = records.next().expect("a record");
        for piece in &pieces {
            let last = left.len() - 1;
            client.send_sealed(&left[..last / 2]);
            // Response bytes are sent while a record is incomplete.
            for part in ["before", "between"] {
                asked.send(format!("{:x}\r\n{part}\r\n", part.len()));
                client.until(&format!("{part}\r\n"));
                client.send_sealed(&left[if part == "before" { last / 2..last - 1 } else { last - 1..last }]);
            }
            let next = records.next().unwrap_or_default();
            let begun = next.len().min(7);
            client.send_sealed(&[&left[last..], &next[..begun]].concat());
            assert!(asked.take(piece.len()) == *piece, "{version:?}: {} bytes", piece.len());
            left = next[begun..].to_vec();
        }
        asked.send("0\r\n\r\n");
        client.until("0\r\n\r\n");
    }
}

#[test]
fn large_bodies_pass_whole_both_ways() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let body: Vec<u8> = (0..5_000_000u32).map(|n| (n % 251) as u8 & 0x7f).collect();
    for version in [&TLS12, &TLS13] {
        let mut client = Secure::connect(addr, "localhost", authority.client_config(&[version], None));
        client.send(format!("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len()));
        let mut asked = app.asked();
        let sent = body.clone();
        let taken = std::thread::spawn(move || (asked.take(sent.len()).into_bytes() == sent, asked));
        client.send(&body);
        let (same, mut asked) = taken.join().expect("no panic");
        assert!(same);
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        let answer = [head.as_bytes(), &body].concat();
        let sending = std::thread::spawn(move || asked.send(answer));
        // A slow reader: the proxy buffers a bounded amount and loses nothing.
        client.until("\r\n\r\n");
        std::thread::sleep(common::MOMENT);
        assert!(client.take(body.len()) == body);
        sending.join().expect("no panic");
    }
}

#[test]
fn a_session_is_resumed_and_http_1_1_is_agreed_on() {
    let authority = Authority::default();
    let app = RawApp::start().answer_all("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    for version in [&TLS12, &TLS13] {
        let mut config = authority.client_config(&[version], None);
        config.alpn_protocols = vec![b"h3".to_vec(), b"http/1.1".to_vec()];
        let kinds = [HandshakeKind::Full, HandshakeKind::Resumed];
        for kind in kinds {
            let mut client = Secure::connect(addr, "localhost", config.clone());
            client.get("/");
            client.until("\r\n\r\nhi");
            assert_eq!(client.session().handshake_kind(), Some(kind), "{version:?}");
            assert_eq!(client.session().alpn_protocol(), Some(&b"http/1.1"[..]));
        }
    }
}

#[test]
fn node_and_openssl_are_served() {
    let authority = Authority::default();
    let app = Node::slow();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &[]);
    let script = "const agent = new https.Agent({ keepAlive: true });
        const get = (n) => { const asked = https.get(
            { agent, port, path: '/slow?ms=1', ca: fs.readFileSync(ca) }, (answer) => {
            let text = ''; answer.on('data', (piece) => text += piece);
            answer.on('end', () => { console.log(text.trim(), asked.reusedSocket);
                n < 3 ? setImmediate(get, n + 1) : agent.destroy(); });
        }); }; get(1);";
    let script = format!("const port = {}, ca = {:?};\n{script}", addr.port(), authority.file());
    let output = Command::new("node").args(["-e", &script]).output().expect("node starts; is it installed?");
    let kept = [false, true, true].map(|reused| format!("done after 1 ms {reused}\n")).concat();
    assert_eq!(String::from_utf8_lossy(&output.stdout), kept, "{output:?}");

    let request = "printf 'GET /slow?ms=1 HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n'";
    let at = format!("-connect 127.0.0.1:{} -CAfile {}", addr.port(), authority.file());
    for version in ["-tls1_2", "-tls1_3"] {
        let line = format!("{request} | openssl s_client -quiet -verify_return_error {version} {at}");
        let output = Command::new("sh").args(["-c", &line]).output().expect("openssl starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("done after 1 ms"), "{version}: {output:?}");
    }
}
