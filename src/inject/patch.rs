//! Computes the desired pod: one pure function for the webhook and the CLI.

use serde_json::{Map, Value, json};

use super::annotations;
use super::capture;
use super::diff::{Op, Pointer, diff};
use super::hints;
use super::hooks;
use super::json::{
    completes, containers, env, is_tcp, list, mounted, native_sidecars, object, ports as ports_of, probes,
};
use super::model::{Annotations, AppAddr, OwnHook, Parts, PatchSettings, Pid1, Plan, Services};
use super::names::{DISABLED, INJECTED, SHARE_DIR, SIDECAR, WARNINGS, preload_option};
use super::ports;
use super::ports::not_taken;
use super::protocols;
use super::resources::resources;
use super::restore::{self, Undo};
use super::sidecar;

/// Kubernetes' default for terminationGracePeriodSeconds, and the value that replaces it.
const GRACE: (u64, u64) = (30, 60);
/// Exclude our probe port from a mesh's capture: the kubelet's probes and hooks come from outside the mesh.
const MESH: [&str; 2] =
    ["traffic.sidecar.istio.io/excludeInboundPorts", "config.linkerd.io/skip-inbound-ports"];
/// Without it an emptyDir keeps the cluster autoscaler from removing the node.
const AUTOSCALER: &str = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes";
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

/// The app's containers with their indexes.
type Apps = Vec<(usize, Map<String, Value>)>;

/// Change of a pod.
#[derive(Clone, Debug)]
pub struct Patch {
    /// Operations from the given pod to the desired one. Empty if nothing changes.
    pub ops: Vec<Op>,
    /// The desired pod.
    pub pod: Value,
    /// Ports that the proxy takes; none if it captures those that the app opens.
    pub plan: Option<Plan>,
    /// Warnings for the owner.
    pub warnings: Vec<String>,
}

/// Reason why a pod is left unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skip(pub String);

/// Adds the sidecar to a pod or pod template, an object with `metadata` and `spec`. Fields that this module does not
/// name stay as they are. An earlier injection is undone first, so the result depends only on what the owner wrote and
/// on the settings.
///
/// # Errors
/// Says why the pod should be left unchanged.
pub fn patch(pod: &Value, settings: &PatchSettings) -> Result<Patch, Skip> {
    inject(pod, settings).map_err(|why| {
        let strings = |key| pod["metadata"][key].as_object().cloned().unwrap_or_default();
        let (labels, written) = (strings("labels"), strings("annotations"));
        let unknown =
            annotations::read(&written, (settings.flags)()).map(|all| all.unknown).unwrap_or_default();
        // A mistyped annotation may be the reason.
        let hints = if why == DISABLED { vec![] } else { hints(&labels, &written, &unknown, settings) };
        Skip([vec![why], hints].concat().join("; "))
    })
}

