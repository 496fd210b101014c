//! The probe and control listeners, asked over real sockets.
#![allow(clippy::unwrap_used, reason = "the helpers of tests may fail a test")]

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lameduck::admin::{self, Admin};
use lameduck::cli::{self, Command, StatusView};
use lameduck::client;
use lameduck::config::Settings;
use lameduck::drain::control::{Control, LedgerRow, Outcome};
use lameduck::drain::machine::Trigger;
use lameduck::readiness::{Reason, Verdict};
use serde_json::{Value, json};
use tokio::sync::oneshot;

/// A bounded wait for what must come.
const SOON: Duration = Duration::from_secs(20);

fn settings(control: &Path, more: &[&str]) -> Settings {
    let control = control.to_str().unwrap();
    let fixed =
        ["lameduck", "proxy", "--upstream", ":3000", "--probe-listen", "127.0.0.1:0", "--control", control];
    match cli::parse(fixed.iter().chain(more)).unwrap() {
        Command::Proxy { settings, .. } => *settings,
        other => panic!("{other:?}"),
    }
}

/// A directory of the test's own, gone when it is over.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("lameduck-admin-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("run/control.sock")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The listeners on a thread of their own, as in the product.
struct Server {
    control: Control,
    probe: SocketAddr,
    tcp: SocketAddr,
    socket: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _dir: Dir,
}

impl Server {
    fn start() -> Self {
        Self::with(&["--token", "s3cret"], Verdict::Ready)
    }

    fn with(flags: &[&str], verdict: Verdict) -> Self {
        Self::with_metrics(flags, verdict, "lameduck_in_flight 2\n".to_owned())
    }

