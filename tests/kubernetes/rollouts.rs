//! Rolling restarts lose nothing, however the sidecar was added to the pods.

use std::thread::sleep;

use super::WARM;
use super::cluster::{Namespace, inside, kubectl};
use super::deploy::{By, Changes};
use super::load::Load;
use super::pods::GONE_WITHIN;

/// An address reserved for documentation (RFC 5737), which no network uses.
const OUTSIDE: &str = "192.0.2.1";

/// Restarts the slow app's three pods this number of times under load, and checks that nothing is lost.
pub fn restarts_lose_nothing(ns: &Namespace, by: By, changes: Changes<'_>, times: usize) {
    ns.deploy(by, changes);
    let nodes = ns.kubectl(&["get", "pods", "-o", "jsonpath={.items[*].spec.nodeName}"]);
    assert!(nodes.contains("node1") && nodes.contains("node2"), "not over both nodes: {nodes}");
    let load = ns.load("slow", &["--requests", "3000"]);
    sleep(WARM);
    for _ in 0..times {
        ns.restart(&["slow"]);
    }
    ns.pods.wait_gone(3 * times);
    let outcome = load.finish();
    outcome.expect_nothing_lost(3000);
    outcome.expect_announced_ends("events", 1);
    ns.pods.expect_clean_drains(3 * times, GONE_WITHIN);
}

#[test]
#[ignore = "needs a cluster"]
fn rolling_restarts_lose_nothing() {
    let Some(ns) = Namespace::new("rolling-restart") else { return };
    restarts_lose_nothing(&ns, By::Inject, &[], 2);
    // The fast exit counts only if Node is PID 1, for which the kernel drops a SIGTERM without a handler.
    let ask = "fetch('http://127.0.0.1:3000/').then((answer) => answer.text()).then(console.log)";
    let hello = ns.kubectl(&["exec", &ns.living()[0], "-c", "app", "--", "node", "-e", ask]);
    assert_eq!(hello.trim(), "hello from pid 1");
    let lease =
        ["/run/lameduck/lameduck", "lease", "--control", "127.0.0.1:4882", "--", "node", "-p", "1 + 1"];
    let exec = ["exec", &ns.living()[0], "-c", "app", "--"];
    assert_eq!(ns.kubectl(&[exec.as_slice(), &lease].concat()).trim(), "2");
}

#[test]
#[ignore = "needs a cluster"]
fn rolling_restarts_of_pods_by_the_webhook_lose_nothing() {
    let Some(ns) = Namespace::new("by-webhook") else { return };
    restarts_lose_nothing(&ns, By::Webhook, &[], 2);
}

#[test]
#[ignore = "needs a cluster"]
fn the_hand_written_sidecar_loses_nothing() {
    let Some(ns) = Namespace::new("by-hand") else { return };
    restarts_lose_nothing(&ns, By::Hand, &[], 1);
}

#[test]
#[ignore = "needs a cluster"]
fn an_ordinary_sidecar_loses_nothing() {
    let Some(ns) = Namespace::new("ordinary") else { return };
    // An ordinary sidecar may start after the app, so there is no preload. With `share`, Node is not PID 1 and hears
    // SIGTERM.
    let ordinary: Changes<'_> = &[(
        "{lameduck.dev/grace: 75s}",
        "{lameduck.dev/grace: 75s, lameduck.dev/sidecar: ordinary, lameduck.dev/pid1: share}",
    )];
    restarts_lose_nothing(&ns, By::Inject, ordinary, 1);
}

#[test]
#[ignore = "needs a cluster"]
fn a_node_port_with_local_traffic_policy_loses_nothing() {
    let Some(ns) = Namespace::new("node-port") else { return };
    ns.deploy(
        By::Inject,
        &[
            (
                "  replicas: 3\n",
                "  replicas: 2\n  strategy: {rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}\n",
            ),
            (
                "      securityContext: {runAsNonRoot",
                "      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: DoNotSchedule
          labelSelector: {matchLabels: {app: slow}}
          matchLabelKeys: [pod-template-hash]
      securityContext: {runAsNonRoot",
            ),
            (
                "spec:\n  selector: {app: slow}",
                "spec:\n  type: NodePort\n  externalTrafficPolicy: Local\n  selector: {app: slow}",
            ),
        ],
    );
    let port = ns.kubectl(&["get", "service", "slow", "-o", "jsonpath={.spec.ports[0].nodePort}"]);
    let nodes = kubectl(&["get", "nodes", "-o", "jsonpath={.items[*].status.addresses[0].address}"]);
    let addrs: Vec<String> = nodes.split(' ').map(|node| format!("--addr={node}:{port}")).collect();
    // From an address outside the cluster, since kube-proxy lets pods and nodes reach the Service through any node.
    let _ = inside("ip").args(["address", "add", OUTSIDE, "dev", "uplink"]).output();
    let more = ["--requests", "3000", "--from", OUTSIDE];
    let arguments: Vec<&str> = addrs.iter().map(String::as_str).chain(more).collect();
    let load = Load::start("node-port/slow", &arguments);
    sleep(WARM);
    ns.restart(&["slow"]);
    ns.pods.wait_gone(2);
    load.finish().expect_nothing_lost(3000);
    ns.pods.expect_clean_drains(2, GONE_WITHIN);
}
