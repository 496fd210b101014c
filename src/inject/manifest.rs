//! Transforms manifests: documents, Lists, workloads and the Services that select them. No file access.

use serde_json::{Map, Value};

use super::diff::Pointer;
use super::hints;
use super::kinds::{Kinds, Role, role};
use super::model::{PatchSettings, Plan, Written};
use super::patch::patch;
use super::restore;
use super::service;
use super::text::{self, Edit, split};

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
        settings: Box<PatchSettings>,
        /// Seed from which the tokens are derived.
        seed: String,
        /// Namespace of objects that have none.
        namespace: String,
        /// Further kinds of workloads.
        kinds: Kinds,
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
    /// Whether a Service among the manifests selects its pods.
    pub served: bool,
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
    let mut documents: Vec<FileDocument> = Vec::new();
    for (n, source) in sources.iter().enumerate() {
        documents.extend(
            split(&source.text).into_iter().enumerate().map(|(m, text)| FileDocument::new(n, m, text)),
        );
    }
    let mut objects: Vec<Object> =
        documents.iter().enumerate().flat_map(|(n, document)| document.objects(n, task)).collect();
    let workloads: Vec<usize> = (0..objects.len()).filter(|n| objects[*n].template.is_some()).collect();
    for n in &workloads {
        let ports = service_ports(&objects, &objects[*n]);
        change_workload(&mut objects[*n], ports, task, &documents);
    }
    change_services(&mut objects, &workloads, task, &documents);
    let mut texts = vec![String::new(); sources.len()];
    let mut report = Vec::new();
    let mut left = objects.as_mut_slice();
    for (n, document) in documents.iter().enumerate() {
        let own = left.iter().take_while(|object| object.document == n).count();
        let (own, others) = left.split_at_mut(own);
        left = others;
        let (text, lines) = document.finish(own, &sources[document.source].name);
        texts[document.source].push_str(&text);
        report.extend(lines);
    }
    (texts, report)
}

struct FileDocument<'a> {
    source: usize,
    /// Counted from 1.
    number: usize,
    text: &'a str,
    parsed: Result<Option<text::Document<'a>>, String>,
}

/// A workload, a Service, or another object that has a pod template, in a document.
struct Object {
    document: usize,
    at: Pointer,
    what: String,
    namespace: String,
    name: String,
    kind: String,
    /// Location of its pod template, if it is a workload.
    template: Option<Pointer>,
    before: Value,
    after: Value,
    edit: Option<Edit>,
    plan: Option<Plan>,
    outcome: Outcome,
    warnings: Vec<String>,
    served: bool,
}

impl<'a> FileDocument<'a> {
    fn new(source: usize, n: usize, text: &'a str) -> Self {
        Self { source, number: n + 1, text, parsed: text::Document::parse(text) }
    }

    /// Its workloads and Services, on their own or in a List.
    fn objects(&self, n: usize, task: &Task) -> Vec<Object> {
        let Ok(Some(text::Document { value: root, .. })) = &self.parsed else { return vec![] };
        let at = Pointer::default();
        let list = root["kind"].as_str().is_some_and(|kind| kind.ends_with("List"));
        match root["items"].as_array().filter(|_| list) {
            Some(items) => {
                let all = items.iter().enumerate();
                all.filter_map(|(m, item)| Object::new(n, at.join("items").join(m), item, task)).collect()
            }
            None => Object::new(n, at, root, task).into_iter().collect(),
        }
    }

    /// Its new text, and its report lines.
    fn finish(&self, objects: &mut [Object], source: &str) -> (String, Vec<ReportLine>) {
        let parsed = match &self.parsed {
            Err(why) => {
                let (what, outcome) = (format!("document {}", self.number), Outcome::Failed(why.clone()));
                let source = source.to_owned();
                let line = ReportLine { source, what, outcome, warnings: vec![], served: false };
                return (self.text.to_owned(), vec![line]);
            }
            Ok(None) => return (self.text.to_owned(), vec![]),
            Ok(Some(parsed)) => parsed,
        };
        let edits: Vec<Edit> = objects.iter_mut().filter_map(|object| object.edit.take()).collect();
        let mut after = parsed.value.clone();
        for object in objects.iter().filter(|object| object.after != object.before) {
            if let Some(place) = after.pointer_mut(&object.at.to_string()) {
                *place = object.after.clone();
            }
        }
        let edited = if edits.is_empty() { Ok(self.text.to_owned()) } else { parsed.with(&edits, &after) };
        let text = edited.unwrap_or_else(|why| {
            for object in objects.iter_mut().filter(|object| object.after != object.before) {
                object.skip(why.clone());
            }
            self.text.to_owned()
        });
        let lines = objects.iter_mut().map(|object| ReportLine {
            source: source.to_owned(),
            what: object.what.clone(),
            outcome: object.outcome.clone(),
            warnings: std::mem::take(&mut object.warnings),
            served: object.served,
        });
        (text, lines.collect())
    }
}

