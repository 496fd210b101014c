//! Transforms manifests: documents, Lists, workloads and the Services that select them. No file access.

use serde_json::{Map, Value};

use super::diff::{Pointer, diff};
use super::edit::edit;
use super::model::{Plan, Settings};
use super::names::INJECT;
use super::patch::patch;
use super::restore;
use super::service;
use super::yaml;

/// A manifest's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Name for the report.
    pub name: String,
    /// YAML or JSON.
    pub text: String,
}

/// What to do with the manifests.
#[derive(Clone, Debug)]
pub enum Task {
    /// Add the sidecar.
    Inject {
        /// Without the token, which differs between workloads.
        settings: Box<Settings>,
        /// Seed from which the tokens are derived.
        seed: String,
        /// Namespace of objects that have none.
        namespace: String,
    },
    /// Remove the sidecar.
    Uninject,
}

/// Result for one object or document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportLine {
    /// Name of the manifest.
    pub source: String,
    /// Object such as `deployment/web`, or number of the document.
    pub what: String,
    /// Result.
    pub outcome: Outcome,
    /// Warnings for the owner.
    pub warnings: Vec<String>,
}

/// Result for one object or document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Changed.
    Changed,
    /// Already as desired.
    Unchanged,
    /// Skipped, with the reason.
    Skipped(String),
    /// Not understood and left unchanged, with the reason.
    Failed(String),
}

/// Returns the new texts in the order of the sources, and the report. Bytes outside the edits stay as they are.
pub fn transform(sources: &[Manifest], task: &Task) -> (Vec<String>, Vec<ReportLine>) {
    let mut documents: Vec<Document> = Vec::new();
    for (n, source) in sources.iter().enumerate() {
        documents
            .extend(split(&source.text).into_iter().enumerate().map(|(m, text)| Document::new(n, m, text)));
    }
    let mut objects: Vec<Object> =
        documents.iter().enumerate().flat_map(|(n, document)| document.objects(n, task)).collect();
    let workloads: Vec<usize> = (0..objects.len()).filter(|n| objects[*n].template.is_some()).collect();
    for n in &workloads {
        change_workload(&mut objects[*n], task);
    }
    change_services(&mut objects, &workloads, task);
    let mut texts = vec![String::new(); sources.len()];
    let mut report = Vec::new();
    for (n, document) in documents.iter().enumerate() {
        let own = objects.iter_mut().filter(|object| object.document == n);
        let (text, lines) = document.finish(own.collect(), sources);
        texts[document.source].push_str(&text);
        report.extend(lines);
    }
    (texts, report)
}

struct Document<'a> {
    source: usize,
    /// Counted from 1.
    number: usize,
    text: &'a str,
    value: Result<Option<Value>, String>,
}

/// A workload or a Service in a document.
struct Object {
    document: usize,
    at: String,
    what: String,
    namespace: String,
    name: String,
    kind: String,
    /// Location of its pod template, if it has one.
    template: Option<&'static str>,
    before: Value,
    after: Value,
    plan: Option<Plan>,
    outcome: Outcome,
    warnings: Vec<String>,
}

/// A document begins at a `---` line; comments and directives (`%YAML`) before that line belong to it.
fn split(text: &str) -> Vec<&str> {
    let (mut documents, mut start, mut at, mut content) = (Vec::new(), 0, 0, false);
    for line in text.split_inclusive('\n') {
        let marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marker && content {
            documents.push(&text[start..at]);
            start = at;
        }
        content |= marker || !(line.trim().is_empty() || line.starts_with(['#', '%', '\u{feff}']));
        at += line.len();
    }
    documents.push(&text[start..]);
    documents
}

impl<'a> Document<'a> {
    fn new(source: usize, n: usize, text: &'a str) -> Self {
        let value = yaml::parse(text).and_then(|root| root.map(|root| root.to_json()).transpose());
        Self { source, number: n + 1, text, value }
    }

