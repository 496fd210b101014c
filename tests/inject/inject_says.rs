//! What `inject` says before the API server, or nobody, would: refused values, mistyped names, times that don't fit.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use super::inject_keeps_every_byte::{done, lameduck, task, text, told};
use crate::common;

use common::pod::{annotated, app, by, patched, placed, pod, settings, sidecar, why};
use lameduck::inject::{PatchSettings, Services, patch};
use serde_json::{Value, json};

const DEPLOYMENT: &str = "apiVersion: apps/v1
kind: Deployment
metadata:
  name: web
spec:
  template:
    metadata:
      labels: {app: web}
    spec:
      containers:
      - {name: web, image: web:1, ports: [{name: http, containerPort: 8080}]}
";

#[test]
fn a_value_that_the_api_server_would_refuse_is_a_reason() {
    for (key, value, reason) in [
        ("image-pull-policy", "never", "'never' is none of Always, IfNotPresent, Never"),
        ("image", "", "'' is not an image"),
        ("cpu-limit", "lots", "'lots' is not a quantity"),
        ("cpu-request", "-1", "'-1' is not a quantity"),
        ("memory-limit", "64MB", "'64MB' is not a quantity"),
        ("memory-request", "1gi", "'1gi' is not a quantity"),
        ("access-log", "yes", "--access-log"),
        ("probe-port", "70000", "'70000' is not a port"),
        ("lame-duck", "long", "long"),
    ] {
        let why = why(&pod(annotated(key, value)));
        assert!(why.contains(reason), "{key}: {why}");
        // Also where nothing is written.
        let annotations = format!("annotations: {{lameduck.dev/{key}: '{value}'}}\n      labels:");
        let text = DEPLOYMENT.replace("labels:", &annotations);
        let (_, report) = done(&text, &task());
        assert!(told(&report).contains("Skipped(") && told(&report).contains(reason), "{}", told(&report));
    }
    let over = why(&pod(|pod| {
        annotated("cpu-request", "1")(pod);
        annotated("cpu-limit", "900m")(pod);
    }));
    assert!(over.contains("cpu-request 1 is over its cpu-limit 900m"), "{over}");
}

#[test]
fn a_quota_gets_the_limits_that_it_demands() {
    let flags = ["--cpu-limit=500m", "--memory-limit=64Mi", "--memory-request=32Mi"];
    let out = lameduck(&[&["inject"], flags.as_slice()].concat(), DEPLOYMENT);
    let after = text(&out.stdout);
    for line in ["cpu: \"500m\"", "memory: \"64Mi\"", "cpu: \"10m\"", "memory: \"32Mi\""] {
        assert!(after.contains(line), "{line}: {after}");
    }
    for wrong in [["--cpu-limit=lots", "not a quantity"], ["--cpu-limit=5m", "cpu-request 10m is over"]] {
        let out = lameduck(&["inject", wrong[0]], "");
        assert_eq!(out.status.code(), Some(2));
        assert!(text(&out.stderr).contains(wrong[1]), "{}", text(&out.stderr));
    }
    let resources = [None, None, Some("1".to_owned()), None];
    let done = patch(&pod(|_| {}), &PatchSettings { resources, ..settings(Services::Unseen) }).unwrap();
    assert_eq!(sidecar(&done)["resources"]["limits"], json!({"cpu": "1"}));
}

