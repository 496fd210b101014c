//! An AdmissionReview in, an AdmissionReview out: pure. Whatever the pod is like, it is allowed; what lameduck doesn't
//! understand it leaves alone, and says so.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::inject::names::INJECT;
use crate::inject::sidecar::token_of;
use crate::inject::{self, Settings};

/// The only version there is (admissionregistration `admissionReviewVersions`).
const VERSION: &str = "admission.k8s.io/v1";
/// Bytes of a warning: past 256 the API server may cut all of them short.
const MOST_WARNING: usize = 250;
/// JSON values in an AdmissionReview: some 100 bytes of memory each. A big pod has a thousand.
const MOST_VALUES: usize = 100_000;
/// Warnings: all of them together may have 4096 bytes in an answer.
const MOST_WARNINGS: usize = 10;

/// What became of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It gets the sidecar.
    Injected,
    /// There was nothing to do: it has the sidecar already, its owner doesn't want it, or it is no new pod.
    Unchanged,
    /// It should have it, but is better left alone; why.
    Skipped(String),
    /// lameduck failed.
    Failed(String),
}

/// An answer, and what the log and the Event say of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Reviewed {
    /// The AdmissionReview to send back.
    pub answer: Value,
    /// What became of the pod.
    pub outcome: Outcome,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name, or the beginning of the one that it is going to have.
    pub name: String,
    /// The object that makes such pods (`ownerReferences`), if there is one.
    pub owner: Option<Value>,
    /// Nothing may happen on the side.
    pub dry_run: bool,
}

/// Reviews the bytes of an AdmissionReview. `settings` has no token yet; a pod without one gets `token`.
///
/// # Errors
/// Why there is nothing that could be answered: it is no AdmissionReview.
pub fn review(bytes: &[u8], settings: &Settings, token: impl FnOnce() -> String) -> Result<Reviewed, String> {
    let (uid, request) = request(bytes)?;
    let kind = [&request["kind"]["group"], &request["kind"]["version"], &request["kind"]["kind"]];
    let new_pod = kind == ["", "v1", "Pod"]
        && request["operation"] == "CREATE"
        && request.get("subResource").is_none_or(|sub| sub == "");
    if !new_pod {
        return Ok(reviewed(&uid, &request, Outcome::Unchanged, Vec::new(), None));
    }
    let pod = &request["object"];
    if disabled(pod) {
        return Ok(reviewed(&uid, &request, Outcome::Unchanged, Vec::new(), None));
    }
    let had = token_of(pod);
    let token = had.map_or_else(token, str::to_owned);
    let patch = inject::patch(pod, &Settings { token, ..settings.clone() });
    Ok(match patch {
        Err(skip) if had.is_some() => {
            let warning = format!("the sidecar stays as it is: {}", skip.0);
            reviewed(&uid, &request, Outcome::Unchanged, vec![warning], None)
        }
        Err(skip) => {
            let warning = format!("not injected: {}", skip.0);
            reviewed(&uid, &request, Outcome::Skipped(skip.0), vec![warning], None)
        }
        // Called again, the pod has got Kubernetes' defaults: those are no reason to change anything.
        Ok(patch) if within(&patch.pod, pod) => {
            reviewed(&uid, &request, Outcome::Unchanged, Vec::new(), None)
        }
        Ok(patch) => {
            let ops = json!(patch.ops).to_string();
            reviewed(&uid, &request, Outcome::Injected, patch.warnings, Some(ops))
        }
    })
}

/// The answer after `review` has panicked: the pod goes on as it is.
///
/// # Errors
/// As `review`.
pub fn allowed_anyway(bytes: &[u8]) -> Result<Reviewed, String> {
    let (uid, request) = request(bytes)?;
    let why = "an error in lameduck, its log says more".to_owned();
    let warning = format!("not injected: {why}");
    Ok(reviewed(&uid, &request, Outcome::Failed(why), vec![warning], None))
}

fn request(bytes: &[u8]) -> Result<(String, Value), String> {
    // Parsed, a value takes many times the memory of its text.
    let values = bytes.iter().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count();
    if values > MOST_VALUES {
        return Err(format!("more than {MOST_VALUES} values"));
    }
    let mut review: Value = serde_json::from_slice(bytes).map_err(|why| format!("no JSON: {why}"))?;
    if review["apiVersion"] != VERSION || review["kind"] != "AdmissionReview" {
        return Err(format!("no AdmissionReview of {VERSION}"));
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
    outcome: Outcome,
    warnings: Vec<String>,
    ops: Option<String>,
) -> Reviewed {
    let mut response = json!({ "uid": uid, "allowed": true });
    if let Some(ops) = ops {
        response["patchType"] = json!("JSONPatch");
        response["patch"] = json!(STANDARD.encode(ops));
    }
    if !warnings.is_empty() {
        let warnings: Vec<_> = warnings.iter().take(MOST_WARNINGS).map(|text| warning(text)).collect();
        response["warnings"] = json!(warnings);
    }
    let metadata = &request["object"]["metadata"];
    // A pod may leave its namespace to the request, and its name to the API server.
    let first = |places: [&Value; 3]| {
        let text = places.into_iter().filter_map(Value::as_str).find(|text| !text.is_empty());
        text.unwrap_or_default().to_owned()
    };
    let owners = metadata["ownerReferences"].as_array();
    Reviewed {
        answer: json!({ "apiVersion": VERSION, "kind": "AdmissionReview", "response": response }),
        outcome,
        namespace: first([&request["namespace"], &metadata["namespace"], &Value::Null]),
        name: first([&request["name"], &metadata["name"], &metadata["generateName"]]),
        owner: owners.and_then(|owners| owners.iter().find(|owner| owner["controller"] == true)).cloned(),
        dry_run: request["dryRun"] == true,
    }
}

/// In an HTTP header (`Warning`, RFC 7234 §5.5) in the end: one line, not too long.
fn warning(text: &str) -> String {
    let mut line: String = format!("lameduck: {text}").chars().filter(|c| !c.is_control()).collect();
    if line.len() > MOST_WARNING {
        line.truncate(line.floor_char_boundary(MOST_WARNING - '…'.len_utf8()));
        line.push('…');
    }
    line
}

/// Whether `all` says everything that `part` says: it may have more members, and more elements in a list of named ones.
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
