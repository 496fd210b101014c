//! The sidecar's own container and its hooks, as JSON. Pure.

use serde_json::{Value, json};

use super::annotations::Wishes;
use super::hooks::{self, OwnHook};
use super::patch::Settings;
use super::ports::Plan;
use super::share;

/// The name of the sidecar and of its volume.
pub const NAME: &str = "lameduck";
/// Where the control socket and the preload are; the proxy's default directory.
pub const DIR: &str = "/run/lameduck";
/// Nobody in particular, as the restricted Pod Security Standard wants it.
pub const USER: u64 = 65532;
/// The reserve where the app has a hook of its own: ten seconds more than without.
pub const RESERVE: &str = "15s";
/// The proxy's own `--lame-duck` in a pod, in seconds.
const LAME_DUCK: u64 = 5;
/// `--sidecar`'s variable for the hooks' token: other users of a node can read a command line.
const TOKEN: &str = "LAMEDUCK_TOKEN";
/// `--after-drain-header`'s, one a line: it can be as secret.
const HEADERS: &str = "LAMEDUCK_AFTER_DRAIN_HEADER";

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
    /// The user's own preStop hook.
    pub own: Option<OwnHook>,
    /// Whether Node gets the preload.
    pub preload: bool,
    /// runAsUser.
    pub user: u64,
    /// `resources`.
    pub resources: Value,
}

impl Parts<'_> {
    /// Whether the app's container needs a file of ours.
    pub fn shares(&self) -> bool {
        self.preload || matches!(self.own, Some(OwnHook::Exec(_)))
    }
}

/// The proxy's command line.
pub fn arguments(parts: &Parts, app_probes: &[String]) -> Vec<String> {
    let Parts { wishes, plan, .. } = parts;
    let mode = if wishes.ordinary { "ordinary" } else { "native" };
    let mut args = vec![
        "proxy".to_owned(),
        format!("--sidecar={mode}"),
        format!("--listen=:{}", plan.listen),
        format!("--upstream={}", plan.app.upstream()),
        format!("--probe-listen=:{}", plan.probe),
        format!("--grace={}s", parts.grace),
    ];
    match &parts.own {
        // A shorter one lowers nothing.
        Some(OwnHook::Sleep(seconds)) if *seconds >= LAME_DUCK && wishes.flag("lame-duck").is_none() => {
            args.push(format!("--lame-duck={seconds}s"));
        }
        Some(OwnHook::Get { .. } | OwnHook::Exec(_)) if wishes.flag("reserve").is_none() => {
            args.push(format!("--reserve={RESERVE}"));
        }
        _ => {}
    }
    if let Some(OwnHook::Get { url, .. }) = &parts.own {
        args.push(format!("--after-drain={url}"));
    }
    args.extend(app_probes.iter().map(|target| format!("--app-probe={target}")));
    for (flag, value) in &wishes.flags {
        match (flag.as_str(), value.as_str()) {
            ("access-log", "true") => args.push("--access-log".to_owned()),
            ("access-log", "false") => {}
            _ => args.push(format!("--{flag}={value}")),
        }
    }
    if parts.shares() {
        args.push(format!("--share-dir={DIR}"));
    }
    args.iter().map(|arg| literal(arg)).collect()
}

/// The kubelet puts variables in for $(NAME), and one $ for two, in arguments and in variables.
fn literal(text: &str) -> String {
    text.replace('$', "$$")
}

/// The container.
pub fn container(parts: &Parts, args: &[String]) -> Value {
    let Parts { settings, wishes, plan, .. } = parts;
    let mut env = vec![json!({ "name": TOKEN, "value": settings.token })];
    if let Some(OwnHook::Get { headers, .. }) = &parts.own
        && !headers.is_empty()
    {
        env.push(json!({ "name": HEADERS, "value": literal(&headers.join("\n")) }));
    }
    let mut container = json!({
        "name": NAME,
        "image": wishes.image.as_ref().unwrap_or(&settings.image),
        "args": args,
        "env": env,
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
        "lifecycle": { "preStop": hooks::blocking("sidecar", plan, settings) },
        "resources": parts.resources,
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": true,
            "runAsUser": parts.user,
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

/// The token that an injected pod has; none if it has none. A webhook that is called again keeps it.
pub fn token_of(pod: &Value) -> Option<&str> {
    let lists = [&pod["spec"]["initContainers"], &pod["spec"]["containers"]];
    let mut all = lists.into_iter().filter_map(Value::as_array).flatten();
    let env = all.find(|container| container["name"] == NAME)?["env"].as_array()?;
    env.iter().find(|var| var["name"] == TOKEN)?["value"].as_str()
}

/// What `NODE_OPTIONS` gets. Node 8 knows it with a space only.
pub fn preload_option() -> String {
    format!("--require {DIR}/{}", share::PRELOAD)
}
