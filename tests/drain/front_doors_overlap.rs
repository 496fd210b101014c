//! One front door takes over from another at the same address, and no request is lost.

use crate::common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::http::Client;
use common::port::Port;
use common::process::{Lameduck, Node};

/// Clients that request over new connections without a pause until they are stopped.
struct Clients {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Clients {
    fn start(to: SocketAddr) -> Self {
        let (stop, answered) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let ask = |_| {
            let (stop, answered) = (stop.clone(), answered.clone());
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // Panics if the connection is refused or reset.
                    assert_eq!(Client::ask(to, "/").head.status, 200);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let threads = (0..8).map(ask).collect();
        Self { stop, answered, threads }
    }

    /// Waits until this number of further requests has been answered.
    fn wait_answered(&self, more: u64) {
        let from = self.answered.load(Ordering::Relaxed);
        common::wait_for("answers", || {
            assert!(!self.threads.iter().any(thread::JoinHandle::is_finished), "a request was lost");
            (self.answered.load(Ordering::Relaxed) >= from + more).then_some(())
        });
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|client| client.join().expect("no request was lost"));
    }
}

#[test]
fn the_one_that_drains_loses_no_request() {
    let app = Node::slow();
    let port = Port::reserve();
    let at = port.addr.to_string();
    let door = || Lameduck::proxy(app.addr, &["--listen", &at, "--reuseport"]);
    let mut first = door();
    let clients = Clients::start(first.listen);
    clients.wait_answered(50);
    // Replaced twice: there and back.
    for _ in 0..2 {
        let second = door();
        clients.wait_answered(50);
        first.terminate();
        first.expect_clean_exit();
        clients.wait_answered(50);
        first = second;
    }
    clients.stop();
}

#[test]
fn without_reuseport_no_address_is_shared() {
    let app = Node::slow();
    let first = Lameduck::proxy(app.addr, &[]);
    let at = first.listen.to_string();
    let mut second = first.command(&["proxy", "--upstream", &app.addr.to_string(), "--listen", &at]);
    assert_eq!(second.wait_exit(), 1);
    assert!(second.output().contains("--listen"), "{}", second.output());
    assert_eq!(Client::ask(first.listen, "/").head.status, 200);
}
