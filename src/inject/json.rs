//! Accessors for a pod's JSON.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::names::{PROBES, SHARE_DIR};

/// Containers of a pod.
pub fn containers(spec: &Map<String, Value>) -> impl Iterator<Item = &Map<String, Value>> {
    spec.get("containers").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_object)
}

/// Init containers of a pod that run beside the others to the end: native sidecars.
pub fn native_sidecars(spec: &Map<String, Value>) -> impl Iterator<Item = &Map<String, Value>> {
    let all = spec.get("initContainers").and_then(Value::as_array).into_iter().flatten();
    all.filter_map(Value::as_object)
        .filter(|container| container.get("restartPolicy").is_some_and(|policy| policy == "Always"))
}

/// Whether the container already has a mount at our directory.
pub fn mounted(container: &Map<String, Value>) -> bool {
    let mounts = container.get("volumeMounts").and_then(Value::as_array).into_iter().flatten();
    mounts.into_iter().any(|mount| mount["mountPath"] == SHARE_DIR)
}

/// Ports of a container.
pub fn ports(container: &Map<String, Value>) -> impl Iterator<Item = &Value> {
    container.get("ports").and_then(Value::as_array).into_iter().flatten().filter(|port| port.is_object())
}

/// Whether a container port is a TCP port, which is the default.
pub fn is_tcp(port: &Map<String, Value>) -> bool {
    port.get("protocol").is_none_or(|protocol| protocol.is_null() || protocol == "TCP")
}

/// Entry of an environment variable of a container.
pub fn env<'a>(container: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    container.get("env")?.as_array()?.iter().rfind(|var| var["name"] == name)
}

/// The list `key`, created if it is missing.
///
/// # Errors
/// `key` has a value of another type.
pub fn list<'a>(parent: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Vec<Value>, String> {
    let list = parent.entry(key).or_insert(Value::Null);
    if list.is_null() {
        *list = json!([]);
    }
    list.as_array_mut().ok_or_else(|| format!("its {key} is not a list"))
}

/// Requests that the kubelet sends to a port of the app, each with its location: probes and the postStart hook.
pub fn probes(app: &mut Map<String, Value>) -> Vec<(String, &mut Map<String, Value>)> {
    let mut found = Vec::new();
    for (key, value) in app {
        let handlers = match key.as_str() {
            key if PROBES.contains(&key) => value.as_object_mut(),
            "lifecycle" => value.get_mut("postStart").and_then(Value::as_object_mut),
            _ => continue,
        };
        for (kind, handler) in handlers.into_iter().flatten() {
            if let Some(handler) = handler.as_object_mut().filter(|handler| handler.contains_key("port")) {
                found.push((format!("{key}.{kind}"), handler));
            }
        }
    }
    found
}

/// The object `key`, created if it is missing.
///
/// # Errors
/// `key` has a value of another type.
pub fn object<'a>(
    parent: &'a mut Map<String, Value>,
    key: &str,
) -> Result<&'a mut Map<String, Value>, String> {
    let value = parent.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut().ok_or_else(|| format!("its {key} is not an object"))
}

fn is_empty(value: &Value) -> bool {
    value.is_null()
        || value.as_array().is_some_and(Vec::is_empty)
        || value.as_object().is_some_and(Map::is_empty)
}

/// Those of these members that are null or empty.
pub fn empties(parent: Option<&Map<String, Value>>, keys: &[&str]) -> BTreeMap<String, Value> {
    let found = keys.iter().filter_map(|key| Some((*key, parent?.get(*key)?)));
    found.filter(|(_, value)| is_empty(value)).map(|(key, value)| (key.to_owned(), value.clone())).collect()
}

/// Puts null and empty values back, where nothing stands in their place.
pub fn put_empties_back(parent: &mut Map<String, Value>, keys: &[&str], empty: &BTreeMap<String, Value>) {
    for key in keys {
        if let Some(was) = empty.get(*key)
            && parent.get(*key).is_none_or(is_empty)
        {
            parent.insert((*key).to_owned(), was.clone());
        }
    }
}

/// Removes elements of a list, and the list if that was all.
pub fn take_out(parent: &mut Map<String, Value>, key: &str, ours: impl Fn(&Value) -> bool) {
    let Some(items) = parent.get_mut(key).and_then(Value::as_array_mut) else { return };
    let before = items.len();
    items.retain(|item| !ours(item));
    if items.is_empty() && before > 0 {
        parent.remove(key);
    }
}

/// Sets a member, or removes it.
pub fn put_back(parent: &mut Map<String, Value>, key: &str, was: Option<Value>) {
    match was {
        Some(was) => drop(parent.insert(key.to_owned(), was)),
        None => drop(parent.remove(key)),
    }
}

/// Whether a pod is to complete, as a Job's are: Kubernetes restarts the containers of all others.
pub fn completes(spec: &Map<String, Value>) -> bool {
    spec.get("restartPolicy").is_some_and(|policy| policy == "Never" || policy == "OnFailure")
}

/// Name of the Deployment behind a pod's controller that is its ReplicaSet. A Deployment names these by itself and the
/// hash of the pod template, which is a label of their pods.
pub fn deployment(owner: &Value, labels: &Value) -> Option<String> {
    let name = owner["name"].as_str().filter(|_| owner["kind"] == "ReplicaSet")?;
    let hash = labels["pod-template-hash"].as_str()?;
    Some(name.strip_suffix(hash)?.strip_suffix('-')?.to_owned())
}
