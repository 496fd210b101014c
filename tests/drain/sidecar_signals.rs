//! SIGTERM and the hooks in a native and an ordinary sidecar, and readiness meanwhile.

use crate::common;

use std::time::{Duration, Instant};

use common::MOMENT;
use common::http::{Client, End};
use common::process::{Lameduck, Node, TOKEN, lameduck};

/// A native sidecar exits within this time after SIGTERM.
const AT_ONCE: Duration = Duration::from_millis(1500);

fn native(app: &Node) -> Lameduck {
    Lameduck::proxy(app.addr, &["--sidecar", "native", "--grace", "120s"])
}

fn ends_at_once(proxy: &mut Lameduck) -> i32 {
    let signalled = Instant::now();
    proxy.terminate();
    let code = proxy.process.wait_exit();
    assert!(signalled.elapsed() < AT_ONCE, "{:?}", signalled.elapsed());
    code
}

#[test]
fn a_native_sidecar_ends_at_once_even_with_work_in_flight() {
    let app = Node::held();
    let mut proxy = native(&app);
    let (mut unanswered, mut half_sent) = (proxy.client(), proxy.client());
    unanswered.get("/wait");
    half_sent.get("/stream");
    app.wait_active(2);
    half_sent.wait_seen("first");

    assert_eq!(ends_at_once(&mut proxy), 3);
    assert_eq!(unanswered.answer().head.status, 504);
    assert_eq!(half_sent.answer().end, End::CutByRst);
    assert_eq!(proxy.wait_log("drained")["verdict"], "1 unanswered, 1 cut");
}

#[test]
fn a_native_sidecar_stays_when_drained_until_its_signal() {
    let app = Node::held();
    let mut proxy = native(&app);
    let answer = proxy.hook("/drain", Some(TOKEN)).answer();
    assert_eq!(answer.head.status, 200, "{}", answer.text());
    proxy.wait_phase("drained");
    std::thread::sleep(MOMENT);
    assert_eq!(proxy.process.exited(), None, "the app may still be running");
    assert_eq!(Client::ask(proxy.probe, "/livez").head.status, 200);
    assert_eq!(ends_at_once(&mut proxy), 0);
}

#[test]
fn an_idle_native_sidecar_ends_at_once_and_clean() {
    let app = Node::held();
    let mut proxy = native(&app);
    let mut idle = proxy.client();
    idle.get("/");
    idle.answer();
    assert_eq!(ends_at_once(&mut proxy), 0);
    idle.expect_fin();
    assert_eq!(proxy.wait_log("drained")["verdict"], "clean");
}

#[test]
fn an_ordinary_sidecar_drains_and_stays_until_the_hooks_callers_have_their_answer() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--sidecar", "ordinary", "--grace", "120s"]);
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);
    // The hooks and SIGTERM come at the same time, as when a pod is deleted.
    let mut hooks =
        [proxy.hook("/drain?hook=app", Some(TOKEN)), proxy.hook("/drain?hook=sidecar", Some(TOKEN))];
    proxy.terminate();
    proxy.wait_phase("draining");
    assert!(hooks.iter_mut().all(|hook| hook.is_quiet_for(MOMENT)), "a hook returned while a request ran");
    assert_eq!(proxy.process.exited(), None);

    app.release();
    assert_eq!(client.answer().text(), "released\n");
    for hook in &mut hooks {
        let answer = hook.answer();
        assert_eq!((answer.head.status, answer.end), (200, End::Whole));
        assert!(answer.text().contains("clean"), "{}", answer.text());
    }
    proxy.expect_clean_exit();
}

#[test]
fn both_hooks_within_two_seconds_are_a_deletion_in_either_order() {
    for sidecar in ["native", "ordinary"] {
        for order in [["app", "sidecar"], ["sidecar", "app"]] {
            let app = Node::held();
            let proxy = Lameduck::proxy(app.addr, &["--sidecar", sidecar]);
            let call = |whose| proxy.hook(&format!("/drain?hook={whose}"), Some(TOKEN));
            let mut hooks = [call(order[0]), call(order[1])];
            for hook in &mut hooks {
                assert!(hook.answer().text().contains("\"outcome\":\"drained\""), "{sidecar} {order:?}");
            }
            proxy.wait_phase("drained");
        }
    }
}

