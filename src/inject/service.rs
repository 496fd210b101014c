//! Replaces a Service's numeric target port with the port's name, which resolves per pod and so leads to the proxy.
//! Pure.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::json::{is_tcp, object};
use super::names::INJECTED;

/// Key of the record for annotations that were null or empty; the other keys are ports.
const EMPTY: &str = "annotations";

/// The Service as it was before an injection.
///
/// # Errors
/// The record can't be parsed.
pub fn restored(service: &Value) -> Result<Value, String> {
    let Some(text) = service["metadata"]["annotations"][INJECTED].as_str() else {
        return Ok(service.clone());
    };
    let record: BTreeMap<String, Value> = serde_json::from_str(text)
        .map_err(|error| format!("annotation {INJECTED} can't be read: {error}"))?;
    let mut new = service.clone();
    // A number was written by the owner after the injection, so it stays.
    for port in ports_mut(&mut new).filter(|port| port.get("targetPort").is_some_and(Value::is_string)) {
        match record.get(&key(port)) {
            Some(Value::Null) => drop(port.remove("targetPort")),
            Some(number) => drop(port.insert("targetPort".to_owned(), number.clone())),
            None => {}
        }
    }
    if let Some(metadata) = new.get_mut("metadata").and_then(Value::as_object_mut) {
        let annotations = object(metadata, "annotations")?;
        annotations.remove(INJECTED);
        match record.get(EMPTY) {
            _ if !annotations.is_empty() => {}
            Some(was) => drop(metadata.insert("annotations".to_owned(), was.clone())),
            None => drop(metadata.remove("annotations")),
        }
    }
    Ok(new)
}

/// Whether an injection has changed the Service.
pub fn is_changed(service: &Value) -> bool {
    service["metadata"]["annotations"][INJECTED].is_string()
}

/// Target ports of the Service that are names.
pub fn names(service: &Value) -> Vec<&str> {
    tcp_ports(service).filter_map(|port| port["targetPort"].as_str()).collect()
}

/// Numeric target ports of the Service.
pub fn numbers(service: &Value) -> Vec<u16> {
    let ports = service["spec"]["ports"].as_array().into_iter().flatten();
    ports.filter_map(Value::as_object).filter_map(target).collect()
}

/// The Service, as its owner wrote it, with target ports of this number replaced by the name.
///
/// # Errors
/// The record can't be added to its annotations.
pub fn retargeted(service: &Value, number: u16, name: &str) -> Result<Value, String> {
    let mut new = service.clone();
    let mut record: BTreeMap<String, Value> = service["metadata"]["annotations"][INJECTED]
        .as_str()
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default();
    for port in ports_mut(&mut new).filter(|port| target(port) == Some(number)) {
        let was = port.insert("targetPort".to_owned(), json!(name));
        record.insert(key(port), was.unwrap_or(Value::Null));
    }
    let metadata = object(new.as_object_mut().ok_or("it is not an object")?, "metadata")?;
    if let Some(empty) = metadata.get("annotations").filter(|all| all.is_null() || **all == json!({})) {
        record.insert(EMPTY.to_owned(), empty.clone());
    }
    let record = serde_json::to_string(&record).map_err(|error| error.to_string())?;
    object(metadata, "annotations")?.insert(INJECTED.to_owned(), json!(record));
    Ok(new)
}

/// TCP ports of the Service.
pub fn tcp_ports(service: &Value) -> impl Iterator<Item = &Value> {
    let ports = service["spec"]["ports"].as_array().into_iter().flatten();
    ports.filter(|port| port.as_object().is_some_and(is_tcp))
}

/// Whether the Service selects pods with these labels. Kubernetes ignores the selector of an ExternalName.
pub fn selects(service: &Value, labels: &Map<String, Value>) -> bool {
    let selector =
        service["spec"]["selector"].as_object().filter(|_| service["spec"]["type"] != "ExternalName");
    selector
        .is_some_and(|all| !all.is_empty() && all.iter().all(|(key, value)| labels.get(key) == Some(value)))
}

fn ports_mut(service: &mut Value) -> impl Iterator<Item = &mut Map<String, Value>> {
    let ports = service.pointer_mut("/spec/ports").and_then(Value::as_array_mut);
    ports.into_iter().flatten().filter_map(Value::as_object_mut)
}

/// Target of a TCP port if it is numeric; the default is the port itself.
fn target(port: &Map<String, Value>) -> Option<u16> {
    let number = match port.get("targetPort") {
        None | Some(Value::Null) => port.get("port"),
        some => some,
    };
    number.and_then(Value::as_u64).and_then(|n| u16::try_from(n).ok()).filter(|_| is_tcp(port))
}

/// Identifies a port: a Service has each combination of port and protocol once.
fn key(port: &Map<String, Value>) -> String {
    let protocol = port.get("protocol").and_then(Value::as_str).unwrap_or("TCP");
    format!("{}/{protocol}", port.get("port").unwrap_or(&Value::Null))
}
