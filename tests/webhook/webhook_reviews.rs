//! Every AdmissionReview is answered, and every pod allowed: with the patch of `inject` if the pod is understood,
//! otherwise unchanged with a warning. Repeated calls change nothing.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lameduck::cli::{annotated_flags, check_proxy};
use lameduck::inject::Services;
use lameduck::inject::sidecar::token_of;
use lameduck::inject::{self, PatchSettings};
use lameduck::webhook::events::events;
use lameduck::webhook::review::{ReviewOutcome, Reviewed, allowed_anyway, review};
use serde_json::{Value, json};

const DEPLOYMENT: &str = include_str!("deployment.json");
const INJECT: &str = "lameduck.dev/inject";

fn settings() -> PatchSettings {
    PatchSettings {
        image: "lameduck:1".to_owned(),
        pull_policy: None,
        resources: Default::default(),
        token: String::new(),
        service_ports: vec![],
        services: Services::Unseen,
        check: check_proxy,
        flags: annotated_flags,
    }
}

fn deployment() -> Value {
    serde_json::from_str(DEPLOYMENT).expect("JSON")
}

fn ask(review_of: &Value) -> Reviewed {
    ask_with(review_of, "a-new-token")
}

fn ask_with(review_of: &Value, token: &str) -> Reviewed {
    let bytes = serde_json::to_vec(review_of).expect("JSON");
    let reviewed = review(&bytes, &settings(), || token.to_owned()).expect("an answer");
    let response = &reviewed.answer["response"];
    assert_eq!(reviewed.answer["apiVersion"], "admission.k8s.io/v1");
    assert_eq!(reviewed.answer["kind"], "AdmissionReview");
    assert_eq!((&response["uid"], &response["allowed"]), (&review_of["request"]["uid"], &json!(true)));
    assert_eq!(response.get("patch").is_some(), response["patchType"] == "JSONPatch");
    reviewed
}

fn warnings(reviewed: &Reviewed) -> Vec<String> {
    serde_json::from_value(reviewed.answer["response"]["warnings"].clone()).unwrap_or_default()
}

/// The pod after the API server has applied the response's patch.
fn patched(review_of: &Value, reviewed: &Reviewed) -> Value {
    patched_by(review_of, &reviewed.answer)
}

/// The same for a response as it is sent.
pub fn patched_by(review_of: &Value, answer: &Value) -> Value {
    let patch = answer["response"]["patch"].as_str().expect("a patch");
    let ops: Vec<Value> = serde_json::from_slice(&STANDARD.decode(patch).expect("base64")).expect("JSON");
    let mut pod = review_of["request"]["object"].clone();
    for op in &ops {
        apply(&mut pod, op);
    }
    pod
}

/// RFC 6902, as far as lameduck uses it.
fn apply(document: &mut Value, op: &Value) {
    let path = op["path"].as_str().expect("a path");
    let (parent, key) = path.rsplit_once('/').expect("a place");
    let key = key.replace("~1", "/").replace("~0", "~");
    let parent = document.pointer_mut(parent).unwrap_or_else(|| panic!("{path} is not there"));
    match (parent, op["op"].as_str().expect("an op")) {
        (Value::Object(object), "add") => drop(object.insert(key, op["value"].clone())),
        (Value::Object(object), "replace") => {
            assert!(object.insert(key, op["value"].clone()).is_some(), "{path} is not there");
        }
        (Value::Object(object), "remove") => assert!(object.remove(&key).is_some(), "{path} is not there"),
        (Value::Array(array), "add") => array.insert(key.parse().expect("an index"), op["value"].clone()),
        (Value::Array(array), "replace") => {
            array[key.parse::<usize>().expect("an index")] = op["value"].clone();
        }
        (Value::Array(array), "remove") => drop(array.remove(key.parse().expect("an index"))),
        (parent, op) => panic!("{op} {path} in {parent}"),
    }
}

/// Adds what the API server adds to injected containers: defaults, and the service account's mount.
fn with_defaults(pod: &mut Value) {
    let spec = &mut pod["spec"];
    for list in ["initContainers", "containers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            container["terminationMessagePath"] = json!("/dev/termination-log");
            container["terminationMessagePolicy"] = json!("File");
            container["imagePullPolicy"] = json!("IfNotPresent");
            for probe in ["startupProbe", "readinessProbe"] {
                if container[probe].is_object() {
                    container[probe]["httpGet"]["scheme"] = json!("HTTP");
                    container[probe]["successThreshold"] = json!(1);
                }
            }
            for port in container["ports"].as_array_mut().into_iter().flatten() {
                port["protocol"] = json!("TCP");
            }
            container["lifecycle"]["preStop"]["httpGet"]["scheme"] = json!("HTTP");
            if container["name"] == "lameduck" {
                let mounts = container["volumeMounts"].as_array_mut().expect("mounts");
                mounts.push(
                    json!({ "name": "kube-api-access-x7k2p", "readOnly": true, "mountPath": "/var/run/x" }),
                );
            }
        }
    }
}

