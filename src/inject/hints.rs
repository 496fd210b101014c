//! Finds annotations and labels that are meant for us and mean nothing where they are. Pure.

use serde_json::{Map, Value};

use super::names::{DISABLED, INJECT, PREFIX};

/// Similarity from 0 to 1 from which a name is taken for a mistyped one.
const SIMILAR: f32 = 0.6;

/// Why its owner does not want a pod to be injected, by a label or an annotation in its metadata; none if they do.
pub fn opted_out(metadata: &Value) -> Option<String> {
    let places = [&metadata["labels"], &metadata["annotations"]];
    let mut values = places.iter().filter_map(|place| place[INJECT].as_str());
    let no = |value: &&str| ["false", "no", "off", "never", "0"].contains(&value.to_lowercase().as_str());
    match values.clone().any(|value| value == "disabled") {
        true => Some(DISABLED.to_owned()),
        false => values.find(no).map(|value| format!("{INJECT} is '{value}': write disabled")),
    }
}

/// The hint for an annotation with our prefix that nothing reads. `names` are all that mean something.
pub fn unknown(name: &str, names: &[&str]) -> String {
    let typed = name.to_lowercase().replace(['_', '.'], "-");
    let near = similar::get_close_matches(typed.as_str(), names, 1, SIMILAR);
    let hint = near.first().map(|near| format!(": do you mean {PREFIX}{near}?")).unwrap_or_default();
    format!("annotation {PREFIX}{name} means nothing{hint}")
}

/// Hints about the labels and annotations of a pod.
pub fn of_pod(labels: &Map<String, Value>, annotations: &Map<String, Value>) -> Vec<String> {
    let mut hints = Vec::new();
    for (place, key) in keys("label", labels).chain(keys("annotation", annotations)) {
        let prefix = key.split_once('/').map_or("", |(prefix, _)| prefix);
        let near = prefix.replace(['-', '_'], "").to_lowercase().contains("lameduck");
        if key.starts_with(PREFIX) && place == "label" && key != INJECT {
            hints.push(format!("label {key} means nothing: make it an annotation"));
        } else if near && !key.starts_with(PREFIX) {
            hints.push(format!("{place} {key} means nothing: the prefix is {PREFIX}"));
        }
    }
    if annotations.contains_key(INJECT) && !labels.contains_key(INJECT) {
        hints.push(format!("annotation {INJECT} is not seen by the webhook: make it a label"));
    }
    let value = labels.get(INJECT).or(annotations.get(INJECT)).and_then(Value::as_str);
    if let Some(value) = value.filter(|value| *value != "enabled") {
        hints.push(format!("{INJECT}: '{value}' is not seen by the webhook: write enabled or disabled"));
    }
    hints
}

/// Hints about what stands on a workload and belongs on its pod template. (`disabled` is read there too.)
pub fn of_workload(metadata: &Value) -> Vec<String> {
    let of = |key: &str| metadata[key].as_object().cloned().unwrap_or_default();
    let (labels, annotations) = (of("labels"), of("annotations"));
    let ours = keys("label", &labels).chain(keys("annotation", &annotations));
    ours.filter(|(_, key)| key.starts_with(PREFIX))
        .map(|(place, key)| format!("{place} {key} means nothing here: it belongs on the pod template"))
        .collect()
}

fn keys<'a>(
    place: &'static str,
    of: &'a Map<String, Value>,
) -> impl Iterator<Item = (&'static str, &'a str)> {
    of.keys().map(move |key| (place, key.as_str()))
}
