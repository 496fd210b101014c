//! The probe and control listeners close last: pending responses are delivered in full, idle clients are not waited
//! for. Runs in this process, so that the end can follow at once.

use crate::common;

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::http::{Client, End};
use common::{MOMENT, wait_for};
use lameduck::admin::{self, Admin};
use lameduck::cli::{self, Command};
use lameduck::control::handle::Control;
use lameduck::control::leases::Leases;
use lameduck::control::runner::control;
use lameduck::drain::gate::Gate;
use lameduck::drain::machine::Phase;
use lameduck::proxy::accept::listener::Switch;
use lameduck::proxy::shared::Shared;
use lameduck::readiness::Readiness;
use tokio::sync::{Notify, oneshot};

const WITH_TOKEN: [&str; 1] = ["Lameduck-Token: s3cret"];

/// The listeners, a plane without a data plane's threads, and its drain.
struct Server {
    plane: Arc<Shared>,
    probe: SocketAddr,
    socket: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(metrics: String) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("lameduck-end-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let socket = std::env::temp_dir().join(name);
        let path = socket.to_str().expect("a path in ASCII");
        let fixed =
            "lameduck proxy --upstream :1 --probe-listen 127.0.0.1:0 --token s3cret --lame-duck 0s --control";
        let args = fixed.split(' ').chain([path]);
        let Ok(Command::Proxy { settings, .. }) = cli::parse(args) else { panic!("usage") };
        let bound = admin::bind(&settings, false).expect("bound");
        let probe = bound.probe_addr().expect("an address");
        let idle = Arc::new(Notify::new());
        let wake = idle.clone();
        let plane = Arc::new(Shared::new(*settings, None, move || wake.notify_one()));
        let (stop, stopped) = oneshot::channel();
        let served = plane.clone();
        let thread = thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let (control, runner) = control(served, Switch::default(), idle);
                tokio::spawn(runner.run());
                let shares = lameduck::descriptors::divide(1024, 0, 1);
                bound
                    .serve(shown(control, metrics), shares, async { drop(stopped.await) })
                    .await
                    .expect("served");
            });
        });
        Self { plane, probe, socket, stop: Some(stop), thread: Some(thread) }
    }

    fn hook(&self) -> Client {
        let mut client = Client::connect(self.probe);
        client.request("GET", "/drain", &WITH_TOKEN);
        wait_for("a drain", || (self.plane.phase() != Phase::Serving).then_some(()));
        client
    }

    fn end(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("an orderly end");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

fn shown(control: Control, metrics: String) -> Admin {
    Admin {
        control,
        leases: Arc::new(Leases::new(Arc::new(Gate::new(|| {})))),
        ready: Box::new(|| Readiness::Ready),
        captured: Default::default(),
        ledger: Box::new(Vec::new),
        metrics: Box::new(move || metrics.clone()),
    }
}

#[test]
fn a_hook_gets_its_answer_even_when_the_end_of_the_process_follows_at_once() {
    for _ in 0..20 {
        let mut server = Server::start(String::new());
        let plane = server.plane.clone();
        let work = plane.gate.admit().expect("it serves");
        let mut hook = server.hook();
        assert!(hook.is_quiet_for(MOMENT / 30));
        drop(work);
        wait_for("the end of the drain", || (plane.phase() == Phase::Drained).then_some(()));
        server.end();
        let answer = hook.answer();
        assert_eq!((answer.head.status, answer.end), (200, End::Whole));
    }
}

#[test]
fn an_answer_that_is_being_written_at_the_end_is_written_whole() {
    let size = 16 << 20;
    let mut server = Server::start("x".repeat(size));
    let mut client = Client::connect(server.probe);
    client.get("/metrics");
    let head = client.head();
    server.stop.take();
    let answer = client.body("GET", head);
    assert_eq!((answer.body.len(), answer.end), (size, End::Whole));
}

#[test]
fn the_end_does_not_wait_for_callers_that_have_no_answer() {
    let mut server = Server::start(String::new());
    let plane = server.plane.clone();
    let _work = plane.gate.admit().expect("it serves");
    let _stuck = server.hook();
    let _silent = UnixStream::connect(&server.socket).expect("control");
    let start = Instant::now();
    server.end();
    // A native sidecar is to be gone within 1.5 s.
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    assert!(!server.socket.exists());
}