#[test]
fn a_deployments_pod_gets_exactly_what_inject_gives() {
    let asked = deployment();
    let reviewed = ask(&asked);
    assert_eq!(reviewed.outcome, ReviewOutcome::Injected);
    let pod = &asked["request"]["object"];
    let expected = inject::patch(pod, &PatchSettings { token: "a-new-token".to_owned(), ..settings() })
        .expect("a patch");
    assert_eq!(patched(&asked, &reviewed), expected.pod);
    assert_eq!((reviewed.namespace.as_str(), reviewed.name.as_str()), ("shop", "slow-6c8d5f7b9c-"));
    assert_eq!(reviewed.owner.expect("an owner")["kind"], "ReplicaSet");
    assert!(!reviewed.dry_run);
}

#[test]
fn what_inject_warns_of_is_a_warning_of_the_answer() {
    let mut asked = deployment();
    asked["request"]["object"]["metadata"]["annotations"]["lameduck.dev/capture"] = json!("port-name");
    let warnings = warnings(&ask(&asked));
    assert!(
        warnings.iter().any(|text| text.starts_with("lameduck: a Service whose targetPort")),
        "{warnings:?}"
    );
}

#[test]
fn called_again_the_token_stays_and_nothing_changes() {
    let mut asked = deployment();
    asked["request"]["object"] = patched(&asked, &ask(&asked));
    for _ in 0..2 {
        let again = ask_with(&asked, "another-token");
        assert_eq!(again.outcome, ReviewOutcome::Unchanged);
        assert_eq!(again.answer["response"].get("patch"), None);
        assert_eq!(token_of(&asked["request"]["object"]), Some("a-new-token"));
        // The API server calls again with its own defaults in the injected container.
        with_defaults(&mut asked["request"]["object"]);
    }
}

#[test]
fn called_again_the_limits_of_a_limit_range_are_no_reason_to_change_it() {
    let mut asked = deployment();
    asked["request"]["object"] = patched(&asked, &ask(&asked));
    with_defaults(&mut asked["request"]["object"]);
    let ours = &mut asked["request"]["object"]["spec"]["initContainers"][0];
    assert_eq!(ours["name"], "lameduck");
    ours["resources"]["limits"] = json!({ "cpu": "500m", "memory": "128Mi" });
    ours["resources"]["requests"]["ephemeral-storage"] = json!("1Mi");
    let again = ask(&asked);
    assert_eq!((again.outcome, again.answer["response"].get("patch")), (ReviewOutcome::Unchanged, None));
}

#[test]
fn called_again_a_captured_pod_stays_the_same() {
    let mut asked = deployment();
    let pod = &mut asked["request"]["object"];
    pod["metadata"]["annotations"]["lameduck.dev/capture"] = json!("loopback");
    pod["spec"]["securityContext"] = json!({});
    let app = &mut pod["spec"]["containers"][0];
    app["readinessProbe"] = json!({ "tcpSocket": { "port": 3000 }, "successThreshold": 1 });
    let beside =
        json!({ "name": "beside", "image": "x", "env": [{ "name": "LD_PRELOAD", "value": "/a.so" }] });
    pod["spec"]["containers"].as_array_mut().expect("a list").push(beside);
    let reviewed = ask(&asked);
    assert_eq!((&reviewed.outcome, warnings(&reviewed)), (&ReviewOutcome::Injected, vec![]));
    asked["request"]["object"] = patched(&asked, &reviewed);
    let probe = &asked["request"]["object"]["spec"]["containers"][0]["readinessProbe"];
    assert_eq!(probe["httpGet"]["path"], "/app-port/3000");
    for _ in 0..2 {
        let again = ask_with(&asked, "another-token");
        assert_eq!((again.outcome, again.answer["response"].get("patch")), (ReviewOutcome::Unchanged, None));
        with_defaults(&mut asked["request"]["object"]);
    }
}

