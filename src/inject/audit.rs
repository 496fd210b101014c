//! `lameduck audit`: which running pods should have the sidecar and don't, or have another version of it. A webhook that
//! was away leaves such a mix, and nothing else shows it. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::hints;
use super::json::deployment;
use super::model::PatchSettings;
use super::names::{INJECT, PREFIX, SIDECAR};
use super::patch::patch;
use super::sidecar::token_of;
use super::text::{Document, split};

/// Namespaces that the webhook configuration leaves out.
const LEFT_OUT: [&str; 2] = ["kube-system", "lameduck-system"];
/// Kinds that `kubectl rollout restart` replaces the pods of.
const RESTARTED: [&str; 3] = ["deployment", "statefulset", "daemonset"];

/// What a pod has, and should have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Finding {
    /// Opted in, and created without the sidecar although the webhook would add it.
    Missing,
    /// Has the sidecar with this image, which is another one than wanted.
    OtherImage(String),
    /// Opted in, and left as it is for this reason.
    Skipped(String),
    /// Not opted in, although something on it seems to say so.
    Mistaken(String),
    /// Has what it should have.
    Injected,
}

/// Result of an audit.
#[derive(Debug, Default)]
pub struct Audit {
    /// The report: a line for each workload and finding, and the sum.
    pub text: String,
    /// Whether replacing a pod would change it, or something means nothing where it is.
    pub found: bool,
}

/// Objects in the output of `kubectl get -o json` or `-o yaml`: Lists, or single ones.
///
/// # Errors
/// Says what can't be parsed.
pub fn objects(text: &str) -> Result<Vec<Value>, String> {
    let mut all = Vec::new();
    let mut add = |mut value: Value| match value.get_mut("items").map(Value::take) {
        Some(Value::Array(items)) => all.extend(items),
        _ => all.push(value),
    };
    if text.trim_start().starts_with('{') {
        for value in serde_json::Deserializer::from_str(text).into_iter() {
            add(value.map_err(|why| why.to_string())?);
        }
    } else {
        for part in split(text) {
            Document::parse(part)?.map(|document| document.value).into_iter().for_each(&mut add);
        }
    }
    Ok(all)
}

