//! The webhook as a process, called over real TLS: it responds, loads a new certificate without dropping a connection,
//! limits its clients, and ends without losing a review.

use crate::common;

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use common::http::Client;
use common::port::Port;
use common::process::Process;
use common::wait_for;
use lameduck::webhook::server::MAX_BODY;
use lameduck::webhook::x509::{Made, make_ca, make_leaf, provider, roots};
use rustix::process::Signal;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;

const NAME: &str = "lameduck-webhook.lameduck-system.svc";
const DEPLOYMENT: &str = include_str!("deployment.json");

/// A running webhook whose certificates are files.
struct Webhook {
    process: Process,
    addr: SocketAddr,
    probe: SocketAddr,
    dir: PathBuf,
    ca: Made,
    _port: Port,
}

impl Webhook {
    fn start(name: &str, flags: &[&str]) -> Self {
        Self::with_certificate_for(1000, name, flags)
    }

    fn with_certificate_for(seconds: u64, name: &str, flags: &[&str]) -> Self {
        let dir =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("webhook-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder");
        let now = now();
        let ca = make_ca(now - 3600..now + 3600).expect("a CA");
        write_leaf(&dir, &ca, seconds);
        let mut command = Command::new(env!("CARGO_BIN_EXE_lameduck"));
        let port = Port::reserve();
        let listen = port.addr.to_string();
        command.args(["webhook", "--listen", &listen, "--probe-listen", "127.0.0.1:0", "--config", ""]);
        command.arg("--tls-dir").arg(&dir).args(["--log-format", "json"]).args(flags);
        command.env_remove("KUBERNETES_SERVICE_HOST");
        let process = Process::start("lameduck webhook", &mut command);
        let line = process.wait_line("its addresses", |line| {
            serde_json::from_str::<Value>(line).ok().filter(|line| line["message"] == "listening")
        });
        let addr = |key: &str| line[key].as_str().expect("an address").parse().expect("an address");
        let webhook = Self { addr: addr("listen"), probe: addr("probe"), process, dir, ca, _port: port };
        wait_for("ready", || (Client::ask(webhook.probe, "/readyz").head.status == 200).then_some(()));
        webhook
    }

    fn connect(&self) -> io::Result<Tls> {
        let mut store = RootCertStore::empty();
        store.add(roots(self.ca.certificate.as_bytes()).remove(0).der).expect("a CA");
        let builder = ClientConfig::builder_with_provider(provider());
        let config = builder.with_safe_default_protocol_versions().expect("versions");
        let config = config.with_root_certificates(store).with_no_client_auth();
        let name = ServerName::try_from(NAME).expect("a name");
        let tls = ClientConnection::new(Arc::new(config), name).expect("a connection");
        let socket = TcpStream::connect(self.addr)?;
        socket.set_read_timeout(Some(common::LIMIT))?;
        let mut tls = Tls(StreamOwned::new(tls, socket));
        while tls.0.conn.is_handshaking() {
            tls.0.conn.complete_io(&mut tls.0.sock)?;
        }
        Ok(tls)
    }

    fn ask(&self, request: &[u8]) -> (u16, String) {
        let mut tls = self.connect().expect("a connection");
        tls.0.write_all(request).expect("sent");
        tls.answer()
    }

    fn review(&self, body: &[u8]) -> (u16, String) {
        self.ask(&[head(body.len()).as_bytes(), body].concat())
    }
}

impl Drop for Webhook {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

struct Tls(StreamOwned<ClientConnection, TcpStream>);

impl Tls {
    /// Reads status and body up to the clean end of the connection.
    fn answer(&mut self) -> (u16, String) {
        let mut text = String::new();
        self.0.read_to_string(&mut text).expect("a complete response and close_notify");
        let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        assert!(head.to_ascii_lowercase().contains("connection: close"), "{head}");
        (status.expect("a status"), body.to_owned())
    }

