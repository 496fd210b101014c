//! Parses the `lameduck.dev/*` annotations of a pod. Pure.

use std::time::Duration;

use serde_json::{Map, Value};

use super::model::{Annotations, CaptureWay, Pid1};
use super::names::{PREFIX, PRELOAD, PROGRAM, PULL_POLICIES, SHARE_DIR};
use super::quantity;
use crate::config::CaptureRule;

/// Annotations that are no flags of the proxy.
pub const NAMES: [&str; 18] = [
    "inject",
    "capture",
    "ports",
    "container",
    "port",
    "app-port",
    "app-socket",
    "proxy-port",
    "probe-port",
    "sidecar",
    "grace",
    "pid1",
    "image",
    "image-pull-policy",
    "cpu-request",
    "memory-request",
    "cpu-limit",
    "memory-limit",
];

/// Parses the annotations of a pod. `flags` are the flags of the proxy that an annotation can set.
///
/// # Errors
/// Names the annotation whose value is invalid.
pub fn read(written: &Map<String, Value>, flags: &[String]) -> Result<Annotations, String> {
    let mut annotations = Annotations::default();
    for (key, value) in written {
        let Some(name) = key.strip_prefix(PREFIX) else { continue };
        let value = value.as_str().ok_or_else(|| format!("annotation {key} is no string"))?;
        set(&mut annotations, name, value, flags).map_err(|why| format!("annotation {key}: {why}"))?;
    }
    annotations.unasked = annotations.capture.is_none() && !annotations.place_the_proxy();
    // An ordinary sidecar may start after the app, which then has no shim to load.
    if annotations.unasked && !annotations.ordinary {
        annotations.capture = Some(CaptureWay::Loopback);
    }
    Ok(annotations)
}

fn set(annotations: &mut Annotations, name: &str, value: &str, flags: &[String]) -> Result<(), String> {
    let text = || Some(value.to_owned());
    match name {
        "inject" | "injected" | "warnings" => {}
        "capture" => {
            annotations.capture = Some(match value {
                "loopback" => CaptureWay::Loopback,
                "port-name" => CaptureWay::PortName,
                "port-env" => CaptureWay::PortEnv,
                _ => return Err(format!("'{value}' is none of loopback, port-name, port-env")),
            });
        }
        "ports" => annotations.ports = rules(value)?,
        "container" => annotations.container = text(),
        "port" => annotations.port = text(),
        "app-port" => annotations.app_port = Some(port(value)?),
        "app-socket" => annotations.app_socket = Some(socket(value)?),
        "proxy-port" => annotations.proxy_port = Some(port(value)?),
        "probe-port" => annotations.probe_port = Some(port(value)?),
        "sidecar" => {
            annotations.ordinary = match value {
                "native" => false,
                "ordinary" => true,
                _ => return Err(format!("'{value}' is neither native nor ordinary")),
            }
        }
        "grace" => annotations.grace = Some(seconds(value)?),
        "pid1" => {
            annotations.pid1 = match value {
                "preload" => Pid1::Preload,
                "share" => Pid1::Share,
                "leave" => Pid1::Leave,
                _ => return Err(format!("'{value}' is none of preload, share, leave")),
            }
        }
        "image" => annotations.image = Some(image(value)?),
        "image-pull-policy" => annotations.pull_policy = Some(pull_policy(value)?),
        "cpu-request" => annotations.resources[0] = Some(quantity::parse(value)?),
        "memory-request" => annotations.resources[1] = Some(quantity::parse(value)?),
        "cpu-limit" => annotations.resources[2] = Some(quantity::parse(value)?),
        "memory-limit" => annotations.resources[3] = Some(quantity::parse(value)?),
        flag if flags.iter().any(|known| known == flag) => {
            annotations.flags.push((name.to_owned(), value.to_owned()));
        }
        _ => annotations.unknown.push(name.to_owned()),
    }
    Ok(())
}

fn port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|port| *port != 0).ok_or_else(|| format!("'{text}' is not a port"))
}