/// Compares the pods with what `settings` would make of them. `image` is the sidecar's; without it any image with `tag` is
/// as wanted.
///
/// # Errors
/// There are no pods among the objects.
pub fn audit(
    objects: &[Value],
    settings: &PatchSettings,
    image: Option<&str>,
    tag: &str,
) -> Result<Audit, String> {
    let of_kind = |kind: &'static str| objects.iter().filter(move |object| object["kind"] == kind);
    if of_kind("Pod").next().is_none() {
        return Err(
            "there are no pods in it: give the output of kubectl get namespaces,pods -A -o json".into()
        );
    }
    let (mut audit, mut opted_in) = (Audit::default(), BTreeSet::new());
    for namespace in of_kind("Namespace") {
        let (name, labels) = (text(&namespace["metadata"]["name"]), &namespace["metadata"]["labels"]);
        if labels[INJECT] == "enabled" && !LEFT_OUT.contains(&name) {
            opted_in.insert(name);
        } else if let Some(hint) = hints::of_value(labels.get(INJECT)) {
            audit.text += &format!("namespace/{name}: {hint}\n");
            audit.found = true;
        }
    }
    for object in objects.iter().filter(|object| RESTARTED.contains(&kind(object).as_str())) {
        let metadata = &object["metadata"];
        for hint in hints::of_workload(metadata) {
            let (namespace, name) = (text(&metadata["namespace"]), text(&metadata["name"]));
            audit.text += &format!("{namespace}: {}/{name}: {hint}\n", kind(object));
            audit.found = true;
        }
    }
    let mut workloads: BTreeMap<String, BTreeMap<Finding, usize>> = BTreeMap::new();
    for pod in of_kind("Pod").filter(|pod| is_running(pod)) {
        let namespace = text(&pod["metadata"]["namespace"]);
        let asked = opted_in.contains(namespace) && !LEFT_OUT.contains(&namespace);
        if let Some(finding) = finding(pod, asked, settings, |has, own| match own.or(image) {
            Some(wanted) => has == wanted,
            None => {
                let (named, _digest) = has.split_once('@').unwrap_or((has, ""));
                named.rsplit_once(':').is_some_and(|(_, has)| has == tag)
            }
        }) {
            let findings = workloads.entry(workload(namespace, &pod["metadata"])).or_default();
            *findings.entry(finding).or_default() += 1;
        }
    }
    audit.report(&workloads);
    if of_kind("Namespace").next().is_none() {
        audit.text += "no namespace is in it, so only the labels of pods count: give the output of kubectl get \
                       namespaces,pods\n";
    }
    Ok(audit)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Kind of an object or owner as kubectl takes it.
fn kind(object: &Value) -> String {
    text(&object["kind"]).to_lowercase()
}

/// Whether it isn't over or about to end.
fn is_running(pod: &Value) -> bool {
    let over = ["Succeeded", "Failed"].contains(&text(&pod["status"]["phase"]));
    !over && pod["metadata"]["deletionTimestamp"].is_null()
}

/// What is to be said of a pod; none if it has nothing to do with us. `wanted` compares the sidecar's image with the one
/// that the pod's annotation names.
fn finding(
    pod: &Value,
    namespace_asks: bool,
    settings: &PatchSettings,
    wanted: impl Fn(&str, Option<&str>) -> bool,
) -> Option<Finding> {
    let metadata = &pod["metadata"];
    if token_of(pod).is_some() {
        let containers = ["initContainers", "containers"].map(|key| pod["spec"][key].as_array());
        let mut containers = containers.into_iter().flatten().flatten();
        let image = text(&containers.find(|container| container["name"] == SIDECAR)?["image"]);
        let own = metadata["annotations"][format!("{PREFIX}image")].as_str();
        return Some(match wanted(image, own) {
            true => Finding::Injected,
            false => Finding::OtherImage(image.to_owned()),
        });
    }
    let label = &metadata["labels"][INJECT];
    if !namespace_asks && label != "enabled" {
        let of = |key: &str| metadata[key].as_object().cloned().unwrap_or_default();
        let hints = hints::of_pod(&of("labels"), &of("annotations"));
        let wants_none = hints::opted_out(metadata).is_some();
        return (!wants_none && !hints.is_empty()).then(|| Finding::Mistaken(hints.join("; ")));
    }
    if LEFT_OUT.contains(&text(&metadata["namespace"])) {
        return Some(Finding::Skipped("the webhook leaves out this namespace".to_owned()));
    }
    Some(match patch(pod, settings) {
        Ok(_) => Finding::Missing,
        Err(skip) => Finding::Skipped(skip.0),
    })
}

/// Namespace, kind and name of a pod's controller, of the Deployment behind a ReplicaSet, or of the pod itself.
fn workload(namespace: &str, metadata: &Value) -> String {
    let owners = metadata["ownerReferences"].as_array().into_iter().flatten();
    let owner = owners.into_iter().find(|owner| owner["controller"] == true);
    let (kind, name) = match owner {
        None => ("pod".to_owned(), text(&metadata["name"]).to_owned()),
        Some(owner) => match deployment(owner, &metadata["labels"]) {
            Some(name) => ("deployment".to_owned(), name),
            None => (kind(owner), text(&owner["name"]).to_owned()),
        },
    };
    format!("{namespace}: {kind}/{name}")
}

impl Audit {
    fn report(&mut self, workloads: &BTreeMap<String, BTreeMap<Finding, usize>>) {
        let mut sums = [0; 4];
        for (workload, findings) in workloads {
            let all: usize = findings.values().sum();
            for (finding, number) in findings {
                let (sum, line) = match finding {
                    Finding::Injected => (0, None),
                    Finding::OtherImage(image) => {
                        (1, Some(format!("have the sidecar {image}{}", restart(workload))))
                    }
                    Finding::Missing => {
                        let why = "were created before the label, or while the webhook was away";
                        (2, Some(format!("have no sidecar: they {why}{}", restart(workload))))
                    }
                    Finding::Skipped(why) => (3, Some(format!("are left without the sidecar: {why}"))),
                    Finding::Mistaken(why) => (3, Some(format!("don't ask for the sidecar: {why}"))),
                };
                sums[sum] += number;
                self.found |= !matches!(finding, Finding::Injected | Finding::Skipped(_));
                if let Some(line) = line {
                    self.text += &format!("{workload}: {number} of {all} pods {line}\n");
                }
            }
        }
        let [injected, other, missing, left] = sums;
        self.text += &format!(
            "pods with the sidecar: {injected}, with another version of it: {other}, without it although they should \
             have it: {missing}, left without it: {left}\n"
        );
    }
}

/// How to replace the pods of a workload.
fn restart(workload: &str) -> String {
    let (namespace, name) = workload.split_once(": ").unwrap_or_default();
    match RESTARTED.contains(&name.split('/').next().unwrap_or_default()) {
        true => format!("; kubectl -n {namespace} rollout restart {name}"),
        false => "; replace them".to_owned(),
    }
}
