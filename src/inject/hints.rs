//! Finds annotations and labels that are meant for us and mean nothing where they are. Pure.

use serde_json::{Map, Value};

use super::names::{DISABLED, INJECT, PREFIX};

/// Similarity from 0 to 1 from which a name is taken for a mistyped one.
const SIMILAR: f32 = 0.6;
/// The same for the whole of [`INJECT`], most of which is the prefix.
const NEAR_INJECT: f32 = 0.85;
/// Limit on the hints for one pod, each of which takes a comparison with every name.
pub const MAX_HINTS: usize = 20;

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
        if hints.len() == MAX_HINTS {
            break;
        }
        match key.strip_prefix(PREFIX) {
            Some(_) if place == "label" && key != INJECT => {
                let mistyped = !similar::get_close_matches(key, &[INJECT], 1, NEAR_INJECT).is_empty();
                let right =
                    if mistyped { format!("do you mean {INJECT}?") } else { "make it an annotation".into() };
                hints.push(format!("label {key} means nothing: {right}"));
            }
            None if is_near(key) => {
                hints.push(format!("{place} {key} means nothing: the prefix is {PREFIX}"));
            }
            Some(_) | None => {}
        }
    }
    if annotations.contains_key(INJECT) && !labels.contains_key(INJECT) {
        hints.push(format!("annotation {INJECT} is not seen by the webhook: make it a label"));
    }
    hints.extend(of_value(labels.get(INJECT).or(annotations.get(INJECT))));
    hints
}

/// The hint about a value of [`INJECT`] that means nothing.
pub fn of_value(value: Option<&Value>) -> Option<String> {
    let value = value?.as_str().filter(|value| !["enabled", "disabled"].contains(value))?;
    Some(format!("{INJECT}: '{value}' is not seen by the webhook: write enabled or disabled"))
}

/// Hints about what stands on a workload and belongs on its pod template. (`disabled` is read there too.)
pub fn of_workload(metadata: &Value) -> Vec<String> {
    let of = |key: &str| metadata[key].as_object().cloned().unwrap_or_default();
    let (labels, annotations) = (of("labels"), of("annotations"));
    let ours = keys("label", &labels).chain(keys("annotation", &annotations));
    let belongs = "it belongs on the pod template";
    let hint = |(place, key): (&str, &str)| match key.starts_with(PREFIX) {
        true => Some(format!("{place} {key} means nothing here: {belongs}")),
        false if is_near(key) => {
            Some(format!("{place} {key} means nothing: the prefix is {PREFIX}, and {belongs}"))
        }
        false => None,
    };
    ours.filter_map(hint).collect()
}

/// Whether a key has a prefix that only resembles ours.
fn is_near(key: &str) -> bool {
    let prefix = key.split_once('/').map_or("", |(prefix, _)| prefix);
    !key.starts_with(PREFIX) && prefix.replace(['-', '_'], "").to_lowercase().contains("lameduck")
}

fn keys<'a>(
    place: &'static str,
    of: &'a Map<String, Value>,
) -> impl Iterator<Item = (&'static str, &'a str)> {
    of.keys().map(move |key| (place, key.as_str()))
}
