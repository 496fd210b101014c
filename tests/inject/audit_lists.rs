//! `lameduck audit` lists every pod that should have the sidecar and doesn't, with the reason and the remedy.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use super::inject_keeps_every_byte::{lameduck, text};
use crate::common;

use common::pod::settings;
use lameduck::inject::{PatchSettings, Services, patch};
use serde_json::{Value, json};

const TAG: &str = env!("CARGO_PKG_VERSION");

/// A pod as `kubectl get -o json` prints it.
fn live(namespace: &str, owner: (&str, &str), name: &str) -> Value {
    let account = json!({
        "name": "kube-api-access-x7k2p",
        "projected": { "defaultMode": 420, "sources": [{ "serviceAccountToken": { "path": "token" } }] },
    });
    let mount = json!({
        "name": "kube-api-access-x7k2p", "readOnly": true,
        "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
    });
    let owner = json!({
        "apiVersion": "apps/v1", "kind": owner.0, "name": owner.1, "uid": "1f6c", "controller": true,
        "blockOwnerDeletion": true,
    });
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "generateName": "web-6c8d5f7b9c-", "namespace": namespace, "uid": name,
            "creationTimestamp": "2026-11-29T00:44:00Z", "resourceVersion": "71",
            "labels": { "app": "web", "pod-template-hash": "6c8d5f7b9c" }, "ownerReferences": [owner],
        },
        "spec": {
            "containers": [{
                "name": "web", "image": "web:1", "imagePullPolicy": "IfNotPresent", "resources": {},
                "ports": [{ "name": "http", "containerPort": 3000, "protocol": "TCP" }],
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                "volumeMounts": [mount],
            }],
            "dnsPolicy": "ClusterFirst", "enableServiceLinks": true, "nodeName": "worker", "priority": 0,
            "restartPolicy": "Always", "schedulerName": "default-scheduler", "serviceAccountName": "default",
            "securityContext": {}, "terminationGracePeriodSeconds": 30, "volumes": [account],
            "tolerations": [{ "effect": "NoExecute", "key": "node.kubernetes.io/not-ready", "operator": "Exists" }],
        },
        "status": { "phase": "Running", "podIP": "10.244.1.7", "qosClass": "BestEffort" },
    })
}

fn with_sidecar(pod: &Value, image: &str) -> Value {
    let settings = PatchSettings { image: image.to_owned(), ..settings(Services::Unseen) };
    patch(pod, &settings).unwrap().pod
}

fn namespace(name: &str, label: &str) -> Value {
    let labels = json!({ "kubernetes.io/metadata.name": name, "lameduck.dev/inject": label });
    let metadata = json!({ "name": name, "labels": labels });
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata, "status": { "phase": "Active" } })
}

fn list(items: &[Value]) -> String {
    json!({ "apiVersion": "v1", "kind": "List", "items": items, "metadata": { "resourceVersion": "" } })
        .to_string()
}

/// Exit code and report.
fn audit(flags: &[&str], input: &str) -> (Option<i32>, String) {
    let out = lameduck(&[&["audit"], flags].concat(), input);
    (out.status.code(), text(&out.stdout) + &text(&out.stderr))
}