fn inject(pod: &Value, settings: &PatchSettings) -> Result<Patch, String> {
    let mut new = restore::restored(pod)?;
    let strings = |key| -> Map<String, Value> {
        let found = new.get("metadata").and_then(|metadata| metadata.get(key));
        found.and_then(Value::as_object).cloned().unwrap_or_default()
    };
    let (written, labels) = (strings("annotations"), strings("labels"));
    if let Some(why) = new.get("metadata").and_then(hints::opted_out) {
        return Err(why);
    }
    let annotations = annotations::read(&written, (settings.flags)())?;
    let spec = new.get("spec").and_then(Value::as_object).ok_or("it has no spec")?;
    refuse(spec, &written, &annotations)?;
    let (apps, plan) = apps(spec, &annotations, settings, &written)?;
    let mut warnings: Vec<String> = plan.iter().flat_map(|plan| plan.warning.clone()).collect();
    warnings.extend(hints(&labels, &written, &annotations.unknown, settings));
    warn(spec, &annotations, (plan.as_ref(), apps.len()), &mut warnings);
    let owns: Result<Vec<_>, _> = apps.iter().map(|(_, app)| hooks::own(app, plan.as_ref())).collect();
    let owns = owns?;
    let own = hooks::together(&owns)?;
    warnings.extend(hooks::warnings(&own, &annotations));
    let preload = match &plan {
        Some(_) => preload(spec, &apps[0].1, &annotations, &mut warnings),
        // The shim sees for itself whether it is loaded by Node, and what Node's permissions forbid.
        None => annotations.pid1 == Pid1::Preload,
    };
    let of_app = annotations.app_socket.is_some() && plan.is_some();
    let user = if of_app { user(spec, &apps[0].1)? } else { sidecar::USER };
    let (resources, warning) = resources(spec, &annotations.resources, &settings.resources)?;
    warnings.extend(warning);
    let grace = spec.get("terminationGracePeriodSeconds").and_then(Value::as_u64);
    let rules = protocols::rules(spec, &annotations);
    let parts = Parts {
        settings,
        rules,
        annotations: &annotations,
        plan: plan.as_ref(),
        grace: grace.unwrap_or(GRACE.0).max(annotations.grace.unwrap_or(GRACE.1)),
        own,
        completes: completes(spec) && settings.service_ports.is_empty(),
        preload,
        user,
        resources,
    };
    warnings.extend(sidecar::grace_warnings(&parts, grace.unwrap_or(GRACE.0)));
    let mut record = Undo { written: restore::sources(pod), ..Undo::of(&new) };
    let default = apps[0].1.get("name").cloned();
    let (changed, app_probes) = change_apps(apps, &owns, &parts, &mut record, &mut warnings)?;
    let args = sidecar::arguments(&parts, &app_probes);
    (settings.check)(&[args.as_slice(), &hooks::header_flags(&parts.own)].concat())?;

    record.annotations = annotate(object(&mut new, "metadata")?, &annotations, default)?;
    change_spec(object(&mut new, "spec")?, changed, &args, &parts, &mut record)?;
    let record = serde_json::to_string(&record).map_err(|error| error.to_string())?;
    let annotated = object(object(&mut new, "metadata")?, "annotations")?;
    annotated.insert(INJECTED.to_owned(), json!(record));
    // The CLI's user reads the report; nobody reads a controller's warnings.
    if settings.services == Services::Unseen && !warnings.is_empty() {
        annotated.insert(WARNINGS.to_owned(), json!(warnings.join("\n")));
    }
    let new = Value::Object(new);
    let ops = diff(&Pointer::default(), pod, &new);
    Ok(Patch { ops, pod: new, plan, warnings })
}

/// Changes the pod's spec: the app's containers, the sidecar, its volume.
fn change_spec(
    spec: &mut Map<String, Value>,
    apps: Apps,
    args: &[String],
    parts: &Parts,
    record: &mut Undo,
) -> Result<(), String> {
    for (n, app) in apps {
        *list(spec, "containers")?.get_mut(n).ok_or("it has no app")? = Value::Object(app);
    }
    if let Some(captured) = &mut record.captured {
        captured.sysctl = capture::allow_low_ports(spec)?;
    }
    let containers = if parts.annotations.ordinary { "containers" } else { "initContainers" };
    list(spec, containers)?.push(sidecar::container(parts, args));
    list(spec, "volumes")?.push(json!({ "name": SIDECAR, "emptyDir": {} }));
    spec.insert("terminationGracePeriodSeconds".to_owned(), json!(parts.grace));
    if parts.annotations.pid1 == Pid1::Share {
        let was = spec.insert("shareProcessNamespace".to_owned(), json!(true));
        record.shared = (was != Some(json!(true))).then_some(was.is_some());
    }
    Ok(())
}

/// Refuses pods in which a sidecar could not work.
fn refuse(
    spec: &Map<String, Value>,
    written: &Map<String, Value>,
    annotations: &Annotations,
) -> Result<(), String> {
    if spec.get("hostNetwork") == Some(&Value::Bool(true)) {
        let instead = if annotations.captures() { ": start the app by `lameduck run` instead" } else { "" };
        return Err(format!("hostNetwork: the proxy's ports would be the node's{instead}"));
    }
    let selected = spec.get("nodeSelector").map(|selector| &selector["kubernetes.io/os"]);
    if spec.get("os").is_some_and(|os| os["name"] == "windows") || selected.is_some_and(|os| os == "windows")
    {
        return Err("a Windows pod".to_owned());
    }
    if written.contains_key("kubernetes.io/config.mirror") {
        return Err("a static pod: only its node's files can change it".to_owned());
    }
    if annotations.ordinary && completes(spec) {
        return Err("an ordinary sidecar would keep a pod that is to complete (a Job's) from completing: \
                    use the native one (Kubernetes 1.29)"
            .to_owned());
    }
    let inits = spec.get("initContainers").and_then(Value::as_array).into_iter().flatten();
    if containers(spec).any(|c| c.get("name").is_some_and(|name| name == SIDECAR))
        || inits.into_iter().any(|c| c["name"] == SIDECAR)
    {
        return Err(format!("it has a container named {SIDECAR} that lameduck didn't put there"));
    }
    let volumes = spec.get("volumes").and_then(Value::as_array);
    if volumes.is_some_and(|all| all.iter().any(|volume| volume["name"] == SIDECAR)) {
        return Err(format!("it has a volume named {SIDECAR} that lameduck didn't put there"));
    }
    Ok(())
}

