//! listen(2) returns when the proxy listens too: the sidecar hears of the port first. Without an answer the app waits a
//! second at most, and without a sidecar not at all.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{self, UnixDatagram};
use std::path::Path;
use std::time::{Duration, Instant};

use lameduck::capture::listeners::{Ports, ports};
use lameduck::capture::place::Place;
use lameduck::capture::word::Words;
use lameduck::config::APP_IP;

use crate::common::process::Process;
use crate::common::{LIMIT, MOMENT};
use crate::{POD, in_pod, preloaded, with_each_libc};

const SECOND: Duration = Duration::from_secs(1);
const ANY: &str = "tcp4,0.0.0.0,3000,listen";

/// A fresh runtime for the sidecar's half, on this thread and so in this pod.
fn sidecar<T>(test: impl AsyncFnOnce(Words) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(LIMIT, test(Words::bind(Place::Pod).unwrap())).await.expect("in time")
    })
}

fn app(program: &Path, socket: &str) -> Process {
    Process::start("sockets", preloaded(program).args([socket, "hold"]))
}

#[test]
fn an_app_that_listens_waits_until_the_proxy_does() {
    for program in with_each_libc("sockets") {
        in_pod(|| {
            sidecar(async |words| {
                for (socket, port) in [("tcp4,0.0.0.0,3000,listen", 3000), ("tcp6,::,80,listen", 80)] {
                    let app = app(&program, socket);
                    let heard = words.next().await.unwrap();
                    assert_eq!(heard.iter().map(|word| word.port).collect::<Vec<_>>(), [port]);
                    assert_eq!(
                        ports().unwrap(),
                        Ports { moved: [(APP_IP, port).into()].into(), ..Ports::default() }
                    );
                    assert_eq!(app.output(), "", "it waits");
                    let proxy = TcpListener::bind((POD, port)).unwrap();
                    let also = TcpListener::bind(("127.0.0.1", port)).unwrap();
                    words.answer(&heard[0], false);
                    app.wait_line("its end", |line| line.contains("listen 0 -").then_some(()));
                    // Ours aren't bypassed.
                    assert_eq!(ports().unwrap().bypassed, [].into());
                    drop((proxy, also));
                }
            });
        });
    }
}

#[test]
fn the_sidecar_hears_of_what_did_not_move_but_nothing_waits() {
    for program in with_each_libc("sockets") {
        in_pod(|| {
            sidecar(async |words| {
                let time = time_to_listen(&program, "tcp6,::,3000,listen,v6only");
                assert!(time < SECOND, "nothing to wait for");
                assert_eq!(words.next().await.unwrap()[0].port, 3000);
                for silent in ["tcp4,127.0.0.1,3001,listen", "tcp6,::1,3001,listen"] {
                    time_to_listen(&program, silent);
                }
                assert!(
                    tokio::time::timeout(MOMENT, words.next()).await.is_err(),
                    "loopback is nobody's business"
                );
            });
        });
    }
}

/// How long the app takes to listen.
fn time_to_listen(program: &Path, socket: &str) -> Duration {
    let begun = Instant::now();
    let app = app(program, socket);
    app.wait_line("its end", |line| line.contains("listen 0 -").then_some(()));
    begun.elapsed()
}

#[test]
fn a_sidecar_that_is_silent_full_or_missing_holds_nobody_up() {
    for program in with_each_libc("sockets") {
        in_pod(|| {
            assert!(time_to_listen(&program, ANY) < SECOND, "nobody to wait for");
            let name = net::SocketAddr::from_abstract_name("lameduck-capture").unwrap();
            let silent = UnixDatagram::bind_addr(&name).unwrap();
            assert!((SECOND..5 * SECOND).contains(&time_to_listen(&program, ANY)), "silent");
            let flood = UnixDatagram::unbound().unwrap();
            flood.set_nonblocking(true).unwrap();
            while flood.send_to_addr(b"listen 1", &name).is_ok() {}
            assert!((SECOND..5 * SECOND).contains(&time_to_listen(&program, ANY)), "full");
            drop(silent);
            assert!(time_to_listen(&program, ANY) < SECOND, "gone");
        });
    }
}

#[test]
fn what_is_no_word_is_dropped_and_a_crowd_is_heard() {
    in_pod(|| {
        sidecar(async |words| {
            let name = net::SocketAddr::from_abstract_name("lameduck-capture").unwrap();
            let named = net::SocketAddr::from_abstract_name("some app").unwrap();
            let sender = UnixDatagram::bind_addr(&named).unwrap();
            UnixDatagram::unbound().unwrap().send_to_addr(b"listen 1", &name).unwrap();
            let long = [b'0'; 4096];
            for word in
                [&b""[..], b"listen", b"listen 0", b"listen 99999", &long, b"listen 2", b"listen 00003"]
            {
                sender.send_to_addr(word, &name).unwrap();
            }
            let mut heard = Vec::new();
            while heard.len() < 2 {
                heard.extend(words.next().await.unwrap());
            }
            assert_eq!(heard.iter().map(|word| word.port).collect::<Vec<_>>(), [2, 3]);
            heard.iter().for_each(|word| words.answer(word, false));
            let mut buffer = [0; 16];
            assert!(sender.recv(&mut buffer).unwrap() > 0 && sender.recv(&mut buffer).unwrap() > 0);
            drop(sender);
            words.answer(&heard[0], false);
        });
    });
}