    fn with_metrics(flags: &[&str], verdict: Verdict, metrics: String) -> Self {
        let dir = Dir::new();
        let flags = [&["--control-listen", "127.0.0.1:0"], flags].concat();
        let bound = admin::bind(&settings(&dir.socket(), &flags)).unwrap();
        let (probe, tcp) = (bound.probe_addr().unwrap(), bound.control_addr().unwrap());
        let control = Control::new();
        let row = || LedgerRow {
            method: "GET".to_owned(),
            path: "/slow".to_owned(),
            age_ms: 1200,
            class: "request",
            peer: "10.0.0.7:4242".to_owned(),
        };
        let admin = Admin {
            control: control.clone(),
            ready: Box::new(move || verdict.clone()),
            ledger: Box::new(move || vec![row()]),
            metrics: Box::new(move || metrics.clone()),
        };
        let (stop, stopped) = oneshot::channel();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let stopped = async { drop(stopped.await) };
            runtime.block_on(bound.serve(admin, stopped)).unwrap();
        });
        let socket = dir.socket();
        Self { control, probe, tcp, socket, stop: Some(stop), thread: Some(thread), _dir: dir }
    }

    fn probe(&self, line: &str, headers: &str) -> Reply {
        ask(tcp(self.probe), line, headers)
    }

    fn tcp(&self, line: &str, headers: &str) -> Reply {
        ask(tcp(self.tcp), line, headers)
    }

    fn unix(&self, line: &str) -> Reply {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        ask(stream, line, "Host: x\r\n")
    }

    fn until_triggered(&self, count: usize) {
        let start = Instant::now();
        while self.control.triggers().len() < count {
            assert!(start.elapsed() < SOON, "{:?}", self.control.triggers());
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn end(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

fn tcp(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

fn ask(mut stream: impl Read + Write, line: &str, headers: &str) -> Reply {
    write!(stream, "{line} HTTP/1.1\r\n{headers}\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no whole answer: {text:?}"));
    Reply { status: head[9..12].parse().unwrap(), head: head.to_lowercase(), body: body.to_owned() }
}

const WITH_TOKEN: &str = "Host: x\r\nLameduck-Token: s3cret\r\n";

fn drained(verdict: &str) -> Outcome {
    Outcome::Drained { verdict: verdict.to_owned() }
}

#[test]
fn livez_is_ok_and_readyz_gives_its_reasons_one_per_line() {
    let ready = Server::start();
    assert_eq!((ready.probe("GET /livez", "").status, ready.probe("GET /readyz", "").status), (200, 200));
    let not_ready = Verdict::NotReady(vec![Reason::AppDown, Reason::WarmingUp]);
    let server = Server::with(&[], not_ready);
    let reply = server.probe("GET /readyz", "");
    assert_eq!((reply.status, &*reply.body), (503, "the app does not answer\nwarm-up is not done\n"));
    let live = server.probe("GET /livez", "");
    assert_eq!((live.status, &*live.body), (200, "ok\n"));
    assert_eq!(server.probe("HEAD /livez", "").body, "");
}

#[test]
fn metrics_are_prometheus_text_on_both_listeners() {
    let server = Server::start();
    for reply in [server.probe("GET /metrics", ""), server.unix("GET /metrics")] {
        assert_eq!((reply.status, &*reply.body), (200, "lameduck_in_flight 2\n"));
        assert!(reply.head.contains("content-type: text/plain; version=0.0.4"), "{}", reply.head);
    }
}

#[test]
fn a_hook_without_the_right_token_is_refused_and_drains_nothing() {
    let server = Server::start();
    for token in ["", "Lameduck-Token: \r\n", "Lameduck-Token: s3cre\r\n", "Lameduck-Token: s3creT\r\n"] {
        let reply = server.probe("GET /drain", token);
        assert_eq!(reply.status, 403, "{token}");
        assert!(reply.body.contains("missing or wrong"), "{}", reply.body);
    }
    let without = Server::with(&[], Verdict::Ready);
    let reply = without.probe("GET /drain", "Lameduck-Token: \r\n");
    assert_eq!((reply.status, reply.body.contains("no token is configured")), (403, true));
    assert_eq!((server.control.triggers(), without.control.triggers()), (vec![], vec![]));
}

#[test]
fn every_caller_of_the_hook_waits_for_the_same_end_and_double_slashes_are_fine() {
    let server = Server::start();
    let calls = [
        ("GET /drain", Trigger::Hook),
        ("GET //drain", Trigger::Hook),
        ("GET ///drain?hook=", Trigger::Hook),
        ("GET //drain?hook=app", Trigger::AppHook),
        ("GET /drain?hook=sidecar", Trigger::SidecarHook),
    ];
    thread::scope(|scope| {
        let mut waiting = Vec::new();
        for (n, (line, trigger)) in calls.iter().enumerate() {
            waiting.push(scope.spawn(|| server.probe(line, WITH_TOKEN)));
            server.until_triggered(n + 1);
            assert_eq!(server.control.triggers()[n], *trigger, "{line}");
        }
        assert!(waiting.iter().all(|call| !call.is_finished()), "a hook came back before the end");
        assert_eq!(server.probe("GET /livez", "").status, 200);
        server.control.end(drained("clean"));
        for call in waiting {
            let reply = call.join().unwrap();
            assert_eq!(
                (reply.status, reply.json()),
                (200, json!({"outcome": "drained", "verdict": "clean"}))
            );
        }
    });
}

#[test]
fn a_mistyped_hook_starts_no_drain() {
    let server = Server::start();
    for line in ["GET /drain?hok=app", "GET /drain?hook=ap", "GET /drain?hook=app&x"] {
        assert_eq!(server.probe(line, WITH_TOKEN).status, 400, "{line}");
    }
    assert_eq!(server.probe("POST /drain", WITH_TOKEN).status, 405);
    assert_eq!(server.control.triggers(), []);
}

#[test]
fn a_caller_who_goes_away_does_not_end_the_drain_for_others() {
    let server = Server::start();
    let mut gone = TcpStream::connect(server.probe).unwrap();
    write!(gone, "GET /drain HTTP/1.1\r\n{WITH_TOKEN}\r\n").unwrap();
    server.until_triggered(1);
    drop(gone);
    thread::scope(|scope| {
        let other = scope.spawn(|| server.probe("GET /drain", WITH_TOKEN));
        server.until_triggered(2);
        server.control.end(Outcome::AppMayStop);
        assert_eq!(other.join().unwrap().json(), json!({"outcome": "app-may-stop"}));
    });
}

#[test]
fn a_hook_gets_its_answer_even_when_the_end_of_the_process_follows_at_once() {
    for _ in 0..20 {
        let mut server = Server::start();
        let (control, probe) = (server.control.clone(), server.probe);
        let call = thread::spawn(move || ask(tcp(probe), "GET /drain", WITH_TOKEN));
        server.until_triggered(1);
        control.end(drained("clean"));
        server.end();
        assert_eq!(call.join().unwrap().status, 200);
    }
}

#[test]
fn an_answer_that_is_being_written_at_the_end_is_written_whole() {
    let size = 16 << 20;
    let mut server = Server::with_metrics(&[], Verdict::Ready, "x".repeat(size));
    let mut stream = tcp(server.probe);
    write!(stream, "GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut text = vec![0; 1];
    stream.read_exact(&mut text).unwrap();
    server.stop.take();
    stream.read_to_end(&mut text).unwrap();
    assert!(text.len() > size, "cut after {} bytes", text.len());
}

#[test]
fn the_end_does_not_wait_for_callers_that_have_no_answer() {
    let mut server = Server::start();
    let mut stuck = TcpStream::connect(server.probe).unwrap();
    write!(stuck, "GET /drain HTTP/1.1\r\n{WITH_TOKEN}\r\n").unwrap();
    server.until_triggered(1);
    let _silent = UnixStream::connect(&server.socket).unwrap();
    let start = Instant::now();
    server.end();
    // A native sidecar is to be gone within 1.5 s.
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    assert!(!server.socket.exists());
}

#[test]
fn the_control_socket_is_for_its_user_alone_and_goes_with_the_process() {
    let mut server = Server::start();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&server.socket), 0o600);
    assert_eq!(mode(server.socket.parent().unwrap()), 0o700);
    server.end();
    assert!(!server.socket.exists());
}

#[test]
fn a_stale_control_socket_is_replaced_and_a_live_one_or_a_file_is_not() {
    let dir = Dir::new();
    let path = dir.0.join("c.sock");
    drop(UnixListener::bind(&path).unwrap());
    let first = admin::bind(&settings(&path, &[])).unwrap();
    let error = admin::bind(&settings(&path, &[])).unwrap_err().to_string();
    assert!(error.contains("another lameduck runs with this control socket"), "{error}");
    UnixStream::connect(&path).unwrap();
    // Somebody else's socket in its place stays.
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(first);
    UnixStream::connect(&path).unwrap();

    let file = dir.0.join("notes.txt");
    fs::write(&file, "mine").unwrap();
    let error = admin::bind(&settings(&file, &[])).unwrap_err().to_string();
    assert!(error.contains("it is no socket"), "{error}");
    assert_eq!(fs::read(&file).unwrap(), b"mine");
}

#[test]
fn a_taken_port_is_told_with_its_flag() {
    let dir = Dir::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let flags = ["--control-listen", &addr];
    let error = admin::bind(&settings(&dir.socket(), &flags)).unwrap_err().to_string();
    assert!(error.starts_with(&format!("--control-listen {addr}: ")), "{error}");
    assert!(error.ends_with("give another one"), "{error}");
}

#[test]
fn status_and_ledger_are_json() {
    let server = Server::with(&[], Verdict::NotReady(vec![Reason::AppDown]));
    let status = server.unix("GET /status").json();
    assert_eq!((&status["phase"], &status["connections"]), (&json!("serving"), &json!(3)));
    assert_eq!((&status["ready"], &status["reasons"]), (&json!(false), &json!(["the app does not answer"])));
    let row = json!({"method": "GET", "path": "/slow", "age_ms": 1200, "class": "request", "peer": "10.0.0.7:4242"});
    assert_eq!(server.unix("GET /ledger").json(), json!([row]));
}

#[test]
fn an_operator_drains_with_or_without_a_deadline_and_resumes() {
    let server = Server::start();
    thread::scope(|scope| {
        let call = scope.spawn(|| server.unix("POST /drain?timeout=1m30s"));
        server.until_triggered(1);
        let begun = server.unix("POST /drain?wait=false");
        assert_eq!((begun.status, begun.json()), (202, json!({"outcome": "begun"})));
        server.until_triggered(2);
        let timeout = Some(Duration::from_secs(90));
        let wanted = [Trigger::Operator { timeout }, Trigger::Operator { timeout: None }];
        assert_eq!(server.control.triggers(), wanted);
        assert_eq!(server.unix("POST /resume").json(), json!({"outcome": "resumed"}));
        assert_eq!(call.join().unwrap().json(), json!({"outcome": "resumed"}));
    });
    for target in ["timeout=soon", "timeout=0s", "timeout=9999years", "wait=perhaps", "timeot=1s"] {
        assert_eq!(server.unix(&format!("POST /drain?{target}")).status, 400, "{target}");
    }
    assert_eq!(server.control.triggers().len(), 2);
}

#[test]
fn an_unknown_path_or_method_is_told_what_there_is() {
    let server = Server::start();
    for (reply, status, help) in [
        (server.unix("GET /drain"), 405, "use POST"),
        (server.unix("POST /status"), 405, "use GET, HEAD"),
        (server.unix("GET /"), 404, "there are GET /status"),
        (server.probe("POST /livez", ""), 405, "use GET, HEAD"),
        // Control is not on the probe port.
        (server.probe("GET /ledger", ""), 404, "there are /livez"),
        (server.probe("POST /resume", WITH_TOKEN), 404, "there are /livez"),
    ] {
        assert_eq!(reply.status, status, "{help}");
        assert!(reply.body.starts_with(help), "{}", reply.body);
        assert_eq!(reply.head.contains("\nallow: "), status == 405, "{}", reply.head);
    }
}

#[test]
fn control_by_tcp_refuses_what_a_web_page_could_send() {
    let server = Server::start();
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
            assert_eq!(server.tcp(line, headers).status, 403, "{line} {headers}");
        }
    }
    assert_eq!(server.control.triggers(), []);
    for host in ["127.0.0.1:4882", "localhost:4882", "LocalHost", "127.0.0.1", "[::1]:4882"] {
        assert_eq!(server.tcp("GET /status", &format!("Host: {host}\r\n")).status, 200, "{host}");
    }
}

