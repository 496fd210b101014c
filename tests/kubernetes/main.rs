//! On a real cluster, nothing that clients asked for is lost while pods come and go.
//!
//! ```text
//! LAMEDUCK_CLUSTER=path/to/cluster cargo test --test kubernetes -- --ignored --nocapture
//! ```
//!
//! The engine is a program with `up`, `load` and `run`; an `image` that makes image archives stands beside it.
//! `LAMEDUCK_BIN` names a static binary to test instead of building one.

mod cluster;
mod load;
mod pods;

use std::thread::sleep;
use std::time::Duration;

use cluster::{Namespace, kubectl};
use pods::GONE_WITHIN;

/// Before and after what is done to the pods, so that clients of every kind are at work when it happens.
const WARM: Duration = Duration::from_secs(5);

/// An address of no network (RFC 5737).
const OUTSIDE: &str = "192.0.2.1";

#[test]
#[ignore = "needs a cluster"]
fn rolling_restarts_lose_nothing() {
    let Some(ns) = Namespace::new("rolling-restart") else { return };
    ns.deploy(&[]);
    let load = ns.load("slow", &["--requests", "3000"]);
    sleep(WARM);
    for round in 1..=2 {
        println!("rollout {round} took {:.1?}", ns.restart("deployment/slow"));
    }
    ns.pods.wait_gone(6);
    load.finish().expect_nothing_lost(3000);
    ns.pods.expect_clean_drains(6, GONE_WITHIN);
}

#[test]
#[ignore = "needs a cluster"]
fn scaling_out_and_in_loses_nothing() {
    let Some(ns) = Namespace::new("scaling") else { return };
    ns.deploy(&[("replicas: 3", "replicas: 1")]);
    let load = ns.load("slow", &["--requests", "3000"]);
    sleep(WARM);
    for replicas in ["2", "10", "2"] {
        ns.kubectl(&["scale", "deployment/slow", "--replicas", replicas]);
        ns.rolled_out();
        sleep(WARM);
    }
    // Eight pods that end at once keep the kubelets of a small machine busy.
    ns.pods.wait_gone(8);
    load.finish().expect_nothing_lost(3000);
    ns.pods.expect_clean_drains(8, GONE_WITHIN * 3);
}

#[test]
#[ignore = "needs a cluster"]
fn deleting_the_only_pod_loses_nothing() {
    let Some(ns) = Namespace::new("only-pod") else { return };
    ns.deploy(&[("replicas: 3", "replicas: 1")]);
    let load = ns.load("slow", &["--requests", "3000"]);
    sleep(WARM);
    ns.kubectl(&["delete", "pod", &ns.living()[0], "--wait=false"]);
    ns.rolled_out();
    ns.pods.wait_gone(1);
    load.finish().expect_nothing_lost(3000);
    ns.pods.expect_clean_drains(1, GONE_WITHIN);
}

#[test]
#[ignore = "needs a cluster"]
fn draining_a_node_loses_nothing() {
    let Some(ns) = Namespace::new("node-drain") else { return };
    ns.deploy(&[]);
    drain_node(&ns);
}

#[test]
#[ignore = "needs a cluster"]
fn eviction_under_a_disruption_budget_loses_nothing() {
    let Some(ns) = Namespace::new("eviction") else { return };
    ns.deploy(&[]);
    ns.kubectl(&["create", "poddisruptionbudget", "slow", "--selector", "app=slow", "--min-available", "3"]);
    // With three of three needed nothing could ever be evicted.
    ns.kubectl(&["scale", "deployment/slow", "--replicas", "4"]);
    ns.rolled_out();
    drain_node(&ns);
}

fn drain_node(ns: &Namespace) {
    let load = ns.load("slow", &["--requests", "3000"]);
    sleep(WARM);
    let there = ns.kubectl(&["get", "pods", "--field-selector", "spec.nodeName=node2", "-o", "name"]);
    let evicted = there.lines().count();
    assert!(evicted > 0, "no pod on node2");
    let selector = ["--pod-selector", "app=slow"];
    let arguments = ["drain", "node2", "--delete-emptydir-data", "--timeout=240s"];
    let drained = std::panic::catch_unwind(|| kubectl(&[&arguments[..], &selector[..]].concat()));
    kubectl(&["uncordon", "node2"]);
    drained.expect("the node drained");
    ns.pods.wait_gone(evicted);
    load.finish().expect_nothing_lost(3000);
    ns.pods.expect_clean_drains(evicted, GONE_WITHIN);
}