/// Containers of the app with their indexes, and the ports that the proxy takes of it unless they are captured.
fn apps(
    spec: &Map<String, Value>,
    annotations: &Annotations,
    settings: &PatchSettings,
    written: &Map<String, Value>,
) -> Result<(Apps, Option<Plan>), String> {
    let all = well_formed(spec)?;
    if annotations.unasked
        && let Some(why) = protocols::none_is_http(spec, &settings.service_ports, annotations)
    {
        return Err(why);
    }
    if annotations.captures() {
        ports::captured(spec, annotations)?;
        let apps = capture::apps(spec, annotations)?.into_iter();
        return Ok((apps.map(|n| (n, all[n].clone())).collect(), None));
    }
    let n = app_container(&all, annotations, written)?;
    let plan = ports::plan(all[n], annotations, settings.services)?;
    let ours = ports::ours(Some(&plan), annotations);
    let others = all.iter().enumerate().filter(|(m, _)| *m != n).map(|(_, other)| *other);
    for other in others.chain(native_sidecars(spec)) {
        not_taken(&ours, ports_of(other))?;
    }
    Ok((vec![(n, all[n].clone())], Some(plan)))
}

/// All containers.
fn well_formed(spec: &Map<String, Value>) -> Result<Vec<&Map<String, Value>>, String> {
    let all: Vec<_> = containers(spec).collect();
    let listed = spec.get("containers").and_then(Value::as_array).map_or(0, Vec::len);
    match listed != all.len() || all.iter().any(|c| !c.get("name").is_some_and(Value::is_string)) {
        true => Err("its containers are not well-formed".to_owned()),
        false => Ok(all),
    }
}

/// Index of the app's container: the annotated one, or the only one, or the one that kubectl uses by default. A
/// mesh injected earlier added its own container and sets that default for the app's.
fn app_container(
    all: &[&Map<String, Value>],
    annotations: &Annotations,
    written: &Map<String, Value>,
) -> Result<usize, String> {
    let n = match (&annotations.container, all) {
        (Some(wanted), _) => {
            let found = all.iter().position(|c| c.get("name").is_some_and(|name| name == wanted.as_str()));
            found.ok_or_else(|| format!("annotation lameduck.dev/container: there is no '{wanted}'"))?
        }
        (None, [_]) => 0,
        (None, []) => return Err("it has no containers".to_owned()),
        (None, _) => {
            let default = written.get(DEFAULT_CONTAINER);
            let found = all.iter().position(|c| default.is_some() && c.get("name") == default);
            found.ok_or("it has several containers: say which is the app by lameduck.dev/container")?
        }
    };
    if !all[n].get("image").is_some_and(Value::is_string) {
        return Err("its container has no image: a fragment (of kustomize?) is no whole workload".to_owned());
    }
    Ok(n)
}

/// Hints about labels and annotations that mean nothing.
fn hints(
    labels: &Map<String, Value>,
    written: &Map<String, Value>,
    unknown: &[String],
    settings: &PatchSettings,
) -> Vec<String> {
    let flags = (settings.flags)().iter().map(String::as_str);
    let names: Vec<&str> = annotations::NAMES.into_iter().chain(flags).collect();
    let unknown = unknown.iter().map(|name| hints::unknown(name, &names));
    hints::of_pod(labels, written).into_iter().chain(unknown).take(hints::MAX_HINTS).collect()
}