    /// Its workloads and Services, on their own or in a List.
    fn objects(&self, n: usize, task: &Task) -> Vec<Object> {
        let Ok(Some(root)) = &self.value else { return vec![] };
        let list = root["kind"].as_str().is_some_and(|kind| kind.ends_with("List"));
        match root["items"].as_array().filter(|_| list) {
            Some(items) => {
                let all = items.iter().enumerate();
                all.filter_map(|(m, item)| Object::new(n, format!("/items/{m}"), item, task)).collect()
            }
            None => Object::new(n, String::new(), root, task).into_iter().collect(),
        }
    }

    /// Its new text, and its report lines.
    fn finish(&self, mut objects: Vec<&mut Object>, sources: &[Manifest]) -> (String, Vec<ReportLine>) {
        let source = sources[self.source].name.clone();
        let failed = |why: &String| {
            let (what, outcome) = (format!("document {}", self.number), Outcome::Failed(why.clone()));
            vec![ReportLine { source: source.clone(), what, outcome, warnings: vec![] }]
        };
        let before = match &self.value {
            Err(why) => return (self.text.to_owned(), failed(why)),
            Ok(None) => return (self.text.to_owned(), vec![]),
            Ok(Some(value)) => value,
        };
        let mut after = before.clone();
        for object in &objects {
            if let Some(place) = after.pointer_mut(&object.at) {
                *place = object.after.clone();
            }
        }
        let ops = diff(&Pointer::default(), before, &after);
        let edited = if ops.is_empty() { Ok(self.text.to_owned()) } else { edit(self.text, &ops, &after) };
        let text = edited.unwrap_or_else(|why| {
            for object in objects.iter_mut().filter(|object| object.outcome == Outcome::Changed) {
                object.outcome = Outcome::Skipped(format!("its YAML can't be changed in place: {why}"));
                object.warnings.clear();
            }
            self.text.to_owned()
        });
        let lines = objects.into_iter().map(|object| ReportLine {
            source: source.clone(),
            what: object.what.clone(),
            outcome: object.outcome.clone(),
            warnings: std::mem::take(&mut object.warnings),
        });
        (text, lines.collect())
    }
}

impl Object {
    fn new(document: usize, at: String, value: &Value, task: &Task) -> Option<Self> {
        let kind = value["kind"].as_str()?;
        let group = value["apiVersion"].as_str()?.rsplit_once('/').map_or("", |(group, _)| group);
        let template = match (group, kind) {
            ("", "Service") => None,
            ("", "Pod") => Some(""),
            ("", "ReplicationController")
            | ("apps" | "extensions", "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet")
            | ("batch", "Job") => Some("/spec/template"),
            ("batch", "CronJob") => Some("/spec/jobTemplate/spec/template"),
            _ => return None,
        };
        let metadata = &value["metadata"];
        let name = metadata["name"].as_str().or(metadata["generateName"].as_str()).unwrap_or_default();
        let default = match task {
            Task::Inject { namespace, .. } => namespace,
            Task::Uninject => "",
        };
        Some(Self {
            document,
            at,
            what: format!("{}/{name}", kind.to_lowercase()),
            namespace: metadata["namespace"].as_str().unwrap_or(default).to_owned(),
            name: name.to_owned(),
            kind: kind.to_owned(),
            template,
            before: value.clone(),
            after: value.clone(),
            plan: None,
            outcome: Outcome::Unchanged,
            warnings: vec![],
        })
    }

    fn pod(&self) -> Option<&Value> {
        self.before.pointer(self.template?)
    }

    fn labels(&self) -> Map<String, Value> {
        self.pod().and_then(|pod| pod["metadata"]["labels"].as_object()).cloned().unwrap_or_default()
    }

    fn set(&mut self, after: Value) {
        self.outcome = if after == self.before { Outcome::Unchanged } else { Outcome::Changed };
        self.after = after;
    }
}

