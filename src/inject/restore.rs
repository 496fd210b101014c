//! Restores a pod to its state before the injection. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::capture;
use super::hooks;
use super::json::{empties, env, is_tcp, object, probes, put_back, put_empties_back, take_out};
use super::model::{Plan, Written};
use super::names::{INJECTED, SIDECAR, WARNINGS, preload_option};

/// Record of the values that an injection changed, stored in the pod's `lameduck.dev/injected` annotation.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Undo {
    /// What a capture changed, instead of the values of the one container whose port was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub captured: Option<capture::CaptureUndo>,
    /// Name of the app's container.
    #[serde(default, skip_serializing_if = "String::is_empty")]
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
    /// New port of the probes; 0 if they keep theirs.
    #[serde(default, skip_serializing_if = "is_zero")]
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
    /// Record for a pod that has not been changed yet.
    pub fn of(pod: &Map<String, Value>) -> Self {
        let spec = pod.get("spec").and_then(Value::as_object);
        let metadata = pod.get("metadata").and_then(Value::as_object);
        let mut empty = empties(Some(pod), &["metadata"]);
        empty.extend(empties(metadata, &["annotations"]));
        empty.extend(empties(spec, &SPEC));
        let grace = spec.and_then(|spec| spec.get("terminationGracePeriodSeconds")?.as_u64());
        Self { grace, empty, ..Self::default() }
    }

    /// The same with its app, whose port the proxy takes.
    pub fn with(mut self, app: &Map<String, Value>, plan: &Plan, probe: u16) -> Self {
        let lifecycle = app.get("lifecycle").and_then(Value::as_object);
        self.container = app.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        self.moved = plan.moved.then_some((plan.was, plan.listen));
        let options = env(app, "NODE_OPTIONS");
        self.options = options.filter(|var| var["value"].as_str().is_none_or(str::is_empty)).cloned();
        self.port = (!plan.moved).then(|| (plan.app.variable(), env(app, "PORT").cloned()));
        self.app = plan.app.port().unwrap_or(probe);
        let pre_stop = lifecycle.and_then(|lifecycle| lifecycle.get("preStop"));
        self.pre_stop = pre_stop.filter(|hook| !hook.is_null()).cloned();
        self.empty.extend(empties(Some(app), &APP));
        self.empty.extend(empties(lifecycle, &["preStop"]));
        self
    }
}

/// Members that an injection adds to, or creates.
const SPEC: [&str; 4] =
    ["initContainers", "volumes", "terminationGracePeriodSeconds", "shareProcessNamespace"];
const APP: [&str; 3] = ["lifecycle", "env", "volumeMounts"];

fn is_zero(port: &u16) -> bool {
    *port == 0
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
    put_empties_back(&mut new, &["metadata"], &record.empty);
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
    put_empties_back(spec, &SPEC, &record.empty);
    if let Some(captured) = &record.captured {
        capture::restore(spec, captured);
    }
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
    put_empties_back(metadata, &["annotations"], &record.empty);
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
    hooks::restore(app, record.pre_stop.as_ref(), &record.empty);
    take_out(app, "volumeMounts", |mount| mount["name"] == SIDECAR);
    restore_env(app, record);
    put_empties_back(app, &APP, &record.empty);
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