#[test]
#[ignore = "needs a cluster"]
fn a_liveness_restart_of_the_app_loses_nothing() {
    let Some(ns) = Namespace::new("liveness-restart") else { return };
    // The kubelet calls a pod not ready for as long as one of its containers doesn't run: new connections then find
    // the other pods, and a Service without others refuses them. What this pod has is held.
    // Healthy until somebody writes the file; the restarted app is healthy again.
    let probe = r#"        livenessProbe:
          exec: {command: [node, -e, "try { fs.unlinkSync('/probe/sick'); process.exit(1) } catch {}"]}
          periodSeconds: 2
          timeoutSeconds: 10
          failureThreshold: 1
        volumeMounts: [{name: probe, mountPath: /probe}]
"#;
    ns.deploy(&[
        ("        livenessProbe:\n          httpGet: {path: /, port: 3000}\n", probe),
        ("      volumes:\n", "      volumes:\n      - {name: probe, emptyDir: {}}\n"),
        ("--grace=75s]", "--grace=75s, --restart-grace=15s]"),
    ]);
    let pod = ns.living().remove(0);
    // Only what ends within the restart's grace.
    let kinds = "keep-alive:20,new:8,slow:10,stream:6,upload:4,download:2,idle:6";
    let load = ns.load("slow", &["--requests", "3000", "--kinds", kinds]);
    sleep(WARM);
    let sicken = "fs.writeFileSync('/probe/sick', '')";
    ns.kubectl(&["exec", &pod, "-c", "app", "--", "node", "-e", sicken]);
    ns.pods.wait("the app's restart", |pods| pods[&pod].restarts.get("app") == Some(&1));
    sleep(WARM);
    load.finish().expect_nothing_lost(3000);
    let seen = ns.pods.all().remove(&pod).expect("the pod");
    assert_eq!(seen.restarts["lameduck"], 0, "the sidecar restarted too");
    assert!(seen.line("the app may stop").is_some() && seen.line("drain began").is_none(), "{:#?}", seen.log);
}

#[test]
#[ignore = "needs a cluster"]
fn a_crash_of_the_app_costs_only_what_it_was_running() {
    let Some(ns) = Namespace::new("crash") else { return };
    // New connections find the other pods, as in a liveness restart.
    ns.deploy(&[]);
    let pod = ns.living().remove(0);
    let kinds = "keep-alive:20,new:8,slow:10,idle:6";
    let load = ns.load("slow", &["--requests", "3000", "--kinds", kinds]);
    sleep(WARM);
    let crash = "fetch('http://127.0.0.1:3000/crash').catch(() => {})";
    let _ = cluster::inside("kubectl")
        .args(["-n", ns.name, "exec", &pod, "-c", "app", "--", "node", "-e", crash])
        .output();
    ns.pods.wait("the app's restart", |pods| pods[&pod].restarts.get("app") == Some(&1));
    sleep(WARM);
    let outcome = load.finish().0;
    // A slow request each, and what of the short ones was running just then.
    let lost = outcome["lost"].as_u64().expect("a count");
    assert!(lost <= 20, "{:#}", outcome["samples"]);
    assert!(outcome["losses"].as_object().expect("losses").keys().all(|kind| kind == "5xx"), "{outcome:#}");
    assert_eq!(ns.pods.all()[&pod].restarts["lameduck"], 0, "the sidecar restarted too");
}

