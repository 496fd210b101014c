//! Answers an AdmissionReview: pure. Every pod is allowed. A pod that lameduck doesn't understand stays unchanged, with
//! a warning.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::inject::json::deployment;
use crate::inject::names::INJECT;
use crate::inject::sidecar::token_of;
use crate::inject::{self, PatchSettings};

/// The only existing version (admissionregistration `admissionReviewVersions`).
const VERSION: &str = "admission.k8s.io/v1";
/// Limit on a warning in bytes: the API server may truncate all warnings if one exceeds 256.
const MAX_WARNING: usize = 250;
/// Limit on the JSON values in an AdmissionReview, each about 100 bytes of memory. A big pod has a thousand.
const MAX_VALUES: usize = 100_000;
/// Limit on the number of warnings: all warnings of a response together may have 4096 bytes.
const MAX_WARNINGS: usize = 10;

/// Result for a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReviewOutcome {
    /// Gets the sidecar.
    Injected,
    /// Nothing to do: it already has the sidecar, its owner doesn't want it, or this is not the creation of a pod.
    Unchanged,
    /// Should get the sidecar but is left unchanged, with the reason.
    Skipped(String),
    /// lameduck failed, with the reason.
    Failed(String),
}

/// A response, and the data for the log and the Event.
#[derive(Clone, Debug, PartialEq)]
pub struct Reviewed {
    /// AdmissionReview to send back.
    pub answer: Value,
    /// Result for the pod.
    pub outcome: ReviewOutcome,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod, or its generateName prefix.
    pub name: String,
    /// Controller of the pod (from `ownerReferences`), if it has one.
    pub owner: Option<Value>,
    /// Name of the Deployment behind a controller that is its ReplicaSet.
    pub deployment: Option<String>,
    /// Warnings for the owner.
    pub warnings: Vec<String>,
    /// Dry run: no side effects are allowed.
    pub dry_run: bool,
}

/// Answers the bytes of an AdmissionReview. `settings` has no token yet; a pod without one gets `token`.
///
/// # Errors
/// Says why the bytes are not an AdmissionReview, and so can't be answered.
pub fn review(
    bytes: &[u8],
    settings: &PatchSettings,
    token: impl FnOnce() -> String,
) -> Result<Reviewed, String> {
    let (uid, request) = request(bytes)?;
    let kind = [&request["kind"]["group"], &request["kind"]["version"], &request["kind"]["kind"]];
    let new_pod = kind == ["", "v1", "Pod"]
        && request["operation"] == "CREATE"
        && request.get("subResource").is_none_or(|sub| sub == "");
    if !new_pod {
        return Ok(reviewed(&uid, &request, ReviewOutcome::Unchanged, Vec::new(), None));
    }
    let pod = &request["object"];
    if disabled(pod) {
        return Ok(reviewed(&uid, &request, ReviewOutcome::Unchanged, Vec::new(), None));
    }
    let had = token_of(pod);
    let token = had.map_or_else(token, str::to_owned);
    let patch = inject::patch(pod, &PatchSettings { token, ..settings.clone() });
    Ok(match patch {
        Err(skip) if had.is_some() => {
            let warning = format!("the sidecar stays unchanged: {}", skip.0);
            reviewed(&uid, &request, ReviewOutcome::Unchanged, vec![warning], None)
        }
        Err(skip) => {
            let warning = format!("not injected: {}", skip.0);
            reviewed(&uid, &request, ReviewOutcome::Skipped(skip.0), vec![warning], None)
        }
        // In a repeated call, the pod has Kubernetes' defaults filled in: these are no reason to change it.
        Ok(patch) if within(&patch.pod, pod) => {
            reviewed(&uid, &request, ReviewOutcome::Unchanged, Vec::new(), None)
        }
        Ok(patch) => {
            let ops = json!(patch.ops).to_string();
            reviewed(&uid, &request, ReviewOutcome::Injected, patch.warnings, Some(ops))
        }
    })
}