    fn shown(&self) -> Vec<u8> {
        self.0.conn.peer_certificates().expect("a certificate")[0].to_vec()
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_secs()
}

fn write_leaf(dir: &Path, ca: &Made, life: u64) {
    let leaf = make_leaf(&ca.key, &[NAME.to_owned()], now() - 60..now() + life).expect("a leaf");
    fs::write(dir.join("tls.crt"), leaf.certificate).expect("written");
    fs::write(dir.join("tls.key"), leaf.key).expect("written");
}

fn head(length: usize) -> String {
    format!(
        "POST /mutate?timeout=10s HTTP/1.1\r\nHost: {NAME}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
}

fn injected((status, body): (u16, String)) {
    assert_eq!(status, 200, "{body}");
    let answer: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(answer["response"]["allowed"], true);
    assert!(answer["response"]["patch"].is_string(), "{answer}");
}

#[test]
fn a_review_over_tls_is_answered_counted_and_logged() {
    let webhook = Webhook::start("answers", &[]);
    injected(webhook.review(DEPLOYMENT.as_bytes()));
    let (status, _) = webhook.review(b"{}");
    assert_eq!(status, 400);
    let metrics = String::from_utf8(Client::ask(webhook.probe, "/metrics").body).expect("text");
    for line in [
        "lameduck_webhook_reviews_total{outcome=\"injected\"} 1",
        "lameduck_webhook_reviews_total{outcome=\"failed\"} 1",
        "lameduck_webhook_review_duration_seconds_count 2",
        "lameduck_webhook_ca_bundle_ok 1",
        "lameduck_webhook_ready 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in:\n{metrics}");
    }
    assert!(metrics.contains("lameduck_webhook_certificate_expiry_timestamp_seconds "), "{metrics}");
    webhook.process.wait_line("the review", |line| {
        let line: Value = serde_json::from_str(line).ok()?;
        let found = line["outcome"] == "injected" && line["namespace"] == "shop";
        (found && line["pod"] == "slow-6c8d5f7b9c-").then_some(())
    });
}

/// The API server calls again with the injected pod (`reinvocationPolicy`), and with its own defaults in it.
#[test]
fn a_pod_is_logged_once_although_it_is_reviewed_twice() {
    let webhook = Webhook::start("once", &[]);
    let mut asked: Value = serde_json::from_str(DEPLOYMENT).expect("JSON");
    let (_, body) = webhook.review(DEPLOYMENT.as_bytes());
    let first: Value = serde_json::from_str(&body).expect("JSON");
    asked["request"]["object"] = super::webhook_reviews::patched_by(&asked, &first);
    let (status, body) = webhook.review(asked.to_string().as_bytes());
    assert!(status == 200 && !body.contains("\"patch\""), "{body}");
    asked["request"]["object"]["spec"]["hostNetwork"] = true.into();
    webhook.review(asked.to_string().as_bytes());
    let reviews = || -> Vec<Value> {
        let lines = webhook.process.output();
        let lines = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|line| line["message"] == "review").map(|line| line["outcome"].clone()).collect()
    };
    // What keeps an injected pod from being injected anew is told.
    let told = wait_for("the last review", || Some(reviews()).filter(|told| told.len() > 1));
    assert_eq!(told, ["injected", "unchanged"]);
}

#[test]
fn its_flags_set_the_resources_that_a_namespace_demands() {
    let flags = ["--cpu-request=50m", "--memory-request=64Mi", "--cpu-limit=1", "--memory-limit=64Mi"];
    let webhook = Webhook::start("resources", &flags);
    let (_, body) = webhook.review(DEPLOYMENT.as_bytes());
    let answer: Value = serde_json::from_str(&body).expect("JSON");
    let asked: Value = serde_json::from_str(DEPLOYMENT).expect("JSON");
    let pod = super::webhook_reviews::patched_by(&asked, &answer);
    let ours = &pod["spec"]["initContainers"][0]["resources"];
    let expected = serde_json::json!({
        "requests": { "cpu": "50m", "memory": "64Mi" }, "limits": { "cpu": "1", "memory": "64Mi" },
    });
    assert_eq!(*ours, expected);
}

#[test]
fn requests_that_are_not_reviews_get_the_matching_status() {
    let webhook = Webhook::start("refuses", &[]);
    let get = |path: &str| webhook.ask(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).0;
    assert_eq!((get("/mutate"), get("/")), (405, 404));
    assert_eq!(webhook.review(&vec![b' '; MAX_BODY + 1]).0, 413);
    assert_eq!(webhook.review(&vec![b' '; MAX_BODY]).0, 400);
    for body in [&b""[..], b"\xff\xfe", b"[[[[[[", b"{\"apiVersion\":\"admission.k8s.io/v1\"}"] {
        assert_eq!(webhook.review(body).0, 400);
    }
    assert_eq!(webhook.review("[".repeat(100_000).as_bytes()).0, 400);
    // Small as text, but many times the container's memory once parsed.
    assert_eq!(webhook.review(format!("{{\"a\":[{}0]}}", "[0],".repeat(1_000_000)).as_bytes()).0, 400);
    assert_eq!(Client::ask(webhook.probe, "/mutate").head.status, 404);
    injected(webhook.review(DEPLOYMENT.as_bytes()));
}

#[test]
fn a_new_certificate_is_shown_at_once_and_open_connections_go_on() {
    let webhook = Webhook::start("reload", &[]);
    let mut open = webhook.connect().expect("a connection");
    let (first, half) = (open.shown(), DEPLOYMENT.len() / 2);
    open.0.write_all(head(DEPLOYMENT.len()).as_bytes()).expect("sent");
    open.0.write_all(&DEPLOYMENT.as_bytes()[..half]).expect("sent");
    // A key that does not match the certificate, as during a change, is ignored.
    let key = fs::read(webhook.dir.join("tls.key")).expect("a key");
    fs::write(webhook.dir.join("tls.key"), make_ca(0..now()).expect("a key").key).expect("written");
    webhook.process.wait_line("a complaint", |line| line.contains("tls.crt and tls.key").then_some(()));
    assert_eq!(webhook.connect().expect("a connection").shown(), first);
    assert_eq!(Client::ask(webhook.probe, "/readyz").head.status, 200);
    fs::write(webhook.dir.join("tls.key"), key).expect("written");

    write_leaf(&webhook.dir, &webhook.ca, 2000);
    wait_for("the new certificate", || {
        (webhook.connect().expect("a connection").shown() != first).then_some(())
    });
    open.0.write_all(&DEPLOYMENT.as_bytes()[half..]).expect("sent");
    injected(open.answer());
}

#[test]
fn an_expired_certificate_is_not_ready() {
    let webhook = Webhook::with_certificate_for(6, "expires", &[]);
    let answer = wait_for("not ready", || {
        let answer = Client::ask(webhook.probe, "/readyz");
        (answer.head.status == 503).then_some(answer)
    });
    assert_eq!(answer.body, b"the certificate has expired\n");
    assert_eq!(Client::ask(webhook.probe, "/livez").head.status, 200);
}

#[test]
fn a_silent_or_slow_client_is_closed() {
    let webhook = Webhook::start("slow", &[]);
    let began = Instant::now();
    let mut silent = TcpStream::connect(webhook.addr).expect("a connection");
    silent.set_read_timeout(Some(common::LIMIT)).expect("set");
    let mut mute = webhook.connect().expect("a connection");
    let mut half = webhook.connect().expect("a connection");
    half.0.write_all(head(100).as_bytes()).expect("sent");
    let mut byte = [0; 1];
    // The webhook may send a 408 first.
    while mute.0.read(&mut byte).is_ok_and(|n| n > 0) {}
    assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
    assert!(silent.read(&mut byte).is_ok_and(|n| n == 0), "closed");
    assert!(!half.0.read(&mut byte).is_ok_and(|n| n > 0), "closed");
    assert!(began.elapsed() < Duration::from_secs(18), "{:?}", began.elapsed());
    injected(webhook.review(DEPLOYMENT.as_bytes()));
}

#[test]
fn after_sigterm_new_reviews_are_served_for_the_lame_duck_and_running_ones_to_their_end() {
    let mut webhook = Webhook::start("drain", &["--lame-duck", "4s"]);
    let mut running = webhook.connect().expect("a connection");
    running.0.write_all(head(DEPLOYMENT.len()).as_bytes()).expect("sent");
    webhook.process.signal(Signal::TERM);
    webhook.process.wait_line("the signal", |line| line.contains("shutdown requested").then_some(()));
    std::thread::sleep(common::MOMENT);
    injected(webhook.review(DEPLOYMENT.as_bytes()));
    assert_eq!(
        Client::ask(webhook.probe, "/readyz").head.status,
        200,
        "this may be the last replica that serves"
    );
    webhook.process.wait_line("the close", |line| line.contains("new connections are refused").then_some(()));
    wait_for("the close of the socket", || TcpStream::connect(webhook.addr).err());
    running.0.write_all(DEPLOYMENT.as_bytes()).expect("sent");
    injected(running.answer());
    assert_eq!(webhook.process.wait_exit(), 0);
}

#[test]
fn noise_on_the_port_harms_no_other_client() {
    let webhook = Webhook::start("noise", &[]);
    let mut seed = 7u64;
    let mut noise = |length: usize| -> Vec<u8> {
        let next = |seed: &mut u64| {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (*seed >> 33) as u8
        };
        (0..length).map(|_| next(&mut seed)).collect()
    };
    for n in 0..30 {
        let mut plain = TcpStream::connect(webhook.addr).expect("a connection");
        let _ = plain.write_all(&noise(20 * n));
        let mut tls = webhook.connect().expect("a connection");
        let _ = tls.0.write_all(&noise(20 * n));
        assert_eq!(webhook.review(&noise(100 * n)).0, 400);
    }
    injected(webhook.review(DEPLOYMENT.as_bytes()));
}

#[test]
fn outside_a_cluster_it_says_what_to_give() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lameduck"));
    let output = command.arg("webhook").env_remove("KUBERNETES_SERVICE_HOST").output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && text.contains("--tls-dir"), "{text}");
}
