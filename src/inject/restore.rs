//! Restores a pod to its state before the injection. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::hooks;
use super::json::{env, is_tcp, object, probes};
use super::model::{Plan, Written};
use super::names::{INJECTED, SIDECAR, WARNINGS, preload_option};

/// Record of the values that an injection changed, stored in the pod's `lameduck.dev/injected` annotation.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Undo {
    /// Name of the app's container.
    pub container: String,
    /// If the app's port name was moved to the proxy: the app's port number, and the proxy's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moved: Option<(u16, u16)>,
    /// Otherwise `PORT`: its new value, and its original entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<(Value, Option<Value>)>,
    /// `NODE_OPTIONS`, if it was present and empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<Value>,
    /// Original ports of the probes that changed; with the path, if that changed too.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub probes: BTreeMap<String, Value>,
    /// New port of the probes.
    pub app: u16,
    /// Original preStop hook, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pre_stop: Option<Value>,
    /// Original terminationGracePeriodSeconds, if it was set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grace: Option<u64>,
    /// Original values of the annotations that changed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub annotations: Vec<(String, Option<String>)>,
    /// Set if shareProcessNamespace was switched on: whether it was present before, as false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared: Option<bool>,
    /// Values that were null or empty and got members, by their key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub empty: BTreeMap<String, Value>,
    /// Source text of the replaced values, by their location in the pod, if it was a manifest.
    #[serde(default, skip_serializing_if = "Written::is_empty")]
    pub written: Written,
}

impl Undo {
    /// Record for an app that has not been changed yet.
    pub fn of(pod: &Map<String, Value>, app: &Map<String, Value>, plan: &Plan) -> Self {
        let grace = pod.get("spec").and_then(|spec| spec["terminationGracePeriodSeconds"].as_u64());
        let pre_stop = app.get("lifecycle").and_then(|lifecycle| lifecycle.get("preStop"));
        Self {
            container: app.get("name").and_then(Value::as_str).unwrap_or_default().to_owned(),
            moved: plan.moved.then_some((plan.was, plan.listen)),
            options: env(app, "NODE_OPTIONS")
                .filter(|var| var["value"].as_str().is_none_or(str::is_empty))
                .cloned(),
            port: (!plan.moved).then(|| (plan.app.variable(), env(app, "PORT").cloned())),
            app: plan.app.port().unwrap_or(plan.probe),
            pre_stop: pre_stop.filter(|hook| !hook.is_null()).cloned(),
            grace,
            empty: empties(pod, app),
            ..Self::default()
        }
    }
}

/// Null and empty values to which an injection adds.
fn empties(pod: &Map<String, Value>, app: &Map<String, Value>) -> BTreeMap<String, Value> {
    let inner = |of: &Map<String, Value>, key: &str| of.get(key).and_then(Value::as_object).cloned();
    let (spec, lifecycle) = (inner(pod, "spec"), inner(app, "lifecycle"));
    let metadata = inner(pod, "metadata");
    let of = |map: Option<&Map<String, Value>>, keys: &[&str]| -> Vec<(String, Value)> {
        let found = keys.iter().filter_map(|key| Some((*key, map?.get(*key)?)));
        found
            .filter(|(_, value)| is_empty(value))
            .map(|(key, value)| (key.to_owned(), value.clone()))
            .collect()
    };
    [
        of(Some(pod), &["metadata"]),
        of(metadata.as_ref(), &["annotations"]),
        of(spec.as_ref(), &SPEC),
        of(Some(app), &APP),
        of(lifecycle.as_ref(), &["preStop"]),
    ]
    .concat()
    .into_iter()
    .collect()
}

const SPEC: [&str; 4] =
    ["initContainers", "volumes", "terminationGracePeriodSeconds", "shareProcessNamespace"];
const APP: [&str; 3] = ["lifecycle", "env", "volumeMounts"];

fn is_empty(value: &Value) -> bool {
    value.is_null()
        || value.as_array().is_some_and(Vec::is_empty)
        || value.as_object().is_some_and(Map::is_empty)
}

impl Undo {
    /// Puts null and empty values back, where nothing stands in their place.
    fn put_empties_back(&self, parent: &mut Map<String, Value>, keys: &[&str]) {
        for key in keys {
            if let Some(was) = self.empty.get(*key)
                && parent.get(*key).is_none_or(is_empty)
            {
                parent.insert((*key).to_owned(), was.clone());
            }
        }
    }
}

/// Whether the pod has the record of an injection.
pub fn is_injected(pod: &Value) -> bool {
    pod["metadata"]["annotations"][INJECTED].is_string()
}

/// Source texts in the pod's record.
pub fn sources(pod: &Value) -> Written {
    let text = pod["metadata"]["annotations"][INJECTED].as_str();
    let record: Option<Undo> = text.and_then(|text| serde_json::from_str(text).ok());
    record.map(|record| record.written).unwrap_or_default()
}

/// Adds source texts to the pod's record.
pub fn keep_sources(pod: &mut Value, sources: Written) {
    let text = pod["metadata"]["annotations"][INJECTED].as_str();
    let Some(mut record) = text.and_then(|text| serde_json::from_str::<Undo>(text).ok()) else { return };
    record.written = sources;
    if let Ok(text) = serde_json::to_string(&record) {
        pod["metadata"]["annotations"][INJECTED] = json!(text);
    }
}