#[test]
fn a_mistyped_name_is_told_with_the_right_one() {
    for (key, right) in [
        ("lame_duck", "lame-duck"),
        ("lameduck", "lame-duck"),
        ("garce", "grace"),
        ("Grace", "grace"),
        ("cpu_limits", "cpu-limit"),
        ("pull-policy", "image-pull-policy"),
    ] {
        let done = patched(&pod(annotated(key, "9s")));
        let hint = format!("annotation lameduck.dev/{key} means nothing: do you mean lameduck.dev/{right}?");
        assert_eq!(done.warnings, [hint]);
    }
    let done = patched(&pod(annotated("xyzzy", "1")));
    assert_eq!(done.warnings, ["annotation lameduck.dev/xyzzy means nothing"]);
    let mut before = pod(|_| {});
    before["metadata"]["annotations"]["lame-duck.dev/grace"] = json!("90s");
    before["metadata"]["labels"]["lameduck.dev/grace"] = json!("90s");
    let warnings = patched(&before).warnings;
    let label = "label lameduck.dev/grace means nothing: make it an annotation";
    let prefix = "annotation lame-duck.dev/grace means nothing: the prefix is lameduck.dev/";
    assert_eq!(warnings, [label, prefix]);
    before["metadata"] = json!({"labels": {"lameduck.dev/injct": "enabled"}});
    assert_eq!(
        patched(&before).warnings,
        ["label lameduck.dev/injct means nothing: do you mean lameduck.dev/inject?"]
    );
}

/// Each takes a comparison with all names, and an admission webhook answers for everyone.
#[test]
fn a_pod_of_nothing_but_mistyped_names_gets_a_few_hints() {
    for place in ["annotations", "labels"] {
        let names = (0..1000).map(|n| (format!("lameduck.dev/x{n}"), json!("")));
        let many = Value::Object(names.collect());
        let done = patched(&pod(|pod| pod["metadata"][place] = many.clone()));
        assert_eq!(done.warnings.len(), 20, "{place}");
    }
}

#[test]
fn a_mistyped_name_is_told_of_a_skipped_pod_too() {
    let skipped = why(&placed(|pod| {
        annotated("containers", "app")(pod);
        pod["spec"]["containers"].as_array_mut().unwrap().push(json!({"name": "other", "image": "x"}));
    }));
    let hint = "annotation lameduck.dev/containers means nothing: do you mean lameduck.dev/container?";
    assert!(skipped.contains("several containers") && skipped.ends_with(&format!("; {hint}")), "{skipped}");
    assert_eq!(
        why(&pod(|pod| {
            annotated("garce", "9s")(pod);
            annotated("inject", "disabled")(pod);
        })),
        "lameduck.dev/inject is disabled"
    );
}

#[test]
fn the_label_counts_where_the_webhook_sees_it() {
    let labelled = |value: &str| pod(|pod| pod["metadata"]["labels"]["lameduck.dev/inject"] = json!(value));
    assert_eq!(patched(&labelled("enabled")).warnings, [""; 0]);
    let told_of = |pod: &Value| patched(pod).warnings.join("\n");
    assert!(told_of(&labelled("true")).contains("'true' is not seen by the webhook: write enabled"));
    assert!(told_of(&pod(annotated("inject", "enabled"))).contains("by the webhook: make it a label"));
    // Whoever writes this wants no sidecar.
    for no in ["false", "no", "Off"] {
        assert!(why(&labelled(no)).contains(&format!("'{no}': write disabled")));
        assert!(why(&pod(annotated("inject", no))).contains("write disabled"));
    }
    let on_the_deployment = "  name: web\n  labels: {lameduck.dev/inject: enabled}\n  annotations: {lameduck.dev/grace: 90s, lame-duck.dev/x: y}\n";
    let (_, report) = done(&DEPLOYMENT.replace("  name: web\n", on_the_deployment), &task());
    for what in ["label lameduck.dev/inject", "annotation lameduck.dev/grace"] {
        let hint = format!("{what} means nothing here: it belongs on the pod template");
        assert!(told(&report).contains(&hint), "{hint}: {}", told(&report));
    }
    let near = "annotation lame-duck.dev/x means nothing: the prefix is lameduck.dev/, and it belongs on the pod template";
    assert!(told(&report).contains(near), "{}", told(&report));
}

