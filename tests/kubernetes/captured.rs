//! Capture: pods that name no port lose nothing in rolling restarts, and their Services stay as they are. Nor do pods whose
//! ports are taken in another way, and those that change from one way to the other.

use std::thread::sleep;

use super::WARM;
use super::cluster::Namespace;
use super::deploy::{By, Changes, inject, plain};
use super::pods::GONE_WITHIN;

/// Without any declared port: only the Service knows the number.
const CAPTURED: Changes<'static> = &[
    ("          ports:\n            - name: http\n              containerPort: 3000\n", ""),
    ("httpGet: {path: /, port: http}", "httpGet: {path: /, port: 3000}"),
];

/// The proxy takes the name of the port, as earlier versions did.
const BY_NAME: Changes<'static> =
    &[("{lameduck.dev/grace: 75s}", "{lameduck.dev/grace: 75s, lameduck.dev/capture: port-name}")];

/// The webhook does not see the Service, whose number would lead past the proxy.
const BY_NAME_FOR_THE_WEBHOOK: Changes<'static> = &[BY_NAME[0], ("targetPort: 3000", "targetPort: http")];

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
fn a_rolling_restart_of_pods_whose_port_moves_by_its_name_loses_nothing() {
    let Some(ns) = Namespace::new("by-name") else { return };
    super::rollouts::restarts_lose_nothing(&ns, By::Inject, BY_NAME, 1);
}

#[test]
#[ignore = "needs a cluster"]
fn the_same_by_the_webhook_loses_nothing() {
    let Some(ns) = Namespace::new("by-name-webhook") else { return };
    super::rollouts::restarts_lose_nothing(&ns, By::Webhook, BY_NAME_FOR_THE_WEBHOOK, 1);
}

/// From pods of the earlier way to captured ones, back, to captured ones again, and to pods without a sidecar. Only the pods
/// without one may lose requests, so the last rollout starts when the load is over.
#[test]
#[ignore = "needs a cluster"]
fn rollouts_from_the_earlier_way_to_capture_and_back_lose_nothing() {
    let Some(ns) = Namespace::new("migration") else { return };
    let old = inject(&plain(BY_NAME));
    // What was injected is injected again, without the annotation.
    let new = inject(&old.replace(", lameduck.dev/capture: port-name", ""));
    ns.apply(&old);
    ns.rolled_out();
    let load = ns.load("slow", &["--requests", "3000"]);
    sleep(WARM);
    for manifests in [&new, &old, &new] {
        ns.apply(manifests);
        ns.rolled_out();
    }
    ns.pods.wait_gone(9);
    let outcome = load.finish();
    outcome.expect_nothing_lost(3000);
    ns.pods.expect_clean_drains(9, GONE_WITHIN);
    let status = ns.kubectl(&["exec", &ns.living()[0], "-c", "lameduck", "--", "/lameduck", "status"]);
    assert!(status.contains("captured     3000\n") && !status.contains("bypassed"), "{status}");
}

#[test]
#[ignore = "needs a cluster"]
fn the_api_server_takes_captured_pods() {
    let Some(ns) = Namespace::new("captured-dry-run") else { return };
    super::manifests::takes(&ns, "the captured app", &inject(&plain(CAPTURED)));
}
