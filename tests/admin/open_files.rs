//! Clients never use the last file descriptors, however low the limit: `/readyz`, the control socket and the checks of
//! the app still work. Frequent errors don't flood the log.

use std::net::SocketAddr;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::grpc;
use crate::common::http2::{Peer, run, to};
use crate::common::process::{Lameduck, Node, lameduck};
use crate::common::wait_for;
use http::Method;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

/// A proxy with this limit on open files.
fn limited(files: u32, app: SocketAddr, args: &[&str]) -> Lameduck {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("ulimit -n {files} && exec \"$0\" \"$@\"")]);
    shell
        .arg(lameduck().get_program())
        .envs(lameduck().get_envs().filter_map(|(name, value)| Some((name, value?))));
    for (name, _) in lameduck().get_envs().filter(|(_, value)| value.is_none()) {
        shell.env_remove(name);
    }
    let args = [&["--threads", "2"], args].concat();
    Lameduck::start_as(shell, &["proxy", "--upstream", &app.to_string()], &args, &[])
}

/// Log entries whose message begins with this text.
fn lines(proxy: &Lameduck, text: &str) -> Vec<serde_json::Value> {
    let output = proxy.process.output();
    let entries = output.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    entries.filter(|entry| entry["message"].as_str().is_some_and(|said| said.starts_with(text))).collect()
}

/// Checks that the probe and control listeners respond and report the app as up, for long enough to include a new
/// check of the app.
fn expect_ready(proxy: &Lameduck) {
    let until = Instant::now() + Duration::from_millis(2500);
    while Instant::now() < until {
        let asked = Instant::now();
        let ready = proxy.ready();
        assert_eq!(ready.head.status, 200, "{}", ready.text());
        assert!(proxy.status().is_some());
        assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn readyz_answers_while_clients_use_all_files_allowed_to_them() {
    let app = Node::held();
    let proxy = limited(64, app.addr, &[]);
    let cut = proxy
        .process
        .wait_line("the cut", |line| line.contains("--max-connections is 50000").then(|| line.to_owned()));
    let cut: serde_json::Value = serde_json::from_str(&cut).expect("JSON");
    let most = cut["max_connections"].as_u64().expect("a number");
    assert!((8..32).contains(&most) && cut["open_files"] == 64, "{cut}");
    let mut clients: Vec<_> = (0..100).map(|_| proxy.client()).collect();
    clients.iter_mut().for_each(|client| client.get("/wait"));
    wait_for("as many requests as the limit allows", || (app.active() >= most / 3).then_some(()));
    expect_ready(&proxy);
    let let_in = proxy.status().expect("a status")["connections"].as_u64();
    assert!(let_in.is_some_and(|let_in| let_in <= most + 1), "{let_in:?} of {most}");
    // The other connections wait in the kernel's queue, and none is lost.
    let mut left = clients;
    while !left.is_empty() {
        left.retain_mut(|client| {
            app.release();
            let here = client.fill(Duration::from_millis(5)).is_some();
            assert!(!here || client.answer().text() == "released\n");
            !here
        });
    }
    assert_eq!(lines(&proxy, "accept failed").len(), 0);
    assert_eq!(lines(&proxy, "--max-connections is").len(), 1);
}

#[test]
fn one_http2_client_cannot_use_up_the_files() {
    let app = Node::held();
    let proxy = limited(64, app.addr, &[]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let mut answers = vec![];
        for _ in 0..80 {
            answers.push(peer.send(to(Method::GET, "/wait"), true).await.0);
        }
        wait_for("as many requests as the limit allows", || (app.active() > 7).then_some(()));
        expect_ready(&proxy);
        let most = app.active();
        assert!(most < 40, "{most}");
        // Streams over the limit wait until others end.
        for mut answer in answers {
            let answer = loop {
                match tokio::time::timeout(Duration::from_millis(20), &mut answer).await {
                    Ok(answer) => break answer.expect("an answer"),
                    Err(_) => app.release(),
                }
            };
            assert_eq!(answer.status(), 200);
        }
    });
}

#[test]
fn streams_that_share_a_connection_to_the_app_leave_room_for_clients() {
    let app = grpc::App::start();
    let proxy = limited(64, app.addr, &["--upstream-protocol", "http2"]);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        let mut calls = vec![];
        for _ in 0..60 {
            calls.push(peer.send(to(Method::GET, "/t.T/Hang"), true).await.0);
        }
        proxy.wait_in_flight(60);
        for _ in 0..3 {
            let mut client = proxy.client();
            client.get("/");
            assert_eq!(client.answer().head.status, 200);
        }
    });
}

#[test]
fn idle_connections_make_room_when_others_wait() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--max-connections", "2", "--idle-timeout", "60s"]);
    let began = Instant::now();
    let mut idle = proxy.client();
    idle.get("/");
    assert_eq!(idle.answer().head.status, 200);
    run(async {
        let peer = Peer::connect(proxy.listen).await;
        assert_eq!(peer.get("/").await.expect("an answer").status, 200);
        // An idle HTTP/1.1 and an idle HTTP/2 connection use up the limit.
        let (mut third, mut fourth) = (proxy.client(), proxy.client());
        third.get("/");
        fourth.get("/");
        assert_eq!((third.answer().head.status, fourth.answer().head.status), (200, 200));
        idle.expect_fin();
        assert_eq!(peer.wait_end().map_err(|error| error.to_string()), Ok(()));
    });
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}

#[test]
fn repeated_failures_are_logged_once_a_second_with_a_count() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let began = Instant::now();
    for _ in 0..40 {
        let mut refused = proxy.hook("/drain", Some("wrong"));
        assert_eq!(refused.answer().head.status, 403);
    }
    let seconds = |began: Instant| began.elapsed().as_secs() as usize + 1;
    let told = lines(&proxy, "refused /drain");
    assert!((1..=seconds(began)).contains(&told.len()), "{told:?}");

    // As if other files had used up the limit: every accept fails.
    let pid = Pid::from_raw(proxy.process.pid() as i32);
    prlimit(pid, Resource::Nofile, Rlimit { current: Some(3), maximum: Some(3) }).expect("a limit");
    let began = Instant::now();
    let mut waiting = proxy.client();
    waiting.get("/");
    let last = wait_for("more than one line", || lines(&proxy, "accept failed").into_iter().nth(1));
    assert!(lines(&proxy, "accept failed").len() <= seconds(began));
    assert!(last["times"].as_u64().expect("a number") > 1, "{last}");
}
