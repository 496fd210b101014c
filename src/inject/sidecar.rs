//! The sidecar's container and its hooks, as JSON. Pure.

use std::time::Duration;

use serde_json::{Value, json};

use super::hooks;
use super::model::{OwnHook, Parts};
use super::names::{AFTER_DRAIN_HEADER_ENV, OWN_HOOK_RESERVE, SHARE_DIR, SIDECAR, TOKEN_ENV};

/// An unprivileged user, as the restricted Pod Security Standard requires.
pub const USER: u64 = 65532;
/// The proxy's default for `--lame-duck` in a pod, in seconds.
const LAME_DUCK: u64 = 5;
/// The proxy's default for `--reserve`, in seconds.
const RESERVE: u64 = 5;

/// Warnings about the grace period: one that the pod's own is above, and one that leaves a drain little time. The proxy
/// keeps to its minimum lame duck even if that is over a third of the drain.
pub fn grace_warnings(parts: &Parts, own: u64) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(asked) = parts.annotations.grace.filter(|asked| *asked < own) {
        warnings.push(format!(
            "annotation lameduck.dev/grace: {asked}s changes nothing, as the pod has {own}s and keeps them"
        ));
    }
    let time = |flag: &str| humantime::parse_duration(parts.annotations.flag(flag)?).ok();
    let own_reserve = if runs_after_drain(&parts.own) { OWN_HOOK_RESERVE } else { RESERVE };
    let lame_duck = time("lame-duck").unwrap_or(Duration::from_secs(lame_duck(parts)));
    let reserve = time("reserve").unwrap_or(Duration::from_secs(own_reserve));
    let drain = Duration::from_secs(parts.grace).saturating_sub(reserve);
    if lame_duck > drain / 3 {
        let enough = (3 * lame_duck + reserve).as_secs_f64().ceil();
        let left = humantime::format_duration(drain.saturating_sub(lame_duck));
        let (lame_duck, drain) = (humantime::format_duration(lame_duck), humantime::format_duration(drain));
        warnings.push(format!(
            "its lame duck of {lame_duck} is over a third of the {drain} for the whole drain and is kept, so that \
             running work gets only {left}: write lameduck.dev/grace: {enough}s"
        ));
    }
    warnings
}

/// Least lame duck in seconds, unless an annotation sets it. Nothing calls a pod that is to complete by a Service, so its
/// end needs no delay.
fn lame_duck(parts: &Parts) -> u64 {
    let seconds = parts.own.iter().map(|own| if let OwnHook::Sleep(seconds) = own { *seconds } else { 0 });
    seconds.max().unwrap_or(0).max(if parts.completes { 0 } else { LAME_DUCK })
}

/// Whether one of the user's own hooks has something to do between the drain and SIGTERM.
fn runs_after_drain(own: &[OwnHook]) -> bool {
    own.iter().any(|own| !matches!(own, OwnHook::Sleep(_)))
}

/// The proxy's command line.
pub fn arguments(parts: &Parts, app_probes: &[String]) -> Vec<String> {
    let Parts { annotations, plan, .. } = parts;
    let mode = if annotations.ordinary { "ordinary" } else { "native" };
    let mut args = vec!["proxy".to_owned(), format!("--sidecar={mode}")];
    match plan {
        Some(plan) => {
            args.push(format!("--listen=:{}", plan.listen));
            args.push(format!("--upstream={}", plan.app.upstream()));
        }
        None => {
            args.push("--capture".to_owned());
            args.extend(parts.rules.iter().map(|rule| format!("--capture-as={rule}")));
        }
    }
    args.push(format!("--probe-listen=:{}", annotations.probe()));
    args.push(format!("--grace={}s", parts.grace));
    let least = lame_duck(parts);
    if least != LAME_DUCK && annotations.flag("lame-duck").is_none() {
        args.push(format!("--lame-duck={least}s"));
    }
    if runs_after_drain(&parts.own) && annotations.flag("reserve").is_none() {
        args.push(format!("--reserve={OWN_HOOK_RESERVE}s"));
    }
    for own in &parts.own {
        if let OwnHook::Get { url, .. } = own {
            args.push(format!("--after-drain={url}"));
        }
    }
    args.extend(app_probes.iter().map(|target| format!("--app-probe={target}")));
    for (flag, value) in &annotations.flags {
        match (flag.as_str(), value.as_str()) {
            ("access-log", "true") => args.push("--access-log".to_owned()),
            ("access-log", "false") => {}
            _ => args.push(format!("--{flag}={value}")),
        }
    }
    if parts.shares() {
        args.push(format!("--share-dir={SHARE_DIR}"));
    }
    args.iter().map(|arg| literal(arg)).collect()
}

/// Escapes `$`: the kubelet expands `$(NAME)` in arguments and variables, and turns `$$` into `$`.
fn literal(text: &str) -> String {
    text.replace('$', "$$")
}

/// The sidecar's container.
pub fn container(parts: &Parts, args: &[String]) -> Value {
    let Parts { settings, annotations, .. } = parts;
    let mut env = vec![json!({ "name": TOKEN_ENV, "value": settings.token })];
    let headers: Vec<&str> = hooks::headers(&parts.own).collect();
    if !headers.is_empty() {
        env.push(json!({ "name": AFTER_DRAIN_HEADER_ENV, "value": literal(&headers.join("\n")) }));
    }
    let mut container = json!({
        "name": SIDECAR,
        "image": annotations.image.as_ref().unwrap_or(&settings.image),
        "args": args,
        "env": env,
        "ports": [{ "name": "lameduck-probe", "containerPort": annotations.probe() }],
        // Never /readyz: the app starts only after this probe has passed.
        "startupProbe": {
            "httpGet": { "path": "/livez", "port": annotations.probe() },
            "periodSeconds": 1, "failureThreshold": 60,
        },
        "readinessProbe": {
            "httpGet": { "path": "/readyz", "port": annotations.probe() },
            "periodSeconds": 2, "timeoutSeconds": 2, "failureThreshold": 2,
        },
        "lifecycle": { "preStop": hooks::blocking("sidecar", annotations, settings) },
        "resources": parts.resources,
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": true,
            "runAsUser": parts.user,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "volumeMounts": [{ "name": SIDECAR, "mountPath": SHARE_DIR }],
    });
    if let Some(object) = container.as_object_mut() {
        if let Some(policy) = annotations.pull_policy.as_ref().or(settings.pull_policy.as_ref()) {
            object.insert("imagePullPolicy".to_owned(), json!(policy));
        }
        if !annotations.ordinary {
            object.insert("restartPolicy".to_owned(), json!("Always"));
        }
    }
    container
}

/// Token of an injected pod; none if it has none. A webhook that is called again keeps it.
pub fn token_of(pod: &Value) -> Option<&str> {
    let lists = [&pod["spec"]["initContainers"], &pod["spec"]["containers"]];
    let mut all = lists.into_iter().filter_map(Value::as_array).flatten();
    let env = all.find(|container| container["name"] == SIDECAR)?["env"].as_array()?;
    env.iter().find(|var| var["name"] == TOKEN_ENV)?["value"].as_str()
}
