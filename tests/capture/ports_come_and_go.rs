//! A captured port that its app closes for good is left to itself, and one that comes back is captured again. A pod is ready
//! while all of its app's ports listen.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{self, UnixDatagram};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lameduck::capture::watch::Capture;
use lameduck::cli;
use lameduck::proxy::accept::listener::{ListenerSender, Switch};
use lameduck::proxy::shared::Shared;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::captured_ports::{APP, OK, connect, moved, pod, proxy};
use crate::common::http::Client;
use crate::common::process::{Lameduck, Process, TOKEN, temporary_directory};
use crate::common::{MOMENT, wait_for};
use crate::in_pod;

/// An app's socket that has moved.
fn listens(port: u16) -> TcpListener {
    TcpListener::bind((APP, port)).expect("the app's port")
}

/// Says what the shim would: this port listens now.
fn say(port: u16) {
    let name = net::SocketAddr::from_abstract_name("lameduck-capture").expect("a name");
    let own = net::SocketAddr::from_abstract_name(format!("test-{port}")).expect("a name");
    let shim = UnixDatagram::bind_addr(&own).expect("a socket");
    shim.send_to_addr(format!("listen {port:05}").as_bytes(), &name).expect("a word");
    assert!(shim.recv(&mut [0; 16]).expect("an answer") > 0);
}

fn captured(status: &Value) -> &Value {
    &status["captured"]
}

fn wait_ready(proxy: &Lameduck, status: u16) {
    wait_for("another readiness", || (proxy.ready().head.status == status).then_some(()));
}

#[test]
fn a_port_that_the_app_closes_for_good_is_released_and_may_come_back() {
    in_pod(|| {
        // Captured first: also the port of the readiness check and the warm-up.
        let (debug, _app) = (listens(9000), listens(9001));
        let proxy = proxy(&["--upstream-wait", "500ms"]);
        proxy.wait_status("both ports", |status| *captured(status) == json!([9000, 9001]));
        wait_ready(&proxy, 200);
        let mut waiting = connect(pod(9000));
        drop(debug);
        wait_ready(&proxy, 503);
        waiting.get("/");
        Client::wait_refused(pod(9000));
        Client::wait_refused(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 9000));
        assert_eq!(waiting.answer().head.status, 503, "its connection stays");
        wait_ready(&proxy, 200);
        proxy.wait_status("one port", |status| *captured(status) == json!([9001]));
        assert_eq!(Client::ask(proxy.probe, "/app-port/9000").head.status, 503);
        assert!(Client::try_connect(pod(9001)).is_ok(), "the other one is served");

        let _again = moved(9000).answer_all(OK);
        say(9000);
        let mut client = Client::connect(pod(9000));
        client.get("/");
        assert_eq!(client.answer().text(), "ok");
        assert_eq!(captured(&proxy.status().expect("a status")), &json!([9000, 9001]));
        drop((client, waiting));
        // Both wait for sockets, but not for those of the released port.
        for command in ["drain", "resume"] {
            let done = proxy.command_output(&[command]);
            assert!(done.status.success(), "{command}: {done:?}");
        }
        assert!(Client::try_connect(pod(9000)).is_ok() && Client::try_connect(pod(9001)).is_ok());
    });
}

#[test]
fn an_app_that_is_away_as_a_whole_is_waited_for() {
    in_pod(|| {
        let ports = [listens(9000), listens(9001)];
        let proxy = proxy(&["--upstream-wait", "200ms"]);
        proxy.wait_status("both ports", |status| *captured(status) == json!([9000, 9001]));
        wait_ready(&proxy, 200);
        drop(ports);
        wait_ready(&proxy, 503);
        // Much longer than three times --upstream-wait.
        thread::sleep(Duration::from_secs(2));
        assert_eq!(captured(&proxy.status().expect("a status")), &json!([9000, 9001]));
        let mut client = Client::connect(pod(9001));
        client.get("/");
        assert_eq!(client.answer().head.status, 503);
        let _back = [listens(9000), listens(9001)];
        wait_ready(&proxy, 200);
    });
}

#[test]
fn a_restart_of_one_app_among_several_holds_requests_until_its_port_is_back() {
    in_pod(|| {
        let (_other, app) = (listens(9000), listens(9001));
        let proxy = proxy(&["--sidecar", "ordinary", "--restart-grace", "60s", "--upstream-wait", "30s"]);
        proxy.wait_status("both ports", |status| *captured(status) == json!([9000, 9001]));
        wait_ready(&proxy, 200);
        drop(app);
        wait_ready(&proxy, 503);
        let app = listens(9001);
        wait_ready(&proxy, 200);
        let mut hook = proxy.hook("/drain?hook=app", Some(TOKEN));
        assert!(hook.answer().text().contains("app-may-stop"));
        // No app goes and comes back within milliseconds.
        thread::sleep(MOMENT);
        drop(app);
        let mut held = Client::connect(pod(9001));
        held.get("/");
        proxy.wait_status("a held request", |status| status["held"] == 1);
        let _app = moved(9001).answer_all(OK);
        assert_eq!(held.answer().text(), "ok");
        wait_for("the end of the restart", || {
            (!proxy.ready().text().contains("requests are held")).then_some(())
        });
    });
}