/// `8080=http 9000=tcp`: each port once, separated by spaces or commas.
fn rules(text: &str) -> Result<Vec<CaptureRule>, String> {
    let mut rules: Vec<CaptureRule> = Vec::new();
    for word in text.split([' ', ',', '\n']).filter(|word| !word.is_empty()) {
        let rule: CaptureRule = word.parse()?;
        if rules.iter().any(|other| other.port == rule.port) {
            return Err(format!("'{text}' has port {} twice", rule.port));
        }
        rules.push(rule);
    }
    Ok(rules)
}

/// An image's name, as far as the API server checks it.
///
/// # Errors
/// The text for the user.
pub fn image(text: &str) -> Result<String, String> {
    match text.is_empty() || text.contains(char::is_whitespace) {
        true => Err(format!("'{text}' is not an image")),
        false => Ok(text.to_owned()),
    }
}

fn pull_policy(text: &str) -> Result<String, String> {
    match PULL_POLICIES.contains(&text) {
        true => Ok(text.to_owned()),
        false => Err(format!("'{text}' is none of {}", PULL_POLICIES.join(", "))),
    }
}

/// The socket gets its own file in the directory that the app and the sidecar share.
fn socket(text: &str) -> Result<String, String> {
    let name = text.strip_prefix(SHARE_DIR).and_then(|rest| rest.strip_prefix('/')).unwrap_or_default();
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) && name.len() < 80;
    if name.is_empty()
        || name.starts_with('.')
        || !plain
        || ["control.sock", PRELOAD, PROGRAM].contains(&name)
    {
        return Err(format!("'{text}' is no file of its own in {SHARE_DIR}: write {SHARE_DIR}/app.sock"));
    }
    Ok(text.to_owned())
}

fn seconds(text: &str) -> Result<u64, String> {
    let time =
        humantime::parse_duration(text).map_err(|_| format!("'{text}' is not a time: write 75s or 2m"))?;
    let whole = time == Duration::from_secs(time.as_secs()) && !time.is_zero();
    whole.then_some(time.as_secs()).ok_or_else(|| format!("'{text}' is not a whole number of seconds over 0"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read_json(value: Value) -> Result<Annotations, String> {
        read(value.as_object().unwrap(), &["lame-duck".to_owned()])
    }

    #[test]
    fn annotations_say_what_is_wanted() {
        let annotations = read_json(json!({
            "other/x": "y", "lameduck.dev/grace": "1m15s", "lameduck.dev/pid1": "share", "lameduck.dev/sidecar": "ordinary",
            "lameduck.dev/app-port": "8081", "lameduck.dev/lame-duck": "9s", "lameduck.dev/garce": "1s",
        }));
        let annotations = annotations.unwrap();
        assert_eq!(
            (annotations.grace, annotations.pid1, annotations.ordinary),
            (Some(75), Pid1::Share, true)
        );
        assert_eq!((annotations.app_port, annotations.unknown), (Some(8081), vec!["garce".to_owned()]));
        assert_eq!(annotations.flags, [("lame-duck".to_owned(), "9s".to_owned())]);
    }

    #[test]
    fn a_wrong_value_is_told() {
        for (key, value) in [
            ("app-port", "0"),
            ("app-socket", "/tmp/app.sock"),
            ("app-socket", "/run/lameduck/../x"),
            ("grace", "1.5s"),
            ("pid1", "on"),
            ("sidecar", "x"),
            ("capture", "on"),
            ("ports", "8080"),
            ("ports", "8080=http 8080=tcp"),
            ("grace", "10"),
            ("image-pull-policy", "never"),
            ("image", "lame duck"),
            ("cpu-limit", "lots"),
            ("memory-request", "64mb"),
        ] {
            let key = format!("{PREFIX}{key}");
            let error = read_json(json!({ &key: value })).unwrap_err();
            assert!(error.starts_with(&format!("annotation {key}: '{value}'")), "{error}");
        }
        assert!(read_json(json!({"lameduck.dev/grace": 5})).unwrap_err().contains("no string"));
    }
}