/// Starts a proxy, in a pod or not, whose lame-duck phase is long enough to observe; waits until it is ready.
fn ducky(app: &Node, args: &[&str], in_pod: bool) -> Lameduck {
    let mut program = lameduck();
    program.env_remove("KUBERNETES_SERVICE_HOST");
    if in_pod {
        program.env("KUBERNETES_SERVICE_HOST", "10.0.0.1");
    }
    let upstream = app.addr.to_string();
    let defaults = ["--lame-duck", "10s", "--grace", "60s", "--control-listen", "off"];
    let args = [&defaults, args].concat();
    let proxy = Lameduck::start_as(program, &["proxy", "--upstream", &upstream], &args, &[]);
    common::wait_for("ready", || (proxy.ready().head.status == 200).then_some(()));
    proxy
}

/// `/readyz` during the lame-duck phase of the drain that `begin` starts.
fn in_lame_duck(args: &[&str], in_pod: bool, begin: impl Fn(&Lameduck) -> Vec<Client>) -> (u16, String) {
    let app = Node::held();
    let proxy = ducky(&app, args, in_pod);
    let _callers = begin(&proxy);
    proxy.wait_phase("lame-duck");
    let ready = proxy.ready();
    assert_eq!(proxy.status().expect("a status")["phase"], "lame-duck", "it was over too soon");
    assert_eq!(Client::ask(proxy.probe, "/livez").head.status, 200);
    (ready.head.status, ready.text())
}

fn ready() -> (u16, String) {
    (200, "ok\n".to_owned())
}

fn not_ready(why: &str) -> (u16, String) {
    (503, format!("{why}\n"))
}

fn by_operator(proxy: &Lameduck) -> Vec<Client> {
    assert!(proxy.command_output(&["drain", "--no-wait"]).status.success());
    vec![]
}

fn by_signal(proxy: &Lameduck) -> Vec<Client> {
    proxy.terminate();
    vec![]
}

#[test]
fn a_pod_that_is_deleted_stays_ready_through_the_lame_duck() {
    let hooks = |targets: &'static [&str]| {
        move |proxy: &Lameduck| targets.iter().map(|target| proxy.hook(target, Some(TOKEN))).collect()
    };
    assert_eq!(in_lame_duck(&[], false, hooks(&["/drain"])), ready());
    let both = hooks(&["/drain?hook=app", "/drain?hook=sidecar"]);
    assert_eq!(in_lame_duck(&["--sidecar", "native"], true, both), ready());
    assert_eq!(in_lame_duck(&["--sidecar", "ordinary"], false, by_signal), ready());
    assert_eq!(in_lame_duck(&[], true, by_signal), ready());
}

#[test]
fn an_operators_drain_and_a_signal_outside_kubernetes_are_not_ready_at_once() {
    assert_eq!(in_lame_duck(&[], false, by_signal), not_ready("a signal began a drain"));
    assert_eq!(in_lame_duck(&[], true, by_operator), not_ready("an operator began a drain"));
}

#[test]
fn drain_readiness_overrides_both() {
    assert_eq!(in_lame_duck(&["--drain-readiness", "keep"], false, by_operator), ready());
    let fail = ["--drain-readiness", "fail"];
    assert_eq!(in_lame_duck(&fail, true, by_signal), not_ready("a signal began a drain"));
}

#[test]
fn not_ready_from_draining_on() {
    let app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--drain-readiness", "keep"]);
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);
    let _hook = proxy.hook("/drain", Some(TOKEN));
    proxy.wait_phase("draining");
    let ready = proxy.ready();
    assert_eq!((ready.head.status, ready.text()), not_ready("draining: new connections are refused"));
    app.release();
    proxy.wait_phase("drained");
    let ready = proxy.ready();
    assert_eq!((ready.head.status, ready.text()), not_ready("drained: new connections are refused"));
}