fn change_workload(object: &mut Object, task: &Task) {
    let Some((pod, place)) = object.pod().cloned().zip(object.template) else {
        object.outcome = Outcome::Skipped("it has no pod template".to_owned());
        return;
    };
    let disabled =
        |key: &str| object.before["metadata"][key][INJECT].as_str().is_some_and(|value| value == "disabled");
    let changed = match task {
        Task::Uninject => restore::restored(&pod).map(|pod| (Value::Object(pod), None)),
        Task::Inject { .. } if disabled("annotations") || disabled("labels") => {
            Err(format!("{INJECT} is disabled"))
        }
        Task::Inject { settings, seed, .. } => {
            let token = token(seed, &[&object.namespace, &object.kind, &object.name]);
            let settings = Settings { token, ..Settings::clone(settings) };
            let patched = patch(&pod, &settings).map_err(|skip| skip.0);
            patched.map(|patch| {
                object.warnings = patch.warnings;
                (patch.pod, Some(patch.plan))
            })
        }
    };
    match changed {
        Err(why) => object.outcome = Outcome::Skipped(why),
        Ok((pod, plan)) => {
            object.plan = plan;
            let mut after = object.before.clone();
            if let Some(place) = after.pointer_mut(place) {
                *place = pod;
            }
            object.set(after);
        }
    }
}

fn change_services(objects: &mut [Object], workloads: &[usize], task: &Task) {
    let mut found = vec![false; objects.len()];
    for n in 0..objects.len() {
        if objects[n].template.is_some() {
            continue;
        }
        let mut new = match service::restored(&objects[n].before) {
            Ok(new) => new,
            Err(why) => {
                objects[n].outcome = Outcome::Skipped(why);
                continue;
            }
        };
        let selected: Vec<usize> = workloads
            .iter()
            .copied()
            .filter(|m| {
                objects[*m].namespace == objects[n].namespace && service::selects(&new, &objects[*m].labels())
            })
            .collect();
        if matches!(task, Task::Inject { .. }) {
            for m in &selected {
                found[*m] = true;
                match follow(&new, &objects[*m], &selected, objects) {
                    Ok(Some(changed)) => new = changed,
                    Ok(None) => {}
                    Err(why) => objects[n].warnings.push(why),
                }
            }
        }
        objects[n].set(new);
    }
    for n in workloads {
        let object = &mut objects[*n];
        if let Some(Plan { moved: true, was, name: Some(name), .. }) = &object.plan
            && !found[*n]
        {
            let text = "no Service that selects it is among these files; one whose targetPort is the number";
            object.warnings.push(format!("{text} {was} goes past the proxy: give it the name '{name}'"));
        }
    }
}

/// The Service with a port name as target for this workload; none if it doesn't target the port by number.
fn follow(
    service: &Value,
    workload: &Object,
    all: &[usize],
    objects: &[Object],
) -> Result<Option<Value>, String> {
    let Some(Plan { moved: true, was, name: Some(name), .. }) = &workload.plan else { return Ok(None) };
    if !service::numbers(service).contains(was) {
        return Ok(None);
    }
    if let Some(other) = all.iter().map(|n| &objects[*n]).find(|other| !has_port(other, name)) {
        return Err(format!(
            "targetPort {was} stays a number and goes past the proxy of {}: {} has no port named '{name}'",
            workload.what, other.what
        ));
    }
    service::retargeted(service, *was, name).map(Some)
}

fn has_port(workload: &Object, name: &str) -> bool {
    let containers =
        workload.pod().and_then(|pod| pod["spec"]["containers"].as_array()).into_iter().flatten();
    let mut ports = containers.filter_map(|container| container["ports"].as_array()).flatten();
    ports.any(|port| port["name"] == name)
}

/// The token of a workload's hooks. It is the same at each injection, so that applying again causes no rollout.
fn token(seed: &str, parts: &[&str]) -> String {
    // NUL separates the parts: Kubernetes names can't contain it.
    let mac = hmac_sha256::HMAC::mac(parts.join("\0"), seed);
    mac[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}
