//! The sidecar's own container and its hooks, as JSON. Pure.

use serde_json::{Value, json};

use super::annotations::Wishes;
use super::patch::Settings;
use super::ports::Plan;
use super::preload;

/// The name of the sidecar and of its volume.
pub const NAME: &str = "lameduck";
/// Where the control socket and the preload are; the proxy's default directory.
pub const DIR: &str = "/run/lameduck";
/// Nobody in particular, as the restricted Pod Security Standard wants it.
const USER: u32 = 65532;
/// `--sidecar`'s variable for the hooks' token: other users of a node can read a command line.
const TOKEN: &str = "LAMEDUCK_TOKEN";

/// What the container is made of.
pub struct Parts<'a> {
    /// Image and token.
    pub settings: &'a Settings,
    /// What the annotations ask for.
    pub wishes: &'a Wishes,
    /// The ports.
    pub plan: &'a Plan,
    /// terminationGracePeriodSeconds.
    pub grace: u64,
    /// The user's own preStop sleep: the least lame duck.
    pub sleep: Option<u64>,
    /// Whether it writes the preload.
    pub preload: bool,
    /// `resources`.
    pub resources: Value,
}

/// The proxy's command line.
pub fn arguments(parts: &Parts) -> Vec<String> {
    let Parts { wishes, plan, .. } = parts;
    let mode = if wishes.ordinary { "ordinary" } else { "native" };
    let mut args = vec![
        "proxy".to_owned(),
        format!("--sidecar={mode}"),
        format!("--listen=:{}", plan.listen),
        format!("--upstream=127.0.0.1:{}", plan.app),
        format!("--probe-listen=:{}", plan.probe),
        format!("--grace={}s", parts.grace),
    ];
    if let Some(sleep) = parts.sleep
        && !wishes.flags.iter().any(|(flag, _)| flag == "lame-duck")
    {
        args.push(format!("--lame-duck={sleep}s"));
    }
    for (flag, value) in &wishes.flags {
        match (flag.as_str(), value.as_str()) {
            ("access-log", "true") => args.push("--access-log".to_owned()),
            ("access-log", "false") => {}
            _ => args.push(format!("--{flag}={value}")),
        }
    }
    if parts.preload {
        args.push(format!("--preload-dir={DIR}"));
    }
    args
}

/// The container.
pub fn container(parts: &Parts, args: &[String]) -> Value {
    let Parts { settings, wishes, plan, .. } = parts;
    let mut container = json!({
        "name": NAME,
        "image": wishes.image.as_ref().unwrap_or(&settings.image),
        "args": args,
        "env": [{ "name": TOKEN, "value": settings.token }],
        "ports": [{ "name": "lameduck-probe", "containerPort": plan.probe }],
        // Never /readyz: the app starts only after this has passed.
        "startupProbe": {
            "httpGet": { "path": "/livez", "port": plan.probe },
            "periodSeconds": 1, "failureThreshold": 60,
        },
        "readinessProbe": {
            "httpGet": { "path": "/readyz", "port": plan.probe },
            "periodSeconds": 2, "timeoutSeconds": 2, "failureThreshold": 2,
        },
        "lifecycle": { "preStop": hook("sidecar", parts) },
        "resources": parts.resources,
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": true,
            "runAsUser": USER,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "volumeMounts": [{ "name": NAME, "mountPath": DIR }],
    });
    if let Some(object) = container.as_object_mut() {
        if let Some(policy) = wishes.pull_policy.as_ref().or(settings.pull_policy.as_ref()) {
            object.insert("imagePullPolicy".to_owned(), json!(policy));
        }
        if !wishes.ordinary {
            object.insert("restartPolicy".to_owned(), json!("Always"));
        }
    }
    container
}

/// The blocking preStop hook. By port number: a name would be looked up in the hook's own container only.
pub fn hook(whose: &str, parts: &Parts) -> Value {
    json!({ "httpGet": {
        "path": format!("/drain?hook={whose}"),
        "port": parts.plan.probe,
        "httpHeaders": [{ "name": "Lameduck-Token", "value": parts.settings.token }],
    }})
}

/// Whether a preStop handler is ours.
pub fn is_hook(handler: &Value) -> bool {
    handler["httpGet"]["path"].as_str().is_some_and(|path| path.starts_with("/drain?hook="))
}

/// The token that an injected pod has; none if it has none. A webhook that is called again keeps it.
pub fn token_of(pod: &Value) -> Option<&str> {
    let lists = [&pod["spec"]["initContainers"], &pod["spec"]["containers"]];
    let mut all = lists.into_iter().filter_map(Value::as_array).flatten();
    let env = all.find(|container| container["name"] == NAME)?["env"].as_array()?;
    env.iter().find(|var| var["name"] == TOKEN)?["value"].as_str()
}

/// What `NODE_OPTIONS` gets.
pub fn preload_option() -> String {
    format!("--require={DIR}/{}", preload::FILE)
}
