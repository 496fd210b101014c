//! The app's preStop hook: what the user wrote, and what replaces it. Pure.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::json::{ports, put_back, put_empties_back};
use super::model::{Annotations, OwnHook, PatchSettings, Plan};
use super::names::{CONTROL_ADDR, OWN_HOOK_RESERVE, PROGRAM, SHARE_DIR};
use crate::config::APP_IP;

/// Reads the user's own hook; none if the container has none.
///
/// # Errors
/// Says why the hook can't be kept.
pub fn own(app: &Map<String, Value>, plan: Option<&Plan>) -> Result<Option<OwnHook>, String> {
    let hook = app.get("lifecycle").and_then(|lifecycle| lifecycle.get("preStop"));
    let Some(hook) = hook.filter(|hook| !hook.is_null()) else { return Ok(None) };
    if let Some(seconds) = hook["sleep"]["seconds"].as_u64() {
        return Ok(Some(OwnHook::Sleep(seconds)));
    }
    if let Some(get) = hook.get("httpGet") {
        return own_get(get, app, plan).map(Some).map_err(|why| format!("its own preStop httpGet {why}"));
    }
    let words = hook["exec"]["command"].as_array().filter(|words| !words.is_empty());
    let words: Option<Vec<String>> =
        words.and_then(|words| words.iter().map(|word| Some(word.as_str()?.to_owned())).collect());
    let words = words.ok_or("its own preStop is neither a sleep, an httpGet nor an exec")?;
    Ok(Some(sleep(&words).map_or(OwnHook::Exec(words), OwnHook::Sleep)))
}

/// The hooks of all containers as one list.
///
/// # Errors
/// The proxy could not run them all.
pub fn together(owns: &[Option<OwnHook>]) -> Result<Vec<OwnHook>, String> {
    let all: Vec<OwnHook> = owns.iter().flatten().cloned().collect();
    match all.iter().filter(|own| matches!(own, OwnHook::Get { .. })).count() {
        0 | 1 => Ok(all),
        _ => Err("several of its containers have a preStop httpGet, and the proxy sends only one: make the others an \
                  exec, or choose a container by lameduck.dev/container"
            .to_owned()),
    }
}

/// Warnings for the owner, each once.
pub fn warnings(own: &[OwnHook], annotations: &Annotations) -> Vec<String> {
    let mut all: Vec<_> = own.iter().filter_map(|own| warning(own, annotations)).collect();
    all.dedup();
    all
}

fn warning(own: &OwnHook, annotations: &Annotations) -> Option<String> {
    let kind = match own {
        OwnHook::Sleep(_) => return None,
        OwnHook::Get { .. } => "httpGet",
        OwnHook::Exec(_) => "exec",
    };
    let text = format!(
        "its own preStop {kind} runs after the drain and has {OWN_HOOK_RESERVE}s together with its SIGTERM"
    );
    annotations.flag("reserve").is_none().then(|| text + " (lameduck.dev/reserve)")
}

/// Header fields of the user's hook as flags, for the command line check only: the sidecar gets them from a variable.
pub fn header_flags(own: &[OwnHook]) -> Vec<String> {
    headers(own).map(|header| format!("--after-drain-header={header}")).collect()
}

/// Header fields of the user's httpGet hook.
pub fn headers(own: &[OwnHook]) -> impl Iterator<Item = &str> {
    let headers = own.iter().filter_map(|own| match own {
        OwnHook::Get { headers, .. } => Some(headers),
        OwnHook::Sleep(_) | OwnHook::Exec(_) => None,
    });
    headers.flatten().map(String::as_str)
}

/// Seconds of a `sleep 5`, run directly or by a shell.
fn sleep(words: &[String]) -> Option<u64> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let words = match words.as_slice() {
        [shell, "-c", line] if matches!(base(shell), "sh" | "bash" | "ash") => {
            line.split_whitespace().collect()
        }
        words => words.to_vec(),
    };
    match words.as_slice() {
        [sleep, time] if base(sleep) == "sleep" => time.strip_suffix('s').unwrap_or(time).parse().ok(),
        _ => None,
    }
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The kubelet sends the hook to the pod's IP; the proxy sends it to the app's loopback address.
fn own_get(get: &Value, app: &Map<String, Value>, plan: Option<&Plan>) -> Result<OwnHook, String> {
    if get["host"].as_str().is_some_and(|host| !host.is_empty()) {
        return Err("names a host, which may be another one when the pod asks instead of the node".to_owned());
    }
    if get["scheme"].as_str().is_some_and(|scheme| scheme != "HTTP") {
        return Err("is not plain HTTP, which is all that the proxy can send".to_owned());
    }
    let port = match &get["port"] {
        Value::String(name) => {
            ports(app).find(|port| port["name"] == *name).map(|port| &port["containerPort"])
        }
        number => Some(number),
    };
    let port =
        port.and_then(Value::as_u64).ok_or_else(|| format!("asks port {}, which it hasn't", get["port"]))?;
    let path = format!("/{}", get["path"].as_str().unwrap_or_default().trim_start_matches('/'));
    let url = match plan {
        Some(plan) if port == u64::from(plan.was) => path,
        Some(_) => format!("http://127.0.0.1:{port}{path}"),
        // An app that listens on all addresses, because it has not moved, listens on this one too.
        None => format!("http://{APP_IP}:{port}{path}"),
    };
    let headers = get["httpHeaders"].as_array().into_iter().flatten();
    let header = |header: &Value| {
        let name = header["name"].as_str().ok_or("has a header without a name")?;
        let value = header["value"].as_str().unwrap_or_default();
        let field = format!("{name}: {value}");
        // A header that only the kubelet (Go's http client) would refuse must not become two headers.
        match field.contains('\n') {
            true => Err(format!("has a line break in its header {name}")),
            false => Ok(field),
        }
    };
    Ok(OwnHook::Get { url, headers: headers.map(header).collect::<Result<_, _>>()? })
}

