//! Two instances of a gRPC app are restarted one after the other under a client that calls without a pause, and no call
//! fails. The client is plain grpc-go, without a retry policy.
//!
//! ```text
//! cargo test --test other_makes grpc_rollout -- --ignored --nocapture
//! ```

use crate::common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::port::Port;
use common::process::{Lameduck, Process};
use common::wait_for;
use rustix::process::Signal;

const ROUNDS: usize = 3;

/// An app and the proxy in front of it; both keep their addresses over restarts.
struct Instance {
    program: PathBuf,
    listen: Port,
    app: Port,
    running: Option<(Process, Lameduck)>,
}

impl Instance {
    fn new(program: &Path) -> Self {
        let (listen, app) = (Port::reserve(), Port::reserve());
        let mut instance = Self { program: program.to_owned(), listen, app, running: None };
        instance.start();
        instance
    }

    fn start(&mut self) {
        let (listen, app_addr) = (self.listen.addr.to_string(), self.app.addr.to_string());
        let app = Process::start("the app", Command::new(&self.program).args(["serve", &app_addr]));
        app.wait_line("the app's address", |line| line.starts_with("listens on").then_some(()));
        let proxy = Lameduck::proxy_to(&app_addr, &["--listen", &listen, "--lame-duck", "1s"]);
        self.running = Some((app, proxy));
    }

    /// Stops both as when a pod is deleted: the proxy drains, then the app gets SIGTERM.
    fn stop(&mut self) {
        let Some((mut app, mut proxy)) = self.running.take() else { return };
        proxy.terminate();
        proxy.expect_clean_exit();
        app.signal(Signal::TERM);
        assert_eq!(app.wait_exit(), 0);
    }

    /// Waits until the client sends calls to this instance.
    fn wait_used(&self) {
        let Some((_, proxy)) = &self.running else { return };
        let served = || proxy.metric("lameduck_requests_total{code=\"2xx\"}");
        wait_for("the client's calls", || (served() > 100.0).then_some(()));
    }
}

#[test]
#[ignore = "needs Go 1.26 or newer, to build tests/grpc_go with modules from Go's proxy"]
fn no_call_fails_while_two_instances_are_restarted() {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("grpc_go");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/grpc_go");
    let built = Command::new("go").args(["build", "-o"]).arg(&program).arg(".").current_dir(source).status();
    assert!(built.expect("go starts: is it installed?").success());

    let mut instances = [Instance::new(&program), Instance::new(&program)];
    let addrs = instances.each_ref().map(|instance| instance.listen.addr.to_string());
    let mut call = Command::new(&program);
    call.args(["call", "20", &addrs[0], &addrs[1]]).env("SLOW", "1");
    let mut client = Process::start("the client", &mut call);
    instances.iter().for_each(Instance::wait_used);
    for _ in 0..ROUNDS {
        for instance in &mut instances {
            instance.stop();
            instance.start();
            instance.wait_used();
        }
    }
    client.signal(Signal::TERM);
    assert_eq!(client.wait_exit(), 0);
    let total = client.wait_line("the total", |line| Some(line.strip_prefix("calls ")?.to_owned()));
    println!("{} restarts: calls {total}", 2 * ROUNDS);
    assert!(total.ends_with(" failed 0"), "{}", client.output());
}