impl Object {
    fn new(document: usize, at: Pointer, value: &Value, task: &Task) -> Option<Self> {
        let (default, kinds) = match task {
            Task::Inject { namespace, kinds, .. } => (namespace.as_str(), Some(kinds)),
            Task::Uninject => ("", None),
        };
        let (template, outcome) = match role(value, kinds) {
            Role::Other => return None,
            Role::Service => (None, Outcome::Unchanged),
            Role::Workload(template) => (Some(template), Outcome::Unchanged),
            Role::Refused(why) => (None, Outcome::Skipped(why)),
        };
        let kind = value["kind"].as_str()?;
        let metadata = &value["metadata"];
        let name = metadata["name"].as_str().or(metadata["generateName"].as_str()).unwrap_or_default();
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
            edit: None,
            plan: None,
            outcome,
            warnings: vec![],
            served: false,
        })
    }

    fn pod(&self) -> Option<&Value> {
        self.before.pointer(&self.template.as_ref()?.to_string())
    }

    fn labels(&self) -> Map<String, Value> {
        self.pod().and_then(|pod| pod["metadata"]["labels"].as_object()).cloned().unwrap_or_default()
    }

    fn is_service(&self) -> bool {
        self.template.is_none() && self.outcome == Outcome::Unchanged
    }

    /// Edits its text as well, or leaves it as it is.
    fn set(&mut self, after: Value, sources: &Written, documents: &[FileDocument]) {
        if after == self.before {
            return;
        }
        let Ok(Some(document)) = &documents[self.document].parsed else { return };
        match document.edit(&self.at, &after, sources) {
            Ok(edit) => {
                (self.outcome, self.after, self.edit) = (Outcome::Changed, after, Some(edit));
            }
            Err(why) => self.skip(why),
        }
    }

    fn skip(&mut self, why: String) {
        self.outcome = Outcome::Skipped(format!("its YAML can't be changed in place: {why}"));
        self.after = self.before.clone();
        self.plan = None;
        self.warnings.clear();
    }
}

/// Ports of the Services that select the workload's pods.
fn service_ports(objects: &[Object], workload: &Object) -> Vec<Value> {
    let labels = workload.labels();
    let services =
        objects.iter().filter(|object| object.is_service() && object.namespace == workload.namespace);
    let services = services.filter(|object| service::selects(&object.before, &labels));
    services.flat_map(|object| service::tcp_ports(&object.before)).cloned().collect()
}

fn change_workload(object: &mut Object, service_ports: Vec<Value>, task: &Task, documents: &[FileDocument]) {
    let Some((pod, place)) = object.pod().cloned().zip(object.template.clone()) else {
        object.outcome = Outcome::Skipped("it has no pod template".to_owned());
        return;
    };
    let opted_out = hints::opted_out(&object.before["metadata"]);
    let changed = match (task, opted_out) {
        (Task::Uninject, _) => restore::restored(&pod).map(|pod| (Value::Object(pod), None)),
        (Task::Inject { .. }, Some(why)) => Err(why),
        (Task::Inject { settings, seed, .. }, None) => {
            let token = token(seed, &[&object.namespace, &object.kind, &object.name]);
            let settings = PatchSettings { token, service_ports, ..PatchSettings::clone(settings) };
            let patched = patch(&pod, &settings).map_err(|skip| skip.0);
            patched.map(|patch| {
                object.warnings = patch.warnings;
                if !place.0.is_empty() {
                    object.warnings.extend(hints::of_workload(&object.before["metadata"]));
                }
                (patch.pod, patch.plan)
            })
        }
    };
    let (mut new, plan) = match changed {
        Ok(changed) => changed,
        Err(why) => {
            if restore::is_injected(&pod) {
                let stays = "the sidecar of an earlier injection stays: `lameduck uninject` takes it out";
                object.warnings.push(stays.to_owned());
            }
            return object.outcome = Outcome::Skipped(why);
        }
    };
    object.plan = plan;
    let mut sources = Written::new();
    match (task, &documents[object.document].parsed) {
        (Task::Uninject, _) => sources = restore::sources(&pod),
        (Task::Inject { .. }, Ok(Some(document))) if !restore::is_injected(&pod) => {
            let sources = document.sources(&object.at.append(&place), &new);
            restore::keep_sources(&mut new, sources);
        }
        _ => {}
    }
    let mut after = object.before.clone();
    if let Some(at) = after.pointer_mut(&place.to_string()) {
        *at = new;
    }
    let sources = sources.into_iter().map(|(at, text)| (format!("{place}{at}"), text)).collect();
    object.set(after, &sources, documents);
}

fn change_services(objects: &mut [Object], workloads: &[usize], task: &Task, documents: &[FileDocument]) {
    for n in 0..objects.len() {
        if !objects[n].is_service() {
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
        for m in &selected {
            objects[*m].served = true;
        }
        if matches!(task, Task::Inject { .. }) {
            for m in &selected {
                match follow(&new, &objects[*m], &selected, objects) {
                    Ok(Some(changed)) => new = changed,
                    Ok(None) => {}
                    Err(why) => objects[n].warnings.push(why),
                }
            }
            // While pods of the earlier injection still run, only the names lead to their proxies.
            let names = service::names(&objects[n].before);
            if !service::is_changed(&new)
                && selected.iter().all(|m| names.iter().all(|name| has_port(&objects[*m], name)))
            {
                new = objects[n].before.clone();
            }
        }
        objects[n].set(new, &Written::new(), documents);
    }
    for n in workloads {
        let object = &mut objects[*n];
        if let Some(Plan { moved: true, was, name: Some(name), .. }) = &object.plan
            && !object.served
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