/// The blocking hook. Uses the port number, since a port name is only resolved within the hook's own container.
pub fn blocking(whose: &str, annotations: &Annotations, settings: &PatchSettings) -> Value {
    json!({ "httpGet": {
        "path": format!("/drain?hook={whose}"),
        "port": annotations.probe(),
        "httpHeaders": [{ "name": "Lameduck-Token", "value": settings.token }],
    }})
}

/// The hook of the app's container: the blocking one, or our program, which blocks as well and then runs the user's
/// command.
///
/// # Errors
/// The program would have no way to reach the proxy.
pub fn of_app(
    own: Option<&OwnHook>,
    annotations: &Annotations,
    settings: &PatchSettings,
) -> Result<Value, String> {
    let Some(OwnHook::Exec(words)) = own else { return Ok(blocking("app", annotations, settings)) };
    let control = annotations.flag("control-listen").unwrap_or(CONTROL_ADDR);
    if control == "off" {
        return Err("its own preStop exec waits for the drain by control-listen, which is off".to_owned());
    }
    let program = format!("{SHARE_DIR}/{PROGRAM}");
    let mut command = vec![program, "drain".to_owned(), "--app-hook".to_owned()];
    command.extend([format!("--control={control}"), "--".to_owned()]);
    command.extend(words.iter().cloned());
    Ok(json!({ "exec": { "command": command } }))
}

/// Whether a preStop handler was written by us.
pub fn is_ours(handler: &Value) -> bool {
    let path = handler["httpGet"]["path"].as_str();
    let program = handler["exec"]["command"][0].as_str();
    path.is_some_and(|path| path.starts_with("/drain?hook="))
        || program.and_then(|program| program.strip_prefix(SHARE_DIR)) == Some("/lameduck")
}

/// Puts the owner's preStop handler back in place of ours. `empty` are values that were null or empty.
pub fn restore(container: &mut Map<String, Value>, was: Option<&Value>, empty: &BTreeMap<String, Value>) {
    let Some(lifecycle) = container.get_mut("lifecycle").and_then(Value::as_object_mut) else { return };
    if lifecycle.get("preStop").is_some_and(is_ours) {
        put_back(lifecycle, "preStop", was.cloned());
        put_empties_back(lifecycle, &["preStop"], empty);
    }
    if lifecycle.is_empty() {
        container.remove("lifecycle");
    }
}

/// Redirects a probe to the proxy, for an app on a unix socket, which the kubelet can't reach. Returns the request that
/// the proxy sends to the app.
///
/// # Errors
/// The probe is not an HTTP GET of a path.
pub fn to_app_probe(place: &str, handler: &mut Map<String, Value>, probe: u16) -> Result<String, String> {
    let text = |key: &str| handler.get(key).and_then(Value::as_str).unwrap_or_default();
    if !place.ends_with(".httpGet") || !matches!(text("scheme"), "" | "HTTP") || !text("host").is_empty() {
        return Err(format!("its {place} can't ask an app on a unix socket: only a plain httpGet can"));
    }
    let target = format!("/{}", text("path").trim_start_matches('/'));
    handler.insert("path".to_owned(), json!(format!("/app-probe{target}")));
    handler.insert("port".to_owned(), json!(probe));
    Ok(target)
}

/// Warning about a postStart httpGet that goes through the proxy. The kubelet sends it once, as soon as the container
/// runs, starts no other container meanwhile, and treats every response as success (`runHTTPHandler`).
///
/// # Errors
/// The request would never reach the app.
pub fn post_start(place: &str, annotations: &Annotations) -> Result<String, String> {
    if annotations.ordinary {
        return Err(format!(
            "its {place} asks an app on a unix socket by the sidecar, which starts after it"
        ));
    }
    Ok(format!(
        "its {place} is lost if the app does not listen yet: an app on a unix socket isn't restarted for that"
    ))
}
