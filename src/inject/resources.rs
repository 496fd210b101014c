//! The sidecar's resource requests and limits, chosen so that the pod keeps its QoS class. Pure.

use serde_json::{Map, Value, json};

/// Requests that suffice for an idle proxy with a few hundred connections.
const REQUESTS: (&str, &str) = ("10m", "24Mi");
/// Limits equal requests in a Guaranteed pod, and a proxy short of CPU would delay every request.
const GUARANTEED: (&str, &str) = ("200m", "64Mi");

/// The sidecar's `resources`, and a warning if the annotations change the pod's QoS class. `requested` are `cpu-request`,
/// `memory-request`, `cpu-limit` and `memory-limit`.
pub fn resources(spec: &Map<String, Value>, requested: &[Option<String>; 4]) -> (Value, Option<String>) {
    let [cpu_request, memory_request, cpu_limit, memory_limit] = requested;
    let guaranteed = guaranteed(spec);
    let (cpu, memory) = if guaranteed { GUARANTEED } else { REQUESTS };
    let pick = |first: &Option<String>, second: &Option<String>, default: &str| {
        first.clone().or_else(|| second.clone()).unwrap_or_else(|| default.to_owned())
    };
    let requests = json!({
        "cpu": pick(cpu_request, cpu_limit, cpu),
        "memory": pick(memory_request, memory_limit, memory),
    });
    let limits = if guaranteed {
        json!({
            "cpu": pick(cpu_limit, cpu_request, cpu),
            "memory": pick(memory_limit, memory_request, memory),
        })
    } else {
        let given = [("cpu", cpu_limit), ("memory", memory_limit)];
        let set = given.into_iter().filter_map(|(key, value)| Some((key.to_owned(), json!(value.as_ref()?))));
        Value::Object(set.collect())
    };
    let differ = guaranteed && !["cpu", "memory"].iter().all(|key| equal(&requests[key], &limits[key]));
    let warning = "the pod is no longer Guaranteed: the sidecar's annotated requests and limits differ";
    let mut resources = json!({ "requests": requests });
    if limits.as_object().is_some_and(|limits| !limits.is_empty()) {
        resources = json!({ "limits": limits, "requests": resources["requests"] });
    }
    (resources, differ.then(|| warning.to_owned()))
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
    a == b || amount(a).zip(amount(b)).is_some_and(|(a, b)| (a - b).abs() <= a.abs() * 1e-9)
}

fn amount(quantity: &Value) -> Option<f64> {
    const UNITS: [(&str, f64); 14] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("", 1.0),
    ];
    let text = quantity.as_str().map_or_else(|| quantity.to_string(), str::to_owned);
    let (digits, unit) = UNITS.iter().find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, unit)))?;
    digits.parse::<f64>().ok().map(|number| number * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(spec: Value, requested: [Option<&str>; 4]) -> (Value, Option<String>) {
        resources(spec.as_object().unwrap(), &requested.map(|wish| wish.map(str::to_owned)))
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