#[test]
fn every_pod_that_should_have_the_sidecar_is_listed_with_reason_and_remedy() {
    const WEB: (&str, &str) = ("ReplicaSet", "web-6c8d5f7b9c");
    let changed = |mut pod: Value, change: fn(&mut Value)| {
        change(&mut pod);
        pod
    };
    let good = format!("registry.example/lameduck:{TAG}");
    let pods = [
        live("shop", WEB, "web-1"),
        live("shop", WEB, "web-2"),
        with_sidecar(&live("shop", WEB, "web-3"), &good),
        with_sidecar(&live("shop", WEB, "web-4"), "registry.example/lameduck:0.0.1"),
        changed(live("shop", ("StatefulSet", "db"), "db-0"), |pod| pod["spec"]["hostNetwork"] = true.into()),
        changed(live("shop", ("Job", "report"), "report-x"), |pod| {
            pod["spec"]["restartPolicy"] = "Never".into();
        }),
        changed(live("shop", ("DaemonSet", "logs"), "logs-y"), |pod| {
            pod["metadata"]["labels"]["lameduck.dev/inject"] = "disabled".into();
        }),
        // They are over, or about to be.
        changed(live("shop", WEB, "web-5"), |pod| pod["status"]["phase"] = "Succeeded".into()),
        changed(live("shop", WEB, "web-6"), |pod| {
            pod["metadata"]["deletionTimestamp"] = "2026-11-29T00:45:00Z".into();
        }),
        // Not opted in, but for a label or an annotation that means to.
        live("bank", ("StatefulSet", "quiet"), "quiet-0"),
        changed(live("bank", ("StatefulSet", "asks"), "asks-0"), |pod| {
            pod["metadata"]["annotations"] = json!({ "lameduck.dev/inject": "enabled" });
        }),
        changed(live("bank", ("StatefulSet", "own"), "own-0"), |pod| {
            pod["metadata"]["labels"]["lameduck.dev/inject"] = "enabled".into();
        }),
        live("kube-system", ("DaemonSet", "proxy"), "proxy-z"),
        changed(live("kube-system", ("DaemonSet", "dns"), "dns-z"), |pod| {
            pod["metadata"]["labels"]["lameduck.dev/inject"] = "enabled".into();
        }),
    ];
    let others = [
        namespace("shop", "enabled"),
        namespace("bank", "true"),
        namespace("kube-system", "enabled"),
        json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet",
            "metadata": { "name": "asks", "namespace": "bank", "labels": { "lameduck.dev/inject": "enabled" } },
            "spec": { "template": { "metadata": { "labels": { "app": "asks" } } } },
        }),
    ];
    let (code, report) = audit(&[], &list(&[&others[..], &pods].concat()));
    let why = "they were created before the label, or while the webhook was away";
    let expected = format!(
        "namespace/bank: lameduck.dev/inject: 'true' is not seen by the webhook: write enabled or disabled
bank: statefulset/asks: label lameduck.dev/inject means nothing here: it belongs on the pod template
bank: statefulset/asks: 1 of 1 pods don't ask for the sidecar: annotation lameduck.dev/inject is not seen by the webhook: make it a label
bank: statefulset/own: 1 of 1 pods have no sidecar: {why}; kubectl -n bank rollout restart statefulset/own
kube-system: daemonset/dns: 1 of 1 pods are left without the sidecar: the webhook leaves out this namespace
shop: daemonset/logs: 1 of 1 pods are left without the sidecar: lameduck.dev/inject is disabled
shop: deployment/web: 2 of 4 pods have no sidecar: {why}; kubectl -n shop rollout restart deployment/web
shop: deployment/web: 1 of 4 pods have the sidecar registry.example/lameduck:0.0.1; kubectl -n shop rollout restart deployment/web
shop: job/report: 1 of 1 pods have no sidecar: {why}; replace them
shop: statefulset/db: 1 of 1 pods are left without the sidecar: hostNetwork: the proxy's ports would be the node's: start the app by `lameduck run` instead
pods with the sidecar: 1, with another version of it: 1, without it although they should have it: 4, left without it: 4
"
    );
    assert_eq!(report, expected);
    assert_eq!(code, Some(1));
}

#[test]
fn exit_code_0_says_that_a_restart_would_change_nothing() {
    let image = format!("registry.example/lameduck:{TAG}");
    let web = live("shop", ("ReplicaSet", "web-6c8d5f7b9c"), "web-1");
    let injected = with_sidecar(&web, &image);
    let input = list(&[namespace("shop", "enabled"), injected.clone()]);
    let (code, report) = audit(&[], &input);
    assert_eq!((code, report.lines().count()), (Some(0), 1), "{report}");
    assert_eq!(audit(&["--image", &image], &input).0, Some(0));
    let pinned = with_sidecar(&web, &format!("{image}@sha256:{}", "0".repeat(64)));
    assert_eq!(audit(&[], &list(&[namespace("shop", "enabled"), pinned])).0, Some(0), "the tag is the same");
    assert_eq!(audit(&["--image", "lameduck:next"], &input).0, Some(1));
    let mut own = web;
    own["metadata"]["annotations"] = json!({ "lameduck.dev/image": "lameduck:mine" });
    let own = list(&[namespace("shop", "enabled"), with_sidecar(&own, "other:1")]);
    assert_eq!(audit(&[], &own).0, Some(0), "its annotation names the image");

    // Outputs one after the other, YAML, and what can't be judged.
    let two = list(&[namespace("shop", "enabled")]) + "\n" + &list(&[injected]);
    assert_eq!(audit(&[], &two).0, Some(0));
    let yaml = "apiVersion: v1\nkind: List\nitems:\n- kind: Pod\n  metadata: {name: x, namespace: shop, labels: \
                {lameduck.dev/inject: enabled}}\n  spec: {containers: [{name: a, image: b, ports: [{name: http, containerPort: 80}]}]}\n";
    let (code, report) = audit(&[], yaml);
    assert!(code == Some(1) && report.contains("shop: pod/x: 1 of 1 pods have no sidecar"), "{report}");
    assert!(report.contains("no namespace is in it"), "{report}");
    for wrong in
        ["", "{", "{\"kind\": \"List\", \"items\": []}", "- a", "[{\"kind\": \"Pod\"}]", "text", "{} [1]"]
    {
        assert_eq!(audit(&[], wrong).0, Some(2), "{wrong}");
    }
}