/// An app that has moved, and that ends at SIGTERM once it has answered everything. It keeps no connection, or its end
/// would take as long as the proxy keeps that.
fn node(port: u16) -> Process {
    let script = format!(
        "const server = require('http').createServer((_, res) => res.setHeader('connection', 'close').end('ok'));
        server.listen({port}, '127.77.0.1', () => console.log('up'));
        process.on('SIGTERM', () => server.close(() => process.exit()));"
    );
    let node = Process::start("node", Command::new("node").args(["-e", &script]));
    node.wait_line("the app listens", |line| (line == "up").then_some(()));
    node
}

#[test]
fn nothing_is_lost_while_one_app_among_several_restarts_under_load() {
    in_pod(|| {
        let (_other, mut app) = (node(9000), node(9001));
        let proxy = proxy(&[]);
        proxy.wait_status("both ports", |status| *captured(status) == json!([9000, 9001]));
        let (over, asked) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|threads| {
            for port in [9000, 9001, 9000, 9001] {
                let (over, asked) = (&over, &asked);
                threads.spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        let answer = Client::ask(pod(port), "/");
                        assert_eq!(answer.head.status, 200, "{port}: {}", answer.text());
                        asked.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..3 {
                app.signal(Signal::TERM);
                app.wait_exit();
                // Long enough for the checks of the app to notice.
                thread::sleep(Duration::from_millis(1500));
                app = node(9001);
            }
            over.store(true, Ordering::Relaxed);
        });
        assert!(asked.load(Ordering::Relaxed) > 100, "too little load: {asked:?}");
    });
}

#[test]
fn an_app_that_did_not_move_is_ready_and_its_drain_takes_no_less_time() {
    in_pod(|| {
        let app = TcpListener::bind("0.0.0.0:3000").expect("the app's port");
        let file = temporary_directory().join("termination-log");
        std::fs::write(&file, "").expect("a file");
        let path = file.to_str().expect("a path in ASCII");
        let mut proxy = proxy(&["--lame-duck", "2s", "--termination-log", path]);
        wait_ready(&proxy, 200);
        let line = "port 3000 is bypassed: the app listens there itself: it is statically linked";
        let told = || std::fs::read_to_string(&file).expect("the file");
        wait_for("the termination message", || told().starts_with(line).then_some(()));
        let began = Instant::now();
        proxy.terminate();
        assert!(Client::try_connect(pod(3000)).is_ok());
        proxy.expect_clean_exit();
        assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
        let told = told();
        let lines: Vec<_> = told.lines().collect();
        assert!(lines[0].starts_with("lameduck: drained in 2.") && lines[0].ends_with(" s: clean"), "{told}");
        assert!(lines[1].starts_with(line) && lines.len() == 2, "{told}");
        drop(app);
    });
}

#[test]
fn the_ports_of_a_mesh_are_nobodys_to_protect() {
    in_pod(|| {
        let _mesh =
            [15006, 15021, 15090, 4143, 4191].map(|port| TcpListener::bind(("0.0.0.0", port)).unwrap());
        let proxy = proxy(&[]);
        // The ports are looked at together, in order.
        let _app = TcpListener::bind("0.0.0.0:20000").expect("the app's port");
        let status = proxy.wait_status("the app's port", |status| status["bypassed"] != json!([]));
        assert_eq!(status["bypassed"].as_array().map(Vec::len), Some(1), "{status}");
        assert_eq!(status["bypassed"][0]["address"], "0.0.0.0:20000");
    });
}

#[test]
fn an_app_that_opens_no_port_is_ready_after_a_minute() {
    in_pod(|| {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let line = "lameduck proxy --capture --termination-log /dev/null/none --control @none";
            let Ok(cli::Command::Proxy { settings, .. }) = cli::parse(line.split(' ')) else {
                panic!("{line}")
            };
            let shared = Arc::new(Shared::new(*settings, None, || {}));
            let (listeners, _receiver) = ListenerSender::new(Switch::default());
            tokio::spawn(Capture::of_pod(shared.clone(), listeners).watch());
            tokio::time::sleep(Duration::from_secs(59)).await;
            assert!(!shared.captured.is_settled());
            tokio::time::sleep(Duration::from_secs(2)).await;
            assert!(shared.captured.is_settled());
        });
    });
}

#[test]
fn the_log_says_what_listens_instead_of_the_app() {
    in_pod(|| {
        let captures = proxy(&[]);
        let warned = |proxy: &Lameduck, text: &str| {
            proxy.process.wait_line(text, |line| line.contains(text).then_some(()));
        };
        warned(&captures, "the app listens on no port yet");
        drop(captures);
        let _local = TcpListener::bind("127.0.0.1:5000").expect("a port");
        let captures = proxy(&[]);
        let upstream = Lameduck::proxy("127.0.0.1:3000".parse().unwrap(), &[]);
        // The other proxy's own listeners are in this pod too.
        warned(&captures, "the app listens on 127.0.0.1:5000, ");
        assert!(captures.process.output().contains(" only, which nobody outside the pod reaches"));
        warned(
            &upstream,
            "the app does not answer on 127.0.0.1:3000 yet: Connection refused (os error 111); what",
        );
        let output = upstream.process.output();
        assert!(
            output.contains("what listens on this host is") && output.contains("127.0.0.1:5000"),
            "{output}"
        );
    });
}