#[test]
fn a_pod_that_another_webhook_changed_is_corrected_with_its_old_token() {
    let mut asked = deployment();
    asked["request"]["object"] = patched(&asked, &ask(&asked));
    with_defaults(&mut asked["request"]["object"]);
    asked["request"]["object"]["spec"]["terminationGracePeriodSeconds"] = json!(20);
    asked["request"]["object"]["spec"]["containers"][0]["lifecycle"] = json!({});
    let again = ask_with(&asked, "another-token");
    assert_eq!(again.outcome, ReviewOutcome::Injected);
    let pod = patched(&asked, &again);
    assert_eq!(token_of(&pod), Some("a-new-token"));
    assert!(pod["spec"]["containers"][0]["lifecycle"]["preStop"]["httpGet"]["path"].is_string());
    asked["request"]["object"] = pod;
    assert_eq!(ask(&asked).outcome, ReviewOutcome::Unchanged);
}

#[test]
fn an_injected_pod_that_is_not_understood_any_more_keeps_its_sidecar() {
    let mut asked = deployment();
    asked["request"]["object"] = patched(&asked, &ask(&asked));
    asked["request"]["object"]["spec"]["hostNetwork"] = json!(true);
    let again = ask(&asked);
    assert_eq!((&again.outcome, again.answer["response"].get("patch")), (&ReviewOutcome::Unchanged, None));
    assert!(warnings(&again)[0].contains("stays unchanged: hostNetwork"), "{:?}", warnings(&again));
}

#[test]
fn a_pod_that_is_not_understood_is_allowed_with_a_warning_that_says_why() {
    let mut asked = deployment();
    asked["request"]["object"]["spec"]["hostNetwork"] = json!(true);
    let reviewed = ask(&asked);
    assert!(matches!(&reviewed.outcome, ReviewOutcome::Skipped(why) if why.contains("hostNetwork")));
    assert_eq!(
        warnings(&reviewed),
        [
            "lameduck: not injected: hostNetwork: the proxy's ports would be the node's: start the app by `lameduck run` instead"
        ]
    );
    assert_eq!(reviewed.answer["response"].get("patch"), None);
}

#[test]
fn a_disabled_pod_is_allowed_without_a_warning() {
    for place in ["labels", "annotations"] {
        let mut asked = deployment();
        asked["request"]["object"]["metadata"][place] = json!({ INJECT: "disabled" });
        let reviewed = ask(&asked);
        assert_eq!((&reviewed.outcome, warnings(&reviewed).len()), (&ReviewOutcome::Unchanged, 0));
    }
}

#[test]
fn anything_but_a_new_pod_is_allowed_untouched() {
    let changes: [(&str, Value); 7] = [
        ("/request/operation", json!("DELETE")),
        ("/request/operation", json!("UPDATE")),
        ("/request/operation", json!("CONNECT")),
        ("/request/kind/kind", json!("Deployment")),
        ("/request/kind/group", json!("apps")),
        ("/request/kind/version", json!("v2")),
        ("/request/subResource", json!("eviction")),
    ];
    for (place, value) in changes {
        let mut asked = deployment();
        asked["request"]["subResource"] = json!("");
        *asked.pointer_mut(place).expect("a place") = value.clone();
        let reviewed = ask(&asked);
        assert_eq!(
            (&reviewed.outcome, warnings(&reviewed).len()),
            (&ReviewOutcome::Unchanged, 0),
            "{place} {value}"
        );
    }
}

#[test]
fn a_warning_is_one_short_line() {
    let mut asked = deployment();
    let text = format!("é\n{}", "ü".repeat(400));
    asked["request"]["object"]["metadata"]["annotations"] = json!({ "lameduck.dev/container": text });
    let all = warnings(&ask(&asked));
    assert!(all[0].len() <= 256 && all[0].starts_with("lameduck: ") && !all[0].contains('\n'), "{all:?}");
}

