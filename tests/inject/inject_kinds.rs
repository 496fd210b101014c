//! Which objects `inject` takes for workloads, and what it says of all others that have pods.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use super::inject_keeps_every_byte::{done, lameduck, task, text, told};
use lameduck::inject::manifest::{Outcome, Task};

/// An object of this kind with a pod template at this path.
fn object(version: &str, kind: &str, path: &str) -> String {
    let mut text = format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: web}}\n");
    let mut indent = 0;
    for key in path.split('.') {
        text += &format!("{:indent$}{key}:\n", "");
        indent += 2;
    }
    for line in [
        "metadata: {labels: {app: web}}",
        "spec:",
        "  containers:",
        "  - {name: web, image: web:1, ports: [{name: http, containerPort: 8080}]}",
    ] {
        text += &format!("{:indent$}{line}\n", "");
    }
    text
}

#[test]
fn workloads_of_other_makers_are_known() {
    for (version, kind, path) in [
        ("argoproj.io/v1alpha1", "Rollout", "spec.template"),
        ("apps.openshift.io/v1", "DeploymentConfig", "spec.template"),
        ("v1", "DeploymentConfig", "spec.template"),
        ("v1", "PodTemplate", "template"),
        ("apps.kruise.io/v1alpha1", "CloneSet", "spec.template"),
        ("apps.kruise.io/v1beta1", "StatefulSet", "spec.template"),
        ("apps.kruise.io/v1alpha1", "DaemonSet", "spec.template"),
        ("apps.kruise.io/v1alpha1", "BroadcastJob", "spec.template"),
        ("apps.kruise.io/v1alpha1", "AdvancedCronJob", "spec.template.broadcastJobTemplate.spec.template"),
        ("apps.kruise.io/v1alpha1", "UnitedDeployment", "spec.template.cloneSetTemplate.spec.template"),
    ] {
        let before = object(version, kind, path);
        let (after, report) = done(&before, &task());
        assert_eq!(report[0].outcome, Outcome::Changed, "{kind}: {}", told(&report));
        assert_eq!(done(&after, &Task::Uninject).0, before, "{kind}");
    }
}

#[test]
fn an_unknown_kind_with_a_pod_template_is_told_and_can_be_named() {
    let before = object("example.com/v1", "Fleet", "spec.pods.template");
    let (after, report) = done(&before, &task());
    assert_eq!(after, before);
    let why = "skipped: kind Fleet is not known: if spec.pods.template is its pod template, say \
               --kind Fleet=spec.pods.template";
    let out = lameduck(&["inject"], &before);
    assert!(text(&out.stderr).contains(why), "{}: {}", told(&report), text(&out.stderr));
    let out = lameduck(&["inject", "--kind", "Fleet=spec.pods.template"], &before);
    let after = text(&out.stdout);
    assert!(after.contains("name: lameduck"), "{}", text(&out.stderr));
    assert_eq!(text(&lameduck(&["uninject"], &after).stdout), before, "which needs no --kind");
    for wrong in ["Fleet", "Fleet=", "=spec", "Fleet=spec..x", "Fleet=spec/x"] {
        assert_eq!(lameduck(&["inject", "--kind", wrong], "").status.code(), Some(2), "{wrong}");
    }
    // A definition of a kind, or a list of patterns, has no pod template.
    let crd = "kind: CustomResourceDefinition\napiVersion: x/v1\nspec:\n  containers: {type: array}\n";
    assert_eq!(done(crd, &task()).1, []);
    let referring = "apiVersion: argoproj.io/v1alpha1\nkind: Rollout\nspec: {workloadRef: {name: x}}\n";
    assert_eq!(done(referring, &task()).1, []);
}

#[test]
fn what_must_not_be_injected_says_why() {
    let skipped = |text: &str, why: &str| {
        let (after, report) = done(text, &task());
        assert_eq!(after, text);
        assert!(
            matches!(&report[0].outcome, Outcome::Skipped(told) if told.contains(why)),
            "{}",
            told(&report)
        );
    };
    for kind in ["Service", "Configuration"] {
        skipped(&object("serving.knative.dev/v1", kind, "spec.template"), "queue-proxy");
    }
    let template = "apiVersion: template.openshift.io/v1\nkind: Template\nobjects:\n";
    assert_eq!(done(template, &task()).1, []);
    skipped(&format!("{template}- apiVersion: v1\n  kind: Pod\n"), "oc process");
    let fragment = object("apps/v1", "Deployment", "spec.template").replace(" image: web:1,", "");
    skipped(&fragment, "no image: a fragment");
}
