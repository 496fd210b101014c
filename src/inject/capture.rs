//! Capture: the app's containers get the shim and keep their ports, names and Services. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::hooks;
use super::json::{containers, empties, env, list, mounted, object, ports, put_empties_back, take_out};
use super::model::{Annotations, OwnHook, Parts, Pid1};
use super::names::{PROBES, SHARE_DIR, SIDECAR, preload_file, shim};
use crate::config::CaptureProtocol;

/// The proxy is not root, and takes the app's ports whatever their numbers are. The restricted Pod Security Standard
/// allows this sysctl.
const SYSCTL: &str = "net.ipv4.ip_unprivileged_port_start";
/// Containers that a mesh adds. Its proxy must not move: the kernel redirects the pod's traffic to it.
const MESHES: [&str; 4] = ["consul-dataplane", "istio-proxy", "kuma-sidecar", "linkerd-proxy"];
const LD_PRELOAD: &str = "LD_PRELOAD";
/// Path of the probe port that connects to the app.
const APP_PORT: &str = "/app-port/";
/// Members of a container that a capture adds to, or creates.
const MEMBERS: [&str; 3] = ["lifecycle", "env", "volumeMounts"];

/// Record of what a capture changed.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CaptureUndo {
    /// The app's containers, by name.
    pub containers: BTreeMap<String, ContainerUndo>,
    /// If the sysctl was added: members of the pod that were null or empty before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sysctl: Option<BTreeMap<String, Value>>,
}

/// Record of what a capture changed in one container.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerUndo {
    /// Variables: the new value, and the original entry.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, (String, Option<Value>)>,
    /// Original `tcpSocket` of the probes that changed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub probes: BTreeMap<String, Value>,
    /// Original preStop hook, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pre_stop: Option<Value>,
    /// Values that were null or empty and got members, by their key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub empty: BTreeMap<String, Value>,
}

/// Indexes of the app's containers: all but a mesh's, or the annotated one.
///
/// # Errors
/// Says why the pod's ports can't be captured.
pub fn apps(spec: &Map<String, Value>, annotations: &Annotations) -> Result<Vec<usize>, String> {
    if annotations.ordinary {
        return Err("an ordinary sidecar may start after the app, which then has no shim to load: use the native one \
                    (Kubernetes 1.29), or lameduck.dev/capture: port-name"
            .to_owned());
    }
    let (mut apps, mut deaf, mut captured) = (Vec::new(), None, false);
    for (n, container) in containers(spec).enumerate() {
        let name = name_of(container);
        let chosen = match &annotations.container {
            Some(wanted) => name == wanted,
            None => !MESHES.contains(&name),
        };
        if !chosen {
            continue;
        }
        if !container.get("image").is_some_and(Value::is_string) {
            return Err(format!(
                "container {name} has no image: a fragment (of kustomize?) is no whole workload"
            ));
        }
        if runs_lameduck(container) {
            return Err(format!(
                "container {name} runs lameduck already: take `lameduck run` out of its command, or label the pod \
                 lameduck.dev/inject: disabled"
            ));
        }
        if containers(spec).filter(|other| name_of(other) == name).count() > 1 {
            return Err(format!("two containers are named {name}"));
        }
        apps.push(n);
        deaf = deaf.or(no_shim(container).map(|why| format!("container {name} can't be captured: {why}")));
        captured |= no_shim(container).is_none();
    }
    if let Some(why) = deaf.filter(|_| !captured) {
        return Err(why);
    }
    match (apps.is_empty(), &annotations.container) {
        (false, _) => Ok(apps),
        (true, Some(wanted)) => Err(format!("annotation lameduck.dev/container: there is no '{wanted}'")),
        (true, None) if containers(spec).count() > 0 => {
            Err("it has no container but a mesh's proxy: name it by lameduck.dev/container if it is the app"
                .to_owned())
        }
        (true, None) => Err("it has no containers".to_owned()),
    }
}

fn name_of(container: &Map<String, Value>) -> &str {
    container.get("name").and_then(Value::as_str).unwrap_or_default()
}

/// Whether its command is `lameduck run`.
fn runs_lameduck(container: &Map<String, Value>) -> bool {
    let words = |key| container.get(key).and_then(Value::as_array).into_iter().flatten();
    let words: Vec<&str> = words("command").chain(words("args")).filter_map(Value::as_str).collect();
    words.windows(2).any(|pair| pair[0].rsplit('/').next() == Some("lameduck") && pair[1] == "run")
}

