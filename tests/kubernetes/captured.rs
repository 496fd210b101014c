//! Capture: pods that name no port, or several, lose nothing in rolling restarts, and their Services stay as they are.

use std::thread::sleep;

use super::WARM;
use super::cluster::Namespace;
use super::deploy::{By, Changes, inject, plain};
use super::pods::GONE_WITHIN;

/// Captured, and without any declared port: only the Service knows the number.
const CAPTURED: Changes<'static> = &[
    ("{lameduck.dev/grace: 75s}", "{lameduck.dev/grace: 75s, lameduck.dev/capture: loopback}"),
    ("          ports:\n            - name: http\n              containerPort: 3000\n", ""),
    ("httpGet: {path: /, port: http}", "httpGet: {path: /, port: 3000}"),
];

/// Restarts the slow app's three pods twice under load.
fn restarts_lose_nothing(ns: &Namespace, by: By) {
    ns.deploy(by, CAPTURED);
    let load = ns.load("slow", &["--requests", "3000"]);
    sleep(WARM);
    for _ in 0..2 {
        ns.restart(&["slow"]);
    }
    ns.pods.wait_gone(6);
    let outcome = load.finish();
    outcome.expect_nothing_lost(3000);
    outcome.expect_announced_ends("events", 1);
    ns.pods.expect_clean_drains(6, GONE_WITHIN);
    let status = ns.kubectl(&["exec", &ns.living()[0], "-c", "lameduck", "--", "/lameduck", "status"]);
    assert!(status.contains("captured     3000\n") && !status.contains("bypassed"), "{status}");
}

#[test]
#[ignore = "needs a cluster"]
fn rolling_restarts_of_captured_pods_lose_nothing() {
    let Some(ns) = Namespace::new("captured") else { return };
    restarts_lose_nothing(&ns, By::Inject);
    let target = ns.kubectl(&["get", "service", "slow", "-o", "jsonpath={.spec.ports[0].targetPort}"]);
    assert_eq!(target, "3000", "the Service is untouched");
}

#[test]
#[ignore = "needs a cluster"]
fn rolling_restarts_of_pods_captured_by_the_webhook_lose_nothing() {
    let Some(ns) = Namespace::new("captured-webhook") else { return };
    restarts_lose_nothing(&ns, By::Webhook);
}

#[test]
#[ignore = "needs a cluster"]
fn the_api_server_takes_captured_pods() {
    let Some(ns) = Namespace::new("captured-dry-run") else { return };
    super::manifests::takes(&ns, "the captured app", &inject(&plain(CAPTURED)));
}
