//! The sidecar's resource requests and limits, chosen so that the pod keeps its QoS class. Pure.

use serde_json::{Map, Value, json};

use super::quantity::amount;

/// Requests that suffice for an idle proxy with a few hundred connections.
const REQUESTS: (&str, &str) = ("10m", "24Mi");
/// Limits equal requests in a Guaranteed pod, and a proxy short of CPU would delay every request.
const GUARANTEED: (&str, &str) = ("200m", "64Mi");

/// `cpu-request`, `memory-request`, `cpu-limit` and `memory-limit`.
type Requested = [Option<String>; 4];

/// The sidecar's `resources`, and a warning if the annotations change the pod's QoS class. `defaults` are for what is not
/// `requested`; in a Guaranteed pod their limits are the requests as well.
///
/// # Errors
/// A request is over its limit: the API server would refuse the pod.
pub fn resources(
    spec: &Map<String, Value>,
    requested: &Requested,
    defaults: &Requested,
) -> Result<(Value, Option<String>), String> {
    let guaranteed = guaranteed(spec);
    let (mut requests, mut limits) = (Map::new(), Map::new());
    for (n, key) in ["cpu", "memory"].into_iter().enumerate() {
        let (request, limit) = (&requested[n], &requested[n + 2]);
        let (usual_request, usual_limit) = (&defaults[n], &defaults[n + 2]);
        let small = [REQUESTS.0, REQUESTS.1][n].to_owned();
        let equal = usual_limit.clone().or_else(|| usual_request.clone());
        let equal = equal.unwrap_or_else(|| [GUARANTEED.0, GUARANTEED.1][n].to_owned());
        let (other_request, other_limit) = match guaranteed {
            true => (equal.clone(), limit.as_ref().or(request.as_ref()).cloned().or(Some(equal))),
            false => {
                (usual_request.clone().unwrap_or(small), limit.as_ref().or(usual_limit.as_ref()).cloned())
            }
        };
        let request = request.as_ref().or(limit.as_ref()).cloned().unwrap_or(other_request);
        if let Some(limit) = other_limit {
            if amount(&request)? > amount(&limit)? {
                return Err(format!("the sidecar's {key}-request {request} is over its {key}-limit {limit}"));
            }
            limits.insert(key.to_owned(), json!(limit));
        }
        requests.insert(key.to_owned(), json!(request));
    }
    let differ = guaranteed && !["cpu", "memory"].iter().all(|key| equal(&requests[*key], &limits[*key]));
    let warning = "the pod is no longer Guaranteed: the sidecar's annotated requests and limits differ";
    let resources = match limits.is_empty() {
        true => json!({ "requests": requests }),
        false => json!({ "limits": limits, "requests": requests }),
    };
    Ok((resources, differ.then(|| warning.to_owned())))
}

/// Whether the pod is Guaranteed: every container has CPU and memory limits, and its requests are equal or omitted
/// (Kubernetes, "Pod Quality of Service Classes").
fn guaranteed(spec: &Map<String, Value>) -> bool {
    let containers = ["containers", "initContainers"];
    let mut all = containers.iter().filter_map(|key| spec.get(*key)).filter_map(Value::as_array).flatten();
    all.all(|container| {
        let resources = &container["resources"];
        ["cpu", "memory"].iter().all(|key| {
            let (limit, request) = (&resources["limits"][key], &resources["requests"][key]);
            !limit.is_null() && (request.is_null() || equal(request, limit))
        })
    })
}

/// Whether two quantities are the same amount, such as `1` and `1000m`.
fn equal(a: &Value, b: &Value) -> bool {
    let read = |value: &Value| amount(&value.as_str().map_or_else(|| value.to_string(), str::to_owned)).ok();
    a == b || read(a).zip(read(b)).is_some_and(|(a, b)| (a - b).abs() <= a.abs() * 1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(
        spec: &Value,
        requested: [Option<&str>; 4],
        defaults: [Option<&str>; 4],
    ) -> Result<Value, String> {
        let owned = |wishes: [Option<&str>; 4]| wishes.map(|wish| wish.map(str::to_owned));
        resources(spec.as_object().unwrap(), &owned(requested), &owned(defaults)).map(|(ours, _)| ours)
    }

    fn of(spec: Value, requested: [Option<&str>; 4]) -> (Value, Option<String>) {
        let requested = requested.map(|wish| wish.map(str::to_owned));
        resources(spec.as_object().unwrap(), &requested, &[const { None }; 4]).unwrap()
    }

    #[test]
    fn defaults_are_for_what_the_pod_does_not_say() {
        let burstable = json!({"containers": [{}]});
        let defaults = [None, Some("32Mi"), Some("500m"), Some("64Mi")];
        let ours = with(&burstable, [None; 4], defaults).unwrap();
        let limits = json!({"cpu": "500m", "memory": "64Mi"});
        assert_eq!(ours, json!({"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": limits}));
        let ours = with(&burstable, [None, None, None, Some("48Mi")], defaults).unwrap();
        assert_eq!(
            (&ours["requests"]["memory"], &ours["limits"]["memory"]),
            (&json!("48Mi"), &json!("48Mi"))
        );
        let why = with(&burstable, [Some("1"), None, None, None], defaults).unwrap_err();
        assert!(why.contains("cpu-request 1 is over its cpu-limit 500m"), "{why}");
        let guaranteed = json!({"containers": [{"resources": {"limits": {"cpu": 1, "memory": "1Gi"}}}]});
        let ours = with(&guaranteed, [None; 4], defaults).unwrap();
        assert_eq!((&ours["requests"], &ours["limits"]), (&limits, &limits), "it stays Guaranteed");
    }

    #[test]
    fn a_guaranteed_pod_stays_guaranteed() {
        let limits = json!({"cpu": 1, "memory": "64Mi"});
        let spec = json!({"containers": [{"resources": {"limits": limits, "requests": {"cpu": "1000m"}}}]});
        let (ours, warning) = of(spec.clone(), [None; 4]);
        assert_eq!((&ours["limits"], warning), (&ours["requests"], None));
        let (ours, warning) = of(spec.clone(), [None, None, Some("1"), None]);
        assert_eq!((&ours["requests"]["cpu"], warning), (&json!("1"), None));
        let (_, warning) = of(spec, [Some("1m"), None, Some("1"), None]);
        assert!(warning.unwrap().contains("no longer Guaranteed"));
    }

    #[test]
    fn any_other_pod_gets_small_requests_and_no_limits() {
        let spec = json!({"containers": [{"resources": {"limits": {"cpu": 1, "memory": "1Gi"}}}, {}]});
        let (ours, warning) = of(spec.clone(), [None; 4]);
        assert_eq!((ours, warning), (json!({"requests": {"cpu": "10m", "memory": "24Mi"}}), None));
        let (ours, _) = of(spec, [Some("1"), None, None, Some("32Mi")]);
        assert_eq!(ours, json!({"requests": {"cpu": "1", "memory": "32Mi"}, "limits": {"memory": "32Mi"}}));
    }
}
