//! Kinds of objects: which are workloads, and where their pod template is. Pure.

use serde_json::Value;

use super::diff::Pointer;

/// Kinds of workloads that the user names, with the location of their pod template.
pub type Kinds = Vec<(String, Pointer)>;

/// What an object means to an injection.
#[derive(Clone, Debug, PartialEq)]
pub enum Role {
    /// Selects pods.
    Service,
    /// Has a pod template, or is a pod, at this location.
    Workload(Pointer),
    /// Has a pod template that is left as it is, with the reason.
    Refused(String),
    /// Concerns no pod.
    Other,
}

/// Depth to which a pod template is looked for in an unknown kind.
const MAX_DEPTH: usize = 6;

const KNATIVE: &str = "Knative refuses hooks and a grace period in it; its own proxy, queue-proxy, drains";
const OPENSHIFT: &str = "process it first: oc process -f FILE -o yaml | lameduck inject";

/// What this object is. `named` are the kinds that the user names; none if every pod template counts, wherever it is.
pub fn role(object: &Value, named: Option<&Kinds>) -> Role {
    let (Some(kind), Some(version)) = (object["kind"].as_str(), object["apiVersion"].as_str()) else {
        return Role::Other;
    };
    let group = version.rsplit_once('/').map_or("", |(group, _)| group);
    let user = named.into_iter().flatten().find(|(name, _)| name == kind);
    if let Some((_, place)) = user {
        return Role::Workload(place.clone());
    }
    let places: &[&str] = match (group, kind) {
        ("", "Service") => return Role::Service,
        ("", "Pod") => &[""],
        ("", "PodTemplate") => &["template"],
        ("", "ReplicationController")
        | ("apps" | "extensions", "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet")
        | ("batch", "Job")
        | ("argoproj.io", "Rollout")
        | ("" | "apps.openshift.io", "DeploymentConfig")
        | ("apps.kruise.io", "CloneSet" | "StatefulSet" | "DaemonSet" | "BroadcastJob") => &["spec.template"],
        ("batch", "CronJob") => &["spec.jobTemplate.spec.template"],
        ("apps.kruise.io", "AdvancedCronJob") => {
            &["spec.template.jobTemplate.spec.template", "spec.template.broadcastJobTemplate.spec.template"]
        }
        ("apps.kruise.io", "UnitedDeployment") => &[
            "spec.template.cloneSetTemplate.spec.template",
            "spec.template.deploymentTemplate.spec.template",
            "spec.template.statefulSetTemplate.spec.template",
            "spec.template.advancedStatefulSetTemplate.spec.template",
        ],
        ("serving.knative.dev", "Service" | "Configuration" | "Revision") => {
            return Role::Refused(KNATIVE.to_owned());
        }
        ("" | "template.openshift.io", "Template") => {
            let objects = object["objects"].as_array();
            let workload = |object: &Value| matches!(role(object, named), Role::Workload(_));
            return match objects.is_some_and(|all| all.iter().any(workload)) {
                true => Role::Refused(OPENSHIFT.to_owned()),
                false => Role::Other,
            };
        }
        _ => return unknown(object, kind, named),
    };
    let found = places.iter().map(|place| pointer(place));
    let first = found.clone().find(|place| object.pointer(&place.to_string()).is_some());
    // A Rollout may refer to a Deployment instead.
    let elsewhere = first.is_none() && !object["spec"]["workloadRef"].is_null();
    if elsewhere { Role::Other } else { Role::Workload(first.unwrap_or_else(|| pointer(places[0]))) }
}

fn unknown(object: &Value, kind: &str, named: Option<&Kinds>) -> Role {
    let Some(place) = template(object, &Pointer::default()) else { return Role::Other };
    if named.is_none() {
        return Role::Workload(place);
    }
    let path = place.0.join(".");
    Role::Refused(format!(
        "kind {kind} is not known: if {path} is its pod template, say --kind {kind}={path}"
    ))
}

/// Location of the first pod template: an object whose spec has containers with images. Lists are not searched.
fn template(value: &Value, at: &Pointer) -> Option<Pointer> {
    let containers = value["spec"]["containers"].as_array();
    if containers.is_some_and(|all| !all.is_empty() && all.iter().all(|one| one["image"].is_string())) {
        return Some(at.clone()).filter(|at| !at.0.is_empty());
    }
    let members = value.as_object().into_iter().flatten().filter(|_| at.0.len() < MAX_DEPTH);
    members.into_iter().find_map(|(key, value)| template(value, &at.join(key)))
}

/// `spec.template` as a location; the empty path is the object itself.
fn pointer(path: &str) -> Pointer {
    Pointer(path.split('.').filter(|key| !key.is_empty()).map(str::to_owned).collect())
}

/// Reads `KIND=PATH`, as in `Rollout=spec.template`.
///
/// # Errors
/// The text for the user.
pub fn parse(text: &str) -> Result<(String, Pointer), String> {
    let plain = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric());
    match text.split_once('=') {
        Some((kind, path)) if plain(kind) && path.split('.').all(plain) => {
            Ok((kind.to_owned(), pointer(path)))
        }
        _ => Err("write KIND=PATH, as in Rollout=spec.template".to_owned()),
    }
}