fn warn(
    spec: &Map<String, Value>,
    annotations: &Annotations,
    (plan, apps): (Option<&Plan>, usize),
    warnings: &mut Vec<String>,
) {
    warnings.extend(
        annotations.idle().map(|(name, why)| format!("annotation lameduck.dev/{name} means nothing {why}")),
    );
    if containers(spec).count() > apps {
        warnings.push("its other containers get SIGTERM at once, while the app still works".to_owned());
    }
    if let Some(port) = plan.map(|plan| plan.listen).filter(|port| *port < 1024) {
        warnings.push(format!("the proxy listens on port {port} without being root, which old nodes refuse"));
    }
}

/// Whether `NODE_OPTIONS` can name the preload.
fn preload(
    spec: &Map<String, Value>,
    app: &Map<String, Value>,
    annotations: &Annotations,
    warnings: &mut Vec<String>,
) -> bool {
    let yes = |key| spec.get(key) == Some(&Value::Bool(true));
    // The app isn't PID 1 then.
    if annotations.pid1 != Pid1::Preload || yes("shareProcessNamespace") || yes("hostPID") {
        return false;
    }
    let options = env(app, "NODE_OPTIONS");
    let text = options.and_then(|var| var.get("value")).and_then(Value::as_str).unwrap_or_default();
    let words = |key| app.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let restricted = |word: &str| word.contains("--permission") || word.contains("--experimental-permission");
    let why = if annotations.ordinary {
        "an ordinary sidecar may start after the app"
    } else if options.is_some_and(|var| var.get("valueFrom").is_some()) {
        "its NODE_OPTIONS comes from elsewhere"
    } else if restricted(text) || words("command").chain(words("args")).any(restricted) {
        "Node's permissions forbid it"
    } else if mounted(app) {
        "something else is mounted on /run/lameduck"
    } else {
        if options.is_none() && app.contains_key("envFrom") {
            warnings.push("if its envFrom has NODE_OPTIONS, that is replaced: write it to env".to_owned());
        }
        return true;
    };
    let text = "no preload, so an app that is PID 1 and ignores SIGTERM takes the whole grace to end";
    warnings.push(format!("{text}: {why} (lameduck.dev/pid1: share or leave)"));
    false
}

/// User of the app's container. Connecting to a unix socket takes write permission, which only its owner has.
fn user(spec: &Map<String, Value>, app: &Map<String, Value>) -> Result<u64, String> {
    let of = |parent: &Map<String, Value>| parent.get("securityContext")?.get("runAsUser")?.as_u64();
    match of(app).or_else(|| of(spec)) {
        Some(0) => Err("lameduck.dev/app-socket: the app runs as root, which the sidecar won't".to_owned()),
        Some(user) => Ok(user),
        None => Err(
            "lameduck.dev/app-socket: write the app's runAsUser, so that the sidecar can run as the same \
                     user"
                .to_owned(),
        ),
    }
}

/// Adds our annotations; returns the previous values.
fn annotate(
    metadata: &mut Map<String, Value>,
    wanted: &Annotations,
    app: Option<Value>,
) -> Result<Vec<(String, Option<String>)>, String> {
    let annotations = object(metadata, "annotations")?;
    let probe = wanted.probe().to_string();
    let mut lists = MESH.map(|key| (key, probe.as_str())).to_vec();
    if wanted.captures() {
        lists.push((AUTOSCALER, SIDECAR));
    }
    let mut before = Vec::new();
    for (key, ours) in lists {
        let was = annotations.get(key).and_then(Value::as_str).map(str::to_owned);
        let all = match was.as_deref().map(str::trim).unwrap_or_default() {
            "" => ours.to_owned(),
            all if all == "*" || all.split(',').any(|one| one.trim() == ours) => continue,
            all => format!("{all},{ours}"),
        };
        annotations.insert(key.to_owned(), json!(all));
        before.push((key.to_owned(), was));
    }
    if let Some(app) = app.filter(|_| !annotations.contains_key(DEFAULT_CONTAINER)) {
        annotations.insert(DEFAULT_CONTAINER.to_owned(), app);
        before.push((DEFAULT_CONTAINER.to_owned(), None));
    }
    Ok(before)
}