#[test]
fn a_lame_duck_takes_no_more_than_a_third_of_the_drain() {
    let warnings = |keys: &[(&str, &str)]| {
        patched(&pod(|pod| keys.iter().for_each(|(key, value)| annotated(key, value)(pod)))).warnings
    };
    // 60 s of grace without 5 s of reserve.
    assert_eq!(warnings(&[("lame-duck", "18s")]), [""; 0]);
    let long = "its lame duck of 19s is over a third of the 55s for the whole drain and is kept, so that running work gets \
                only 36s: write lameduck.dev/grace: 62s";
    assert_eq!(warnings(&[("lame-duck", "19s")]), [long]);
    assert_eq!(warnings(&[("lame-duck", "19s"), ("grace", "62s")]), [""; 0]);
    assert_eq!(warnings(&[("lame-duck", "19s"), ("reserve", "500ms"), ("grace", "1m")]), [""; 0]);
    let sleeps = pod(|pod| app(pod)["lifecycle"] = json!({"preStop": {"sleep": {"seconds": 25}}}));
    assert!(patched(&sleeps).warnings[0].contains("its lame duck of 25s is over"), "the app's own sleep");
    let (_, report) = done(
        &DEPLOYMENT.replace("labels:", "annotations: {lameduck.dev/lame-duck: 50s}\n      labels:"),
        &task(),
    );
    assert!(told(&report).contains("50s is over a third of the 55s"), "{}", told(&report));
    assert!(told(&report).contains("gets only 5s: write lameduck.dev/grace: 155s"), "{}", told(&report));
    let low = "annotation lameduck.dev/grace: 8s changes nothing, as the pod has 30s and keeps them";
    assert_eq!(warnings(&[("grace", "8s")]), [low]);
    let why = why(&pod(|pod| {
        pod["spec"]["terminationGracePeriodSeconds"] = json!(8);
        annotated("grace", "8s")(pod);
    }));
    assert!(why.contains("leaves no time for running work"), "{why}");
}

/// A controller drops the warnings of its pods.
#[test]
fn the_webhook_writes_its_warnings_on_the_pod() {
    let before = pod(annotated("garce", "9s"));
    let done = by(&before, Services::Unseen);
    let written = done.pod["metadata"]["annotations"]["lameduck.dev/warnings"].as_str().unwrap();
    assert_eq!(written, done.warnings.join("\n"));
    assert!(done.warnings.len() == 1 && written.contains("do you mean lameduck.dev/grace?"));
    assert!(patched(&before).pod["metadata"]["annotations"].get("lameduck.dev/warnings").is_none());
    // It is ours: the CLI takes it away again.
    let again = patch(&done.pod, &settings(Services::Seen)).unwrap();
    assert!(again.pod["metadata"]["annotations"].get("lameduck.dev/warnings").is_none());
    assert_eq!(again.warnings.len(), 1);
}

#[test]
fn check_says_would_and_strict_exits_with_1() {
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{port: 8080}]}\n";
    let placed = "labels: {app: web}\n      annotations: {lameduck.dev/capture: port-name}";
    let both = DEPLOYMENT.replace("labels: {app: web}", placed) + service;
    for flag in ["--check", "--diff"] {
        let report = text(&lameduck(&["inject", flag], &both).stderr);
        assert!(report.contains("deployment/web: would be injected"), "{report}");
        assert!(report.contains("service/web: would lead to the port by its name"), "{report}");
    }
    let injected = text(&lameduck(&["inject"], DEPLOYMENT).stdout);
    let report = text(&lameduck(&["uninject", "--check"], &injected).stderr);
    assert!(report.contains("deployment/web: would be taken out"), "{report}");
    let strict = |text: &str| lameduck(&["inject", "--strict"], text).status.code();
    assert_eq!(strict(DEPLOYMENT), Some(0));
    assert_eq!(strict(&injected), Some(0));
    assert_eq!(strict(&DEPLOYMENT.replace("image: web:1, ", "")), Some(1));
    assert_eq!(strict(&DEPLOYMENT.replace("app: web", "lameduck.dev/inject: disabled")), Some(0));
    assert_eq!(strict("a: ["), Some(2));
}