/// Response after `review` panicked: the pod is allowed unchanged.
///
/// # Errors
/// As for `review`.
pub fn allowed_anyway(bytes: &[u8]) -> Result<Reviewed, String> {
    let (uid, request) = request(bytes)?;
    let why = "internal error of lameduck; see its log".to_owned();
    let warning = format!("not injected: {why}");
    Ok(reviewed(&uid, &request, ReviewOutcome::Failed(why), vec![warning], None))
}

fn request(bytes: &[u8]) -> Result<(String, Value), String> {
    // A parsed value takes many times the memory of its text.
    let values = bytes.iter().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count();
    if values > MAX_VALUES {
        return Err(format!("more than {MAX_VALUES} values"));
    }
    let mut review: Value = serde_json::from_slice(bytes).map_err(|why| format!("not JSON: {why}"))?;
    if review["apiVersion"] != VERSION || review["kind"] != "AdmissionReview" {
        return Err(format!("not an AdmissionReview of {VERSION}"));
    }
    let request = review["request"].take();
    match request["uid"].as_str() {
        Some(uid) if !uid.is_empty() => Ok((uid.to_owned(), request)),
        _ => Err("the AdmissionReview's request has no uid".to_owned()),
    }
}

fn disabled(pod: &Value) -> bool {
    let places = [&pod["metadata"]["labels"], &pod["metadata"]["annotations"]];
    places.iter().any(|place| place[INJECT] == "disabled")
}

fn reviewed(
    uid: &str,
    request: &Value,
    outcome: ReviewOutcome,
    warnings: Vec<String>,
    ops: Option<String>,
) -> Reviewed {
    let mut response = json!({ "uid": uid, "allowed": true });
    if let Some(ops) = ops {
        response["patchType"] = json!("JSONPatch");
        response["patch"] = json!(STANDARD.encode(ops));
    }
    if !warnings.is_empty() {
        let warnings: Vec<_> = warnings.iter().take(MAX_WARNINGS).map(|text| warning(text)).collect();
        response["warnings"] = json!(warnings);
    }
    let metadata = &request["object"]["metadata"];
    // The pod may omit its namespace, which is then in the request, and its name, which the API server generates.
    let first = |places: [&Value; 3]| {
        let text = places.into_iter().filter_map(Value::as_str).find(|text| !text.is_empty());
        text.unwrap_or_default().to_owned()
    };
    let owners = metadata["ownerReferences"].as_array();
    let owner = owners.and_then(|owners| owners.iter().find(|owner| owner["controller"] == true)).cloned();
    Reviewed {
        answer: json!({ "apiVersion": VERSION, "kind": "AdmissionReview", "response": response }),
        outcome,
        namespace: first([&request["namespace"], &metadata["namespace"], &Value::Null]),
        name: first([&request["name"], &metadata["name"], &metadata["generateName"]]),
        deployment: owner.as_ref().and_then(|owner| deployment(owner, &metadata["labels"])),
        owner,
        warnings,
        dry_run: request["dryRun"] == true,
    }
}

/// A warning ends up in an HTTP header (`Warning`, RFC 7234 §5.5): one line of limited length.
fn warning(text: &str) -> String {
    let mut line: String = format!("lameduck: {text}").chars().filter(|c| !c.is_control()).collect();
    if line.len() > MAX_WARNING {
        line.truncate(line.floor_char_boundary(MAX_WARNING - '…'.len_utf8()));
        line.push('…');
    }
    line
}

/// Whether `all` contains `part`: it may have more members, and more elements in a list of named ones.
fn within(part: &Value, all: &Value) -> bool {
    match (part, all) {
        (Value::Object(part), Value::Object(all)) => {
            part.iter().all(|(key, part)| all.get(key).is_some_and(|all| within(part, all)))
        }
        (Value::Array(part), Value::Array(all)) => match part.iter().all(|item| item["name"].is_string()) {
            true => {
                part.iter().all(|part| all.iter().any(|all| part["name"] == all["name"] && within(part, all)))
            }
            false => part.len() == all.len() && part.iter().zip(all).all(|(part, all)| within(part, all)),
        },
        _ => part == all,
    }
}