#[test]
fn connections_past_the_bound_wait_for_a_place() {
    let server = Server::start();
    let mut silent: Vec<_> = (0..256).map(|_| TcpStream::connect(server.probe).unwrap()).collect();
    let mut waits = TcpStream::connect(server.probe).unwrap();
    write!(waits, "GET /livez HTTP/1.1\r\n\r\n").unwrap();
    waits.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(waits.read(&mut [0; 1]).is_err(), "answered although all places are taken");
    // Control has places of its own.
    assert_eq!(server.unix("GET /status").status, 200);
    silent.pop();
    waits.set_read_timeout(Some(SOON)).unwrap();
    let mut text = String::new();
    waits.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
}

#[test]
fn a_head_that_is_too_slow_or_too_large_ends_the_connection() {
    let server = Server::start();
    let start = Instant::now();
    let (mut silent, mut slow) =
        (TcpStream::connect(server.probe).unwrap(), UnixStream::connect(&server.socket).unwrap());
    write!(slow, "GET /status HTTP/1.1\r\nHost").unwrap();
    let mut large = tcp(server.probe);
    let _ = write!(large, "GET /livez HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(16 << 10));
    let mut text = String::new();
    // The reset because of what was left unread may overtake the answer.
    let read = large.read_to_string(&mut text);
    assert!(text.starts_with("HTTP/1.1 431") || (read.is_err() && text.is_empty()), "{text}");
    silent.set_read_timeout(Some(SOON)).unwrap();
    slow.set_read_timeout(Some(SOON)).unwrap();
    let mut rest = Vec::new();
    silent.read_to_end(&mut rest).unwrap();
    slow.read_to_end(&mut rest).unwrap();
    let waited = start.elapsed().as_secs();
    assert!((9..15).contains(&waited), "closed after {waited} s");
}

/// Runs a client against the server until it has called, ends the drain, and tells its exit code.
fn drain_code(outcome: Outcome) -> String {
    let server = Server::start();
    thread::scope(|scope| {
        let client = scope.spawn(|| client::drain(&server.socket, Some(Duration::from_millis(1500)), true));
        server.until_triggered(1);
        let timeout = Some(Duration::from_millis(1500));
        assert_eq!(server.control.triggers(), [Trigger::Operator { timeout }]);
        server.control.end(outcome);
        format!("{:?}", client.join().unwrap())
    })
}

fn code(code: u8) -> String {
    format!("{:?}", ExitCode::from(code))
}

#[test]
fn drain_exits_with_0_when_clean_3_when_something_was_cut_and_1_when_it_was_resumed() {
    assert_eq!(drain_code(drained("clean")), code(0));
    assert_eq!(drain_code(drained("1 cut")), code(3));
    assert_eq!(drain_code(Outcome::AppMayStop), code(0));
    assert_eq!(drain_code(Outcome::Resumed), code(1));
}

#[test]
fn status_and_resume_exit_by_what_they_found() {
    let told = |exit: ExitCode| format!("{exit:?}");
    let mut server = Server::start();
    let socket = server.socket.clone();
    for view in [StatusView::Ready, StatusView::Human { watch: false }, StatusView::Json { watch: false }] {
        assert_eq!(told(client::status(&socket, view)), code(0), "{view:?}");
    }
    assert_eq!(told(client::drain(&socket, None, false)), code(0));
    server.until_triggered(1);
    assert_eq!(told(client::resume(&socket)), code(0));
    server.end();
    for view in [StatusView::Ready, StatusView::Human { watch: true }] {
        assert_eq!(told(client::status(&socket, view)), code(1), "{view:?}");
    }
    assert_eq!(told(client::resume(&socket)), code(1));
    let not_ready = Server::with(&[], Verdict::NotReady(vec![Reason::AppDown]));
    assert_eq!(told(client::status(&not_ready.socket, StatusView::Ready)), code(1));
    assert_eq!(told(client::status(&not_ready.socket, StatusView::Human { watch: false })), code(0));
}