/// Changes the app's containers. Returns them, and the requests that the proxy sends to the app for the kubelet.
fn change_apps(
    mut apps: Apps,
    owns: &[Option<OwnHook>],
    parts: &Parts,
    record: &mut Undo,
    warnings: &mut Vec<String>,
) -> Result<(Apps, Vec<String>), String> {
    let mut app_probes = Vec::new();
    if let (Some(plan), [(_, app)]) = (parts.plan, apps.as_mut_slice()) {
        *record = std::mem::take(record).with(app, plan, parts.annotations.probe());
        app_probes = change_app(app, plan, parts, record, warnings)?;
    } else {
        let mut undo = capture::CaptureUndo::default();
        for ((_, app), own) in apps.iter_mut().zip(owns) {
            let (name, own) = (app["name"].as_str().unwrap_or_default().to_owned(), own.as_ref());
            undo.containers.insert(name, capture::change(app, own, parts, warnings)?);
        }
        record.captured = Some(undo);
    }
    Ok((apps, app_probes))
}

/// Changes ports, probes, hook and environment of the app's container. Returns the requests that the proxy sends to the
/// app for the kubelet.
fn change_app(
    app: &mut Map<String, Value>,
    plan: &Plan,
    parts: &Parts,
    record: &mut Undo,
    warnings: &mut Vec<String>,
) -> Result<Vec<String>, String> {
    let app_probes = change_probes(app, plan, parts.annotations, record, warnings)?;
    let hook = hooks::of_app(parts.own.first(), parts.annotations, parts.settings)?;
    object(app, "lifecycle")?.insert("preStop".to_owned(), hook);
    if plan.moved {
        let all = list(app, "ports")?.iter_mut().filter_map(Value::as_object_mut);
        for port in all.filter(|port| port.get("containerPort") == Some(&json!(plan.was)) && is_tcp(port)) {
            port.insert("containerPort".to_owned(), json!(plan.listen));
        }
    } else {
        let value = plan.app.variable();
        set_env(app, "PORT", value.as_str().map_or_else(|| value.to_string(), str::to_owned))?;
    }
    if parts.preload {
        let options = env(app, "NODE_OPTIONS").and_then(|var| var["value"].as_str()).unwrap_or_default();
        let options = format!("{options} {}", preload_option()).trim_start().to_owned();
        set_env(app, "NODE_OPTIONS", options)?;
    }
    let socket = matches!(plan.app, AppAddr::Socket(_));
    if parts.shares() || socket {
        if mounted(app) {
            return Err(format!(
                "something else is mounted on {SHARE_DIR}, where the app would find the sidecar's files"
            ));
        }
        // Creating a socket takes write permission in its directory.
        list(app, "volumeMounts")?
            .push(json!({ "name": SIDECAR, "mountPath": SHARE_DIR, "readOnly": !socket }));
    }
    Ok(app_probes)
}

fn change_probes(
    app: &mut Map<String, Value>,
    plan: &Plan,
    annotations: &Annotations,
    record: &mut Undo,
    warnings: &mut Vec<String>,
) -> Result<Vec<String>, String> {
    let mut app_probes = Vec::new();
    for (place, handler) in probes(app) {
        let port = handler.get("port").unwrap_or(&Value::Null);
        if *port != json!(plan.was) && (port.is_null() || port.as_str() != plan.name.as_deref()) {
            continue;
        }
        let (port, path) = (port.clone(), handler.get("path").cloned());
        match &plan.app {
            AppAddr::Port(app) => {
                handler.insert("port".to_owned(), json!(app));
                if port != json!(app) {
                    record.probes.insert(place, port);
                }
            }
            AppAddr::Socket(_) => {
                let target = hooks::to_app_probe(&place, handler, annotations.probe())?;
                if place.starts_with("lifecycle.") {
                    warnings.push(hooks::post_start(&place, annotations)?);
                }
                if !app_probes.contains(&target) {
                    app_probes.push(target);
                }
                record.probes.insert(place, json!({ "port": port, "path": path }));
            }
        }
    }
    Ok(app_probes)
}

fn set_env(app: &mut Map<String, Value>, name: &str, value: String) -> Result<(), String> {
    let vars = list(app, "env")?;
    match vars.iter_mut().rfind(|var| var["name"] == name).and_then(Value::as_object_mut) {
        Some(var) => {
            var.remove("valueFrom");
            var.insert("value".to_owned(), json!(value));
        }
        None => vars.push(json!({ "name": name, "value": value })),
    }
    Ok(())
}