#[test]
fn input_that_is_not_a_review_is_refused() {
    let mut beta = deployment();
    beta["apiVersion"] = json!("admission.k8s.io/v1beta1");
    let mut anonymous = deployment();
    anonymous["request"]["uid"] = json!("");
    let texts = ["", "x", "[]", "null", "{}", "{\"request\":{}}", &beta.to_string(), &anonymous.to_string()];
    for text in texts {
        assert!(review(text.as_bytes(), &settings(), String::new).is_err(), "{text}");
        assert!(allowed_anyway(text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn after_an_error_of_ours_the_pod_goes_on_as_it_is() {
    let reviewed = allowed_anyway(DEPLOYMENT.as_bytes()).expect("an answer");
    let response = &reviewed.answer["response"];
    assert_eq!((&response["allowed"], response.get("patch")), (&json!(true), None));
    assert!(matches!(reviewed.outcome, ReviewOutcome::Failed(_)) && warnings(&reviewed).len() == 1);
}

/// A small generator with a seed (Knuth's MMIX constants).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn value(&mut self, depth: usize) -> Value {
        match self.below(if depth == 0 { 5 } else { 7 }) {
            0 => Value::Null,
            1 => json!(self.below(2) == 0),
            2 => json!(self.below(70_000)),
            3 => json!(
                ["", "http", "lameduck", "Always", "enabled", "disabled", "9s", "\u{0}é"][self.below(8)]
            ),
            4 => json!(-1.5),
            5 => (0..self.below(3)).map(|_| self.value(depth - 1)).collect(),
            _ => json!({ "name": self.value(depth - 1), "value": self.value(depth - 1) }),
        }
    }

    /// Replaces or removes a value somewhere in the document.
    fn change(&mut self, value: &mut Value) {
        match value {
            Value::Object(object) if !object.is_empty() && self.below(8) > 0 => {
                let key = object.keys().nth(self.below(object.len())).expect("a key").clone();
                if self.below(20) == 0 {
                    object.remove(&key);
                } else {
                    self.change(&mut object[&key]);
                }
            }
            Value::Array(array) if !array.is_empty() && self.below(8) > 0 => {
                let at = self.below(array.len());
                self.change(&mut array[at]);
            }
            other => *other = self.value(3),
        }
    }
}

#[test]
fn any_input_is_answered_or_refused_without_a_panic() {
    let mut kinds = [0usize; 2];
    for seed in 0..4000 {
        let mut random = Random(seed);
        let mut asked = deployment();
        if random.below(2) == 0 {
            asked["request"]["object"] = patched(&asked, &ask(&asked));
        }
        for _ in 0..=random.below(4) {
            random.change(&mut asked);
        }
        let mut bytes = serde_json::to_vec(&asked).expect("JSON");
        if random.below(4) == 0 {
            let at = random.below(bytes.len());
            bytes[at] = random.below(256) as u8;
        }
        match review(&bytes, &settings(), || "t".to_owned()) {
            Ok(reviewed) => {
                kinds[0] += 1;
                assert_eq!(reviewed.answer["response"]["allowed"], true, "seed {seed}");
                if reviewed.outcome == ReviewOutcome::Injected
                    && let Ok(asked) = serde_json::from_slice(&bytes)
                {
                    let _ = patched(&asked, &reviewed);
                }
            }
            Err(_) => kinds[1] += 1,
        }
    }
    assert!(kinds.iter().all(|kind| *kind > 100), "one kind is too rare: {kinds:?}");
}

#[test]
fn a_skip_is_an_event_of_the_deployment_too_and_none_of_a_batch_job_without_a_port() {
    let subjects = |asked: &Value| -> Vec<(String, String)> {
        let told = events(&ask(asked));
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        assert!(told.iter().all(|event| event["note"] == told[0]["note"]), "{told:?}");
        told.iter()
            .map(|event| &event["regarding"])
            .map(|about| (text(&about["kind"]), text(&about["name"])))
            .collect()
    };
    let pair = |kind: &str, name: &str| (kind.to_owned(), name.to_owned());
    let mut asked = deployment();
    assert_eq!(subjects(&asked), [], "it is injected");
    asked["request"]["object"]["spec"]["hostNetwork"] = json!(true);
    let both = [pair("Deployment", "slow"), pair("ReplicaSet", "slow-6c8d5f7b9c")];
    assert_eq!(subjects(&asked), both);
    // Not made by a Deployment.
    asked["request"]["object"]["metadata"]["ownerReferences"][0]["name"] = json!("other");
    assert_eq!(subjects(&asked), [pair("ReplicaSet", "other")]);
    asked["request"]["object"]["metadata"]["ownerReferences"][0]["kind"] = json!("Job");
    assert_eq!(subjects(&asked), [pair("Job", "other")]);
    let spec = &mut asked["request"]["object"]["spec"];
    spec["hostNetwork"] = json!(false);
    spec["containers"][0]["ports"] = json!([]);
    assert_eq!(ask(&asked).outcome, ReviewOutcome::Injected);
    asked["request"]["object"]["metadata"]["annotations"]["lameduck.dev/capture"] = json!("port-name");
    assert_eq!(subjects(&asked), []);
    assert!(matches!(ask(&asked).outcome, ReviewOutcome::Skipped(_)));
    asked["request"]["object"]["metadata"]["ownerReferences"][0]["kind"] = json!("ReplicaSet");
    assert_eq!(subjects(&asked), [pair("ReplicaSet", "other")]);
}
