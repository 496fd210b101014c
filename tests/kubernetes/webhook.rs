//! The webhook, installed and replaced, adds the sidecar to every pod that opts in.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::cluster::{Namespace, kubectl, kubectl_with, run};
use super::images::scratch;
use super::manifests::takes;

/// Namespace of the webhook.
const HOME: &str = "lameduck-system";
/// Time limit for the certificates, the caBundle and the first replica.
const SOON: Duration = Duration::from_secs(90);
/// The Helm that lints and installs the chart.
const HELM: &str = "helm.sh/helm/v3/cmd/helm@v3.22.0";

/// Values that the chart is rendered with.
const CHARTS: [&str; 3] =
    ["replicas=1", "replicas=3,failurePolicy=Fail", "certManager.enabled=true,podMonitor.enabled=true"];

/// A pod that opts in by its own label, and that fits on no node.
const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  generateName: asks-
  labels: {lameduck.dev/inject: enabled}
spec:
  nodeSelector: {lameduck.dev/no-such: node}
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: app
    image: slow:1.0.0
    ports: [{name: http, containerPort: 3000}]
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
"#;

/// Applies `install.yaml` once, and waits until the webhook works.
pub fn installed() {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    INSTALLED.get_or_init(install);
}

fn install() {
    let applied = kubectl_with("", &["apply", "-f", &manifest("install.yaml")]);
    assert!(applied.status.success(), "install.yaml: {}", String::from_utf8_lossy(&applied.stderr));
    expect_working("install.yaml");
}

fn manifest(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests").join(name).display().to_string()
}

/// Waits until all replicas are ready and an opted-in pod gets the sidecar.
fn expect_working(what: &str) {
    let began = Instant::now();
    kubectl(&["-n", HOME, "rollout", "status", "deployment/lameduck-webhook", "--timeout=90s"]);
    while !injects() {
        assert!(began.elapsed() < SOON, "{what}: no sidecar within {SOON:?}");
        sleep(Duration::from_millis(200));
    }
    println!("{what}: works after {:.1?}", began.elapsed());
}

/// Whether an opted-in pod would get the sidecar now.
fn injects() -> bool {
    let asked = kubectl_with(POD, &["-n", "default", "create", "--dry-run=server", "-o", "json", "-f", "-"]);
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
    has_sidecar(&serde_json::from_slice(&asked.stdout).expect("a pod"))
}

fn has_sidecar(pod: &Value) -> bool {
    let containers = pod["spec"]["initContainers"].as_array().into_iter().flatten();
    containers.into_iter().any(|container| container["name"] == "lameduck")
}

#[test]
#[ignore = "needs a cluster"]
fn every_pod_created_during_the_webhooks_own_rollout_gets_the_sidecar() {
    let Some(ns) = Namespace::new("webhook-rollout") else { return };
    installed();
    let over = AtomicBool::new(false);
    let pods = [POD; 5].join("---");
    scope(|threads| {
        for _ in 0..2 {
            threads.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let created = kubectl_with(&pods, &["-n", ns.name, "create", "-f", "-"]);
                    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
                }
            });
        }
        for _ in 0..2 {
            let old = kubectl(&["-n", HOME, "get", "pods", "-o", "name"]);
            let old: Vec<_> = old.split_whitespace().collect();
            kubectl(&["-n", HOME, "rollout", "restart", "deployment/lameduck-webhook"]);
            kubectl(&["-n", HOME, "rollout", "status", "deployment/lameduck-webhook", "--timeout=120s"]);
            kubectl(&[&["-n", HOME, "wait", "--for=delete", "--timeout=90s"], old.as_slice()].concat());
        }
        over.store(true, Ordering::Relaxed);
    });
    let pods: Value = serde_json::from_str(&ns.kubectl(&["get", "pods", "-o", "json"])).expect("pods");
    let pods = pods["items"].as_array().expect("a list");
    let without: Vec<_> = pods.iter().filter(|pod| !has_sidecar(pod)).map(|pod| &pod["metadata"]).collect();
    println!("webhook-rollout: {} pods created, {} without the sidecar", pods.len(), without.len());
    assert!(without.is_empty() && pods.len() >= 50, "of {}: {without:#?}", pods.len());
}

#[test]
#[ignore = "needs a cluster"]
fn after_the_rollout_of_another_version_no_pod_gets_the_old_sidecar() {
    let Some(ns) = Namespace::alone("webhook-upgrade") else { return };
    installed();
    let deployment = ["-n", HOME, "set", "env", "deployment/lameduck-webhook"];
    let image = |pod: &Value| pod["spec"]["initContainers"][0]["image"].as_str().map(str::to_owned);
    let pods = [POD; 6].join("---");
    for wanted in ["lameduck:next", "lameduck:other", "lameduck:next"] {
        kubectl(&[&deployment[..], &[&format!("LAMEDUCK_IMAGE={wanted}")]].concat());
        kubectl(&["-n", HOME, "rollout", "status", "deployment/lameduck-webhook", "--timeout=120s"]);
        let created = kubectl_with(&pods, &["-n", ns.name, "create", "-o", "json", "-f", "-"]);
        assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
        // One object after the other, or a List.
        let all = serde_json::Deserializer::from_slice(&created.stdout).into_iter::<Value>();
        let all: Vec<Value> = all.map(|pod| pod.expect("a pod")).collect();
        let lists = all.iter().flat_map(|list| list["items"].as_array().into_iter().flatten());
        let images: Vec<_> =
            lists.chain(all.iter().filter(|pod| pod["items"].is_null())).map(image).collect();
        println!("webhook-upgrade: {wanted}: {images:?}");
        assert!(images.len() == 6 && images.iter().all(|image| image.as_deref() == Some(wanted)));
    }
    install();
}

#[test]
#[ignore = "needs a cluster"]
fn the_chart_lints_and_both_ways_of_installing_end_in_a_working_webhook() {
    let helm = scratch("bin/helm");
    let Some(ns) = Namespace::alone("installing") else { return };
    if !helm.exists() {
        run(Command::new("go").args(["install", HELM]).env("GOBIN", scratch("bin")));
    }
    let chart = manifest("chart");
    run(Command::new(&helm).args(["lint", "--strict", &chart]));
    installed();
    for values in CHARTS {
        let template =
            ["template", "lameduck", &chart, "--namespace", HOME, "--kube-version", "1.34", "--set", values];
        let rendered = Command::new(&helm).args(template).output().expect("helm");
        assert!(rendered.status.success(), "{values}: {}", String::from_utf8_lossy(&rendered.stderr));
        takes(&ns, &format!("the chart with {values}"), &String::from_utf8_lossy(&rendered.stdout));
    }
    kubectl(&["delete", "-f", &manifest("install.yaml"), "--timeout=90s"]);
    assert!(!injects(), "a pod got the sidecar after the webhook was removed");

    let helm = |arguments: &[&str]| {
        let mut inside = super::cluster::inside(helm.to_str().expect("a path in UTF-8"));
        run(inside.args(arguments).args(["--namespace", HOME]));
    };
    helm(&["install", "lameduck", &chart, "--create-namespace", "--wait", "--timeout=90s"]);
    expect_working("the chart");
    helm(&["uninstall", "lameduck", "--wait"]);
    assert!(!injects(), "a pod got the sidecar after the chart was uninstalled");
    install();
}