/// Gives a container the hook, and the shim if its loader can be told of it.
///
/// # Errors
/// Its own hook can't be kept.
pub fn change(
    container: &mut Map<String, Value>,
    own: Option<&OwnHook>,
    parts: &Parts,
    warnings: &mut Vec<String>,
) -> Result<ContainerUndo, String> {
    let lifecycle = container.get("lifecycle").and_then(Value::as_object);
    let pre_stop = lifecycle.and_then(|lifecycle| lifecycle.get("preStop"));
    let mut empty = empties(Some(container), &MEMBERS);
    empty.extend(empties(lifecycle, &["preStop"]));
    let pre_stop = pre_stop.filter(|hook| !hook.is_null()).cloned();
    let mut undo = ContainerUndo { pre_stop, empty, ..ContainerUndo::default() };

    let hook = hooks::of_app(own, parts.annotations, parts.settings)?;
    object(container, "lifecycle")?.insert("preStop".to_owned(), hook);
    let why = no_shim(container);
    if let Some(why) = why {
        let name = name_of(container);
        warnings.push(format!("container {name} is not captured: {why}"));
    } else {
        change_env(container, parts, &mut undo)?;
        change_probes(container, parts.annotations, &mut undo);
    }
    if why.is_none() || matches!(own, Some(OwnHook::Exec(_))) {
        if mounted(container) {
            return Err(format!(
                "something else is mounted on {SHARE_DIR}, where its preStop needs our program"
            ));
        }
        let mount = json!({ "name": SIDECAR, "mountPath": SHARE_DIR, "readOnly": true });
        list(container, "volumeMounts")?.push(mount);
    }
    Ok(undo)
}

/// Why the container's programs can't load the shim.
fn no_shim(container: &Map<String, Value>) -> Option<&'static str> {
    if env(container, LD_PRELOAD).is_some_and(|var| !var["valueFrom"].is_null()) {
        Some("its LD_PRELOAD comes from elsewhere: write it as a value")
    } else if mounted(container) {
        Some("something else is mounted on /run/lameduck: mount it elsewhere")
    } else {
        None
    }
}

/// Tells the loader of the shim, which comes last: whatever else stands in for `bind` passes its call on to it.
fn change_env(
    container: &mut Map<String, Value>,
    parts: &Parts,
    undo: &mut ContainerUndo,
) -> Result<(), String> {
    let shim = shim();
    let before = env(container, LD_PRELOAD).and_then(|var| var["value"].as_str()).unwrap_or_default();
    let before = before.to_owned();
    let named = before.split([':', ' ']).any(|path| path == shim);
    let mut vars = vec![];
    match before.as_str() {
        _ if named => {}
        "" => vars.push((LD_PRELOAD, shim)),
        before => vars.push((LD_PRELOAD, format!("{before}:{shim}"))),
    }
    if parts.preload {
        vars.push(("LAMEDUCK_NODE_PRELOAD", preload_file()));
    }
    if parts.annotations.pid1 == Pid1::Leave {
        vars.push(("LAMEDUCK_PID1", "leave".to_owned()));
    }
    vars.retain(|(name, _)| *name == LD_PRELOAD || env(container, name).is_none());
    for (name, value) in vars {
        let vars = list(container, "env")?;
        let at = vars.iter().rposition(|var| var["name"] == name);
        undo.env.insert(name.to_owned(), (value.clone(), at.map(|n| vars[n].clone())));
        match at.and_then(|n| vars[n].as_object_mut()) {
            Some(var) => drop(var.insert("value".to_owned(), json!(value))),
            None => vars.push(json!({ "name": name, "value": value })),
        }
    }
    Ok(())
}

/// Redirects `tcpSocket` probes: the kubelet's connection would always be accepted, by the proxy.
fn change_probes(container: &mut Map<String, Value>, annotations: &Annotations, undo: &mut ContainerUndo) {
    for key in PROBES {
        let Some(socket) = container.get(key).and_then(|probe| probe.get("tcpSocket")) else { continue };
        let elsewhere = socket["host"].as_str().is_some_and(|host| !host.is_empty());
        let port = number(container, &socket["port"]).filter(|port| !elsewhere && !skips(annotations, *port));
        let (Some(port), socket) = (port, socket.clone()) else { continue };
        let Some(probe) = container.get_mut(key).and_then(Value::as_object_mut) else { continue };
        probe.remove("tcpSocket");
        let get = json!({ "path": format!("{APP_PORT}{port}"), "port": annotations.probe() });
        probe.insert("httpGet".to_owned(), get);
        undo.probes.insert(key.to_owned(), socket);
    }
}

