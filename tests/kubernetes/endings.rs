//! Work that can't finish ends as announced, and losses that the hook can't prevent are counted.

use std::thread::sleep;

use super::WARM;
use super::cluster::Namespace;
use super::deploy::{By, changed, inject, plain};
use super::pods::GONE_WITHIN;

#[test]
#[ignore = "needs a cluster"]
fn a_request_longer_than_the_grace_ends_visibly_before_the_kill() {
    let Some(ns) = Namespace::new("too-long") else { return };
    ns.deploy(
        By::Inject,
        &[
            ("replicas: 3", "replicas: 1"),
            ("lameduck.dev/grace: 75s", "lameduck.dev/grace: 20s"),
            // Set here too, because `inject` never lowers the default of 30 s.
            (
                "      securityContext: {runAsNonRoot",
                "      terminationGracePeriodSeconds: 20\n      securityContext: {runAsNonRoot",
            ),
        ],
    );
    let load = ns.load("slow", &["--kinds", "endless:5,trickle:3"]);
    sleep(WARM);
    ns.kubectl(&["scale", "deployment/slow", "--replicas", "0"]);
    sleep(WARM);
    let finish = std::thread::spawn(move || load.finish());
    ns.pods.wait_gone(1);
    let outcome = finish.join().expect("the load's report");
    assert_eq!((outcome.lost("endless"), outcome.lost("trickle")), (5, 3), "{:#}", outcome.0);
    let samples = outcome.0["samples"].as_array().expect("samples");
    let told =
        |what: &str| samples.iter().filter(|line| line.as_str().is_some_and(|l| l.contains(what))).count();
    assert_eq!(told("status 504"), 5, "unanswered requests: {samples:#?}");
    assert_eq!(told("trickle reset") + told("trickle cut"), 3, "half-sent responses: {samples:#?}");
    let pods = ns.pods.all();
    let drained = pods.values().next().and_then(|pod| pod.line("drained")).expect("a drain");
    assert_eq!(drained["verdict"], "5 unanswered, 3 cut");
    assert!(drained["seconds"].as_f64().is_some_and(|seconds| seconds < 20.0), "after SIGKILL: {drained}");
}

#[test]
#[ignore = "needs a cluster"]
fn websockets_see_only_announced_endings() {
    let Some(ns) = Namespace::new("websockets") else { return };
    ns.deploy(By::Inject, &[("slow:1.0.0", "chat:1.0.0"), ("replicas: 3", "replicas: 2")]);
    let load = ns.load("slow", &["--kinds", "websocket:20"]);
    sleep(WARM);
    ns.restart(&["slow"]);
    ns.pods.wait_gone(2);
    let outcome = load.finish();
    outcome.expect_nothing_lost(20);
    // Some clients may have closed their WebSockets themselves.
    outcome.expect_announced_ends("websocket", 10);
    ns.pods.expect_clean_drains(2, GONE_WITHIN);
}

/// The app and the sidecar get SIGTERM at the same time, as from a kubelet that could not call the hooks.
#[test]
#[ignore = "needs a cluster"]
fn what_skipped_hooks_cost_with_a_sidecar() {
    let Some(ns) = Namespace::new("hooks-skipped") else { return };
    let ordinary = "{lameduck.dev/grace: 75s, lameduck.dev/sidecar: ordinary, lameduck.dev/pid1: share}";
    let injected = inject(&plain(&[("{lameduck.dev/grace: 75s}", ordinary)]));
    // The kubelet accepts any response, so these hooks return at once and nothing drains.
    ns.apply(&changed(&injected, &[("/drain?hook=app", "/livez"), ("/drain?hook=sidecar", "/livez")]));
    ns.rolled_out();
    let load = ns.load("slow", &["--requests", "3000"]);
    sleep(WARM);
    ns.restart(&["slow"]);
    ns.pods.wait_gone(3);
    let outcome = load.finish().0;
    println!("hooks-skipped: with a sidecar {} of {} lost", outcome["lost"], outcome["requests"]);
    assert!(outcome["lost"].as_u64() > Some(0), "the hooks were not skipped");
}

/// Here `lameduck run` is the process that gets SIGTERM.
#[test]
#[ignore = "needs a cluster"]
fn without_hooks_run_as_the_entrypoint_loses_nothing() {
    let Some(ns) = Namespace::new("run") else { return };
    ns.apply(&plain(&[
        (
            "          image: slow:1.0.0\n",
            "          image: slow-with-lameduck:1.0.0
          command: [lameduck, run, --grace=75s, --, node, server.js]
          env: [{name: PORT, value: \"3000\"}]
",
        ),
        ("httpGet: {path: /, port: http}", "httpGet: {path: /readyz, port: 4881}"),
        (
            "      securityContext: {runAsNonRoot",
            "      terminationGracePeriodSeconds: 75\n      securityContext: {runAsNonRoot",
        ),
    ]));
    ns.rolled_out();
    let load = ns.load("slow", &["--requests", "3000"]);
    sleep(WARM);
    ns.restart(&["slow"]);
    ns.pods.wait_gone(3);
    load.finish().expect_nothing_lost(3000);
    ns.pods.expect_clean_drains(3, GONE_WITHIN);
}
