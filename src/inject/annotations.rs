//! Parses the `lameduck.dev/*` annotations of a pod. Pure.

use std::time::Duration;

use serde_json::{Map, Value};

use super::model::{Annotations, Pid1};
use super::names::{PREFIX, PRELOAD, PROGRAM, SHARE_DIR};

/// Parses the annotations of a pod. `is_flag` returns whether a name is a flag of the proxy.
///
/// # Errors
/// Names the annotation whose value is invalid.
pub fn read(written: &Map<String, Value>, is_flag: fn(&str) -> bool) -> Result<Annotations, String> {
    let mut annotations = Annotations::default();
    for (key, value) in written {
        let Some(name) = key.strip_prefix(PREFIX) else { continue };
        let value = value.as_str().ok_or_else(|| format!("annotation {key} is no string"))?;
        set(&mut annotations, name, value, is_flag).map_err(|why| format!("annotation {key}: {why}"))?;
    }
    Ok(annotations)
}

fn set(
    annotations: &mut Annotations,
    name: &str,
    value: &str,
    is_flag: fn(&str) -> bool,
) -> Result<(), String> {
    let text = || Some(value.to_owned());
    match name {
        "inject" | "injected" => {}
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
        "image" => annotations.image = text(),
        "image-pull-policy" => annotations.pull_policy = text(),
        "cpu-request" => annotations.resources[0] = text(),
        "memory-request" => annotations.resources[1] = text(),
        "cpu-limit" => annotations.resources[2] = text(),
        "memory-limit" => annotations.resources[3] = text(),
        flag if is_flag(flag) => annotations.flags.push((name.to_owned(), value.to_owned())),
        _ => annotations.unknown.push(name.to_owned()),
    }
    Ok(())
}

fn port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|port| *port != 0).ok_or_else(|| format!("'{text}' is not a port"))
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
        read(value.as_object().unwrap(), |name| name == "lame-duck")
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
            ("grace", "10"),
        ] {
            let key = format!("{PREFIX}{key}");
            let error = read_json(json!({ &key: value })).unwrap_err();
            assert!(error.starts_with(&format!("annotation {key}: '{value}'")), "{error}");
        }
        assert!(read_json(json!({"lameduck.dev/grace": 5})).unwrap_err().contains("no string"));
    }
}