#[test]
#[ignore = "needs a cluster"]
fn a_node_port_with_local_traffic_policy_loses_nothing() {
    let Some(ns) = Namespace::new("node-port") else { return };
    let spread = "    spec:
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: DoNotSchedule
        labelSelector: {matchLabels: {app: slow}}
        matchLabelKeys: [pod-template-hash]
";
    ns.deploy(&[
        ("replicas: 3", "replicas: 2\n  strategy: {rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}"),
        ("    spec:\n", spread),
        (
            "spec:\n  selector: {app: slow}",
            "spec:\n  type: NodePort\n  externalTrafficPolicy: Local\n  selector: {app: slow}",
        ),
    ]);
    let port = ns.kubectl(&["get", "service", "slow", "-o", "jsonpath={.spec.ports[0].nodePort}"]);
    let nodes = kubectl(&["get", "nodes", "-o", "jsonpath={.items[*].status.addresses[0].address}"]);
    let addrs: Vec<String> = nodes.split(' ').map(|node| format!("--addr={node}:{port}")).collect();
    // From an address that is neither a pod's nor a node's, since kube-proxy answers those from anywhere.
    let _ = cluster::inside("ip").args(["address", "add", OUTSIDE, "dev", "uplink"]).output();
    let more = ["--requests", "3000", "--from", OUTSIDE];
    let arguments: Vec<&str> = addrs.iter().map(String::as_str).chain(more).collect();
    let load = load::Load::start(&arguments);
    sleep(WARM);
    println!("rollout took {:.1?}", ns.restart("deployment/slow"));
    ns.pods.wait_gone(2);
    load.finish().expect_nothing_lost(3000);
    ns.pods.expect_clean_drains(2, GONE_WITHIN);
}

#[test]
#[ignore = "needs a cluster"]
fn a_request_longer_than_the_grace_ends_visibly_before_the_kill() {
    let Some(ns) = Namespace::new("too-long") else { return };
    ns.deploy(&[
        ("replicas: 3", "replicas: 1"),
        ("terminationGracePeriodSeconds: 75", "terminationGracePeriodSeconds: 20"),
        ("--grace=75s", "--grace=20s"),
    ]);
    let load = ns.load("slow", &["--kinds", "endless:5"]);
    sleep(WARM);
    ns.kubectl(&["scale", "deployment/slow", "--replicas", "0"]);
    sleep(WARM);
    let finish = std::thread::spawn(move || load.finish());
    ns.pods.wait_gone(1);
    let outcome = finish.join().expect("the load's report").0;
    let samples = outcome["samples"].as_array().expect("samples");
    let answered =
        samples.iter().filter(|line| line.as_str().is_some_and(|line| line.contains("status 504")));
    assert_eq!((answered.count(), outcome["lost"].as_u64()), (5, Some(5)), "{outcome:#}");
    let pods = ns.pods.all();
    let drained = pods.values().next().and_then(|pod| pod.line("drained")).expect("a drain");
    assert_eq!(drained["verdict"], "5 unanswered");
}

#[test]
#[ignore = "needs a cluster"]
fn a_job_with_the_sidecar_completes() {
    let Some(ns) = Namespace::new("job") else { return };
    let template = cluster::SLOW.split_once("  template:\n").expect("a template").1;
    let work = "        command: [node, -e, 'setTimeout(() => console.log(1), 3000)']\n";
    let job = "apiVersion: batch/v1\nkind: Job\nmetadata: {name: slow}\nspec:\n  template:\n".to_owned()
        + &template
            .replace("      terminationGrace", "      restartPolicy: Never\n      terminationGrace")
            .replace("        image: slow:1.0.0\n", &format!("        image: slow:1.0.0\n{work}"))
            .replace("        livenessProbe:\n          httpGet: {path: /, port: 3000}\n", "");
    ns.apply(&job);
    ns.kubectl(&["wait", "--for=condition=complete", "job/slow", "--timeout=30s"]);
    ns.pods.wait("the pod's success", |pods| pods.values().all(|pod| pod.phase == "Succeeded"));
}

#[test]
#[ignore = "needs a cluster"]
fn websockets_see_only_announced_endings() {
    let Some(ns) = Namespace::new("websockets") else { return };
    ns.deploy(&[("slow:1.0.0", "chat:1.0.0"), ("replicas: 3", "replicas: 2")]);
    let load = ns.load("slow", &["--kinds", "websocket:20"]);
    sleep(WARM);
    println!("rollout took {:.1?}", ns.restart("deployment/slow"));
    ns.pods.wait_gone(2);
    let outcome = load.finish();
    outcome.expect_nothing_lost(20);
    // Some clients had left by themselves.
    assert!(outcome.0["announced_ends"]["websocket"].as_u64() >= Some(10), "{:#}", outcome.0);
    ns.pods.expect_clean_drains(2, GONE_WITHIN);
}
