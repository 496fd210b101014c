//! No request is lost when pods are scaled, deleted or evicted.

use std::thread::sleep;

use super::WARM;
use super::cluster::{Namespace, kubectl};
use super::deploy::By;
use super::pods::GONE_WITHIN;

#[test]
#[ignore = "needs a cluster"]
fn deleting_the_only_pod_and_scaling_out_and_in_lose_nothing() {
    let Some(ns) = Namespace::new("scaling") else { return };
    ns.deploy(By::Inject, &[("replicas: 3", "replicas: 1")]);
    let load = ns.load("slow", &["--requests", "3000"]);
    sleep(WARM);
    ns.kubectl(&["delete", "pod", &ns.living()[0], "--wait=false"]);
    ns.rolled_out();
    ns.pods.wait_gone(1);
    for replicas in ["2", "10", "2"] {
        ns.kubectl(&["scale", "deployment/slow", "--replicas", replicas]);
        ns.rolled_out();
        sleep(WARM);
    }
    ns.pods.wait_gone(1 + 8);
    load.finish().expect_nothing_lost(3000);
    // Eight pods that end at once keep the kubelets busy.
    ns.pods.expect_clean_drains(1 + 8, GONE_WITHIN * 2);
}

#[test]
#[ignore = "needs a cluster"]
fn draining_nodes_with_and_without_a_disruption_budget_loses_nothing() {
    let Some(ns) = Namespace::alone("node-drain") else { return };
    ns.deploy(By::Inject, &[]);
    let load = ns.load("slow", &["--requests", "3000"]);
    sleep(WARM);
    let first = drain_node(&ns, "node2");
    ns.pods.wait_gone(first);
    ns.kubectl(&["create", "poddisruptionbudget", "slow", "--selector", "app=slow", "--min-available", "3"]);
    // With only three pods, the budget would allow no eviction.
    ns.kubectl(&["scale", "deployment/slow", "--replicas", "4"]);
    ns.rolled_out();
    let second = drain_node(&ns, "node1");
    ns.pods.wait_gone(first + second);
    load.finish().expect_nothing_lost(3000);
    ns.pods.expect_clean_drains(first + second, GONE_WITHIN);
}

/// Drains a node of the slow app's pods, makes it schedulable again, and returns the number of evicted pods.
fn drain_node(ns: &Namespace, node: &str) -> usize {
    let on_it = format!("spec.nodeName={node}");
    let evicted = ns.kubectl(&["get", "pods", "--field-selector", &on_it, "-o", "name"]).lines().count();
    assert!(evicted > 0, "no pod on {node}");
    let drained = std::panic::catch_unwind(|| {
        kubectl(&["drain", node, "--pod-selector=app=slow", "--delete-emptydir-data", "--timeout=240s"])
    });
    kubectl(&["uncordon", node]);
    drained.expect("the node drained");
    evicted
}
