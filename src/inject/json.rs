//! Accessors for a pod's JSON.

use serde_json::{Map, Value, json};

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
            "livenessProbe" | "readinessProbe" | "startupProbe" => value.as_object_mut(),
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