/// The pod without the sidecar; unchanged if it has none. Changes that the owner made since the injection are kept.
///
/// # Errors
/// The record can't be parsed, or no longer matches the pod.
pub fn restored(pod: &Value) -> Result<Map<String, Value>, String> {
    let mut new = pod.as_object().ok_or("it is not an object")?.clone();
    let Some(text) = pod["metadata"]["annotations"][INJECTED].as_str() else { return Ok(new) };
    let record: Undo = serde_json::from_str(text)
        .map_err(|error| format!("annotation {INJECTED} can't be read: {error}"))?;
    annotations(object(&mut new, "metadata")?, &record)?;
    if new.get("metadata") == Some(&json!({})) {
        new.remove("metadata");
    }
    record.put_empties_back(&mut new, &["metadata"]);
    let spec = object(&mut new, "spec")?;
    let set = sidecar_grace(spec);
    for key in ["initContainers", "containers", "volumes"] {
        take_out(spec, key, |item| item["name"] == SIDECAR);
    }
    if spec.get("terminationGracePeriodSeconds").and_then(Value::as_u64) == set {
        put_back(spec, "terminationGracePeriodSeconds", record.grace.map(Value::from));
    }
    if let Some(written) = record.shared {
        put_back(spec, "shareProcessNamespace", written.then_some(Value::Bool(false)));
    }
    record.put_empties_back(spec, &SPEC);
    let all = spec.get_mut("containers").and_then(Value::as_array_mut).into_iter().flatten();
    let app = all.filter_map(Value::as_object_mut).find(|c| c.get("name") == Some(&json!(record.container)));
    if let Some(app) = app {
        restore_app(app, &record);
    }
    Ok(new)
}

/// Grace period in the sidecar's arguments.
fn sidecar_grace(spec: &Map<String, Value>) -> Option<u64> {
    let lists = [spec.get("initContainers"), spec.get("containers")];
    let mut all = lists.into_iter().flatten().filter_map(Value::as_array).flatten();
    let args = all.find(|container| container["name"] == SIDECAR)?["args"].as_array()?;
    let grace = args.iter().filter_map(Value::as_str).find_map(|arg| arg.strip_prefix("--grace="))?;
    grace.strip_suffix('s')?.parse().ok()
}

fn annotations(metadata: &mut Map<String, Value>, record: &Undo) -> Result<(), String> {
    let annotations = object(metadata, "annotations")?;
    annotations.remove(INJECTED);
    annotations.remove(WARNINGS);
    for (key, was) in &record.annotations {
        put_back(annotations, key, was.as_ref().map(|was| json!(was)));
    }
    if annotations.is_empty() {
        metadata.remove("annotations");
    }
    record.put_empties_back(metadata, &["annotations"]);
    Ok(())
}

fn restore_app(app: &mut Map<String, Value>, record: &Undo) {
    if let Some((was, now)) = record.moved {
        let ports = app.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten();
        for port in ports
            .filter_map(Value::as_object_mut)
            .filter(|p| p.get("containerPort") == Some(&json!(now)) && is_tcp(p))
        {
            port.insert("containerPort".to_owned(), json!(was));
        }
    }
    for (place, handler) in probes(app) {
        let Some(was) = record.probes.get(&place) else { continue };
        if handler.get("port") != Some(&json!(record.app)) {
            continue;
        }
        match was.get("port") {
            Some(port) => {
                handler.insert("port".to_owned(), port.clone());
                put_back(handler, "path", was.get("path").filter(|path| !path.is_null()).cloned());
            }
            None => drop(handler.insert("port".to_owned(), was.clone())),
        }
    }
    if let Some(lifecycle) = app.get_mut("lifecycle").and_then(Value::as_object_mut) {
        if lifecycle.get("preStop").is_some_and(hooks::is_ours) {
            put_back(lifecycle, "preStop", record.pre_stop.clone());
            record.put_empties_back(lifecycle, &["preStop"]);
        }
        if lifecycle.is_empty() {
            app.remove("lifecycle");
        }
    }
    take_out(app, "volumeMounts", |mount| mount["name"] == SIDECAR);
    restore_env(app, record);
    record.put_empties_back(app, &APP);
}

fn restore_env(app: &mut Map<String, Value>, record: &Undo) {
    let Some(vars) = app.get_mut("env").and_then(Value::as_array_mut) else { return };
    let text = record.port.as_ref().map(|(set, _)| set.as_str().map_or(set.to_string(), str::to_owned));
    let text = text.unwrap_or_default();
    if let Some((_, was)) = &record.port
        && let Some(n) = vars.iter().rposition(|var| var["name"] == "PORT" && var["value"] == text)
    {
        match was {
            Some(was) => vars[n] = was.clone(),
            None => drop(vars.remove(n)),
        }
    }
    let options = vars.iter().rposition(|var| var["name"] == "NODE_OPTIONS");
    if let Some(n) = options
        && let Some(text) = vars[n]["value"].as_str()
        && let Some(rest) = text.strip_suffix(&preload_option())
    {
        match rest.strip_suffix(' ') {
            Some(rest) => vars[n]["value"] = json!(rest),
            None => match &record.options {
                Some(was) => vars[n] = was.clone(),
                None => drop(vars.remove(n)),
            },
        }
    }
    if vars.is_empty() {
        app.remove("env");
    }
}

fn take_out(parent: &mut Map<String, Value>, key: &str, ours: impl Fn(&Value) -> bool) {
    let Some(items) = parent.get_mut(key).and_then(Value::as_array_mut) else { return };
    let before = items.len();
    items.retain(|item| !ours(item));
    if items.is_empty() && before > 0 {
        parent.remove(key);
    }
}

fn put_back(parent: &mut Map<String, Value>, key: &str, was: Option<Value>) {
    match was {
        Some(was) => drop(parent.insert(key.to_owned(), was)),
        None => drop(parent.remove(key)),
    }
}
