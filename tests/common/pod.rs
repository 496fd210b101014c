//! Pods for the tests of the patch, and accessors.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use lameduck::cli::{annotated_flags, check_proxy};
use lameduck::inject::Services;
use lameduck::inject::{Patch, PatchSettings, Skip, patch, restore};
use serde_json::{Value, json};

/// The webhook's or the CLI's settings.
pub fn settings(services: Services) -> PatchSettings {
    let image = "lameduck:test".to_owned();
    PatchSettings {
        image,
        pull_policy: Some("Never".to_owned()),
        resources: Default::default(),
        token: "t0ken".to_owned(),
        service_ports: vec![],
        services,
        check: check_proxy,
        flags: annotated_flags,
    }
}

/// A pod with one container and one named port.
pub fn pod(change: impl Fn(&mut Value)) -> Value {
    let mut pod = json!({
        "metadata": {"labels": {"app": "x"}, "annotations": {}},
        "spec": {"containers": [{
            "name": "app", "image": "x", "ports": [{"name": "http", "containerPort": 3000}],
        }]},
    });
    change(&mut pod);
    pod
}

/// The same, where annotations place the proxy instead of a capture.
pub fn placed(change: impl Fn(&mut Value)) -> Value {
    pod(|pod| {
        annotated("proxy-port", "4880")(pod);
        change(pod);
    })
}

/// Its container.
pub fn app(pod: &mut Value) -> &mut Value {
    &mut pod["spec"]["containers"][0]
}

/// Adds a `lameduck.dev/` annotation.
pub fn annotated(key: &str, value: &str) -> impl Fn(&mut Value) {
    move |pod| pod["metadata"]["annotations"][format!("lameduck.dev/{key}")] = json!(value)
}

/// The patched pod. Also checks that patching twice changes nothing, and that removal restores the pod.
pub fn patched(pod: &Value) -> Patch {
    by(pod, Services::Seen)
}

/// The same with the settings of the webhook or the CLI.
pub fn by(pod: &Value, services: Services) -> Patch {
    let done = patch(pod, &settings(services)).unwrap();
    assert_eq!(patch(&done.pod, &settings(services)).unwrap().ops, [], "twice");
    let mut back = Value::Object(restore::restored(&done.pod).unwrap());
    let annotations = pod["metadata"]["annotations"].as_object();
    if annotations.is_some_and(serde_json::Map::is_empty) {
        back["metadata"]["annotations"] = json!({});
    }
    assert_eq!(&back, pod, "and back");
    done
}

/// Reason why the pod is skipped.
pub fn why(pod: &Value) -> String {
    let Err(Skip(why)) = patch(pod, &settings(Services::Seen)) else { panic!("injected: {pod}") };
    why
}

/// The sidecar's container.
pub fn sidecar(patch: &Patch) -> &Value {
    let lists = [&patch.pod["spec"]["initContainers"], &patch.pod["spec"]["containers"]];
    let mut all = lists.into_iter().filter_map(Value::as_array).flatten();
    all.find(|container| container["name"] == "lameduck").unwrap()
}

/// Whether the sidecar has this argument.
pub fn has(patch: &Patch, arg: &str) -> bool {
    sidecar(patch)["args"].as_array().unwrap().iter().any(|a| a == arg)
}