/// Number of a probe's port, which may be the name of a port of its container.
fn number(container: &Map<String, Value>, port: &Value) -> Option<u16> {
    let named =
        |name: &str| ports(container).find(|port| port["name"] == name).map(|port| &port["containerPort"]);
    let number = match port.as_str() {
        Some(name) => named(name).and_then(Value::as_u64).or_else(|| name.parse().ok()),
        None => port.as_u64(),
    };
    number.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0)
}

fn skips(annotations: &Annotations, port: u16) -> bool {
    annotations.ports.iter().any(|rule| rule.port == port && rule.protocol == CaptureProtocol::Skip)
}

/// Lets the proxy take ports below 1024. Returns the members that were null or empty before; none if the pod has set the
/// sysctl itself.
///
/// # Errors
/// A member has another type.
pub fn allow_low_ports(spec: &mut Map<String, Value>) -> Result<Option<BTreeMap<String, Value>>, String> {
    let mut empty = empties(Some(spec), &["securityContext"]);
    let context = object(spec, "securityContext")?;
    empty.extend(empties(Some(context), &["sysctls"]));
    let sysctls = list(context, "sysctls")?;
    if sysctls.iter().any(|sysctl| sysctl["name"] == SYSCTL) {
        return Ok(None);
    }
    sysctls.push(json!({ "name": SYSCTL, "value": "0" }));
    Ok(Some(empty))
}

/// Undoes a capture. Changes that the owner made since are kept.
pub fn restore(spec: &mut Map<String, Value>, undo: &CaptureUndo) {
    let all = spec.get_mut("containers").and_then(Value::as_array_mut).into_iter().flatten();
    for container in all.filter_map(Value::as_object_mut) {
        if let Some(undo) = undo.containers.get(name_of(container)) {
            restore_container(container, undo);
        }
    }
    let Some(empty) = &undo.sysctl else { return };
    if let Some(context) = spec.get_mut("securityContext").and_then(Value::as_object_mut) {
        take_out(context, "sysctls", |sysctl| sysctl["name"] == SYSCTL && sysctl["value"] == "0");
        put_empties_back(context, &["sysctls"], empty);
        if context.is_empty() {
            spec.remove("securityContext");
        }
    }
    put_empties_back(spec, &["securityContext"], empty);
}

fn restore_container(container: &mut Map<String, Value>, undo: &ContainerUndo) {
    for (key, was) in &undo.probes {
        let Some(probe) = container.get_mut(key).and_then(Value::as_object_mut) else { continue };
        let path = probe.get("httpGet").and_then(|get| get["path"].as_str());
        if path.is_some_and(|path| path.starts_with(APP_PORT)) {
            probe.remove("httpGet");
            probe.insert("tcpSocket".to_owned(), was.clone());
        }
    }
    hooks::restore(container, undo.pre_stop.as_ref(), &undo.empty);
    take_out(container, "volumeMounts", |mount| mount["name"] == SIDECAR);
    restore_env(container, undo);
    put_empties_back(container, &MEMBERS, &undo.empty);
}

fn restore_env(container: &mut Map<String, Value>, undo: &ContainerUndo) {
    let Some(vars) = container.get_mut("env").and_then(Value::as_array_mut) else { return };
    for (name, (set, was)) in &undo.env {
        let Some(n) = vars.iter().rposition(|var| var["name"] == *name) else { continue };
        let value = vars[n]["value"].as_str().unwrap_or_default();
        match was {
            Some(was) if value == set => vars[n] = was.clone(),
            None if value == set => drop(vars.remove(n)),
            // Its owner has put another library before ours.
            _ => {
                if let Some(rest) = value.strip_suffix(&format!(":{}", shim())) {
                    vars[n]["value"] = json!(rest);
                }
            }
        }
    }
    if vars.is_empty() {
        container.remove("env");
    }
}
