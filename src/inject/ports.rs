//! Chooses the port that the proxy takes over from the app, and how clients find it. Pure.

use serde_json::{Map, Value};

use super::json::{containers, env, is_tcp, native_sidecars, ports};
use super::model::{Annotations, AppAddr, CaptureWay, Plan, Services};
use super::names::{CONTROL_ADDR, PROXY_PORT};
use crate::config::{TcpRoute, parse_listen};

const HELP: &str = "see lameduck.dev/proxy-port, probe-port, control-listen, tcp and app-port";
/// Reason for leaving a pod as it is that serves nothing.
pub const NO_PORT: &str = "the app has no TCP containerPort to stand in front of";
/// Value of the app's `PORT` when the proxy takes its port.
const SHIFTED: u16 = 4883;

/// Chooses the ports.
///
/// # Errors
/// Says why they can't be chosen, and which annotation would help.
pub fn plan(app: &Map<String, Value>, annotations: &Annotations, services: Services) -> Result<Plan, String> {
    let (was, name) = choose(app, annotations)?;
    let literal = env(app, "PORT").and_then(|var| var.get("value")).and_then(Value::as_str);
    let has_port = literal.is_some_and(|value| value.parse() == Ok(was));
    let proxy = annotations.proxy_port.unwrap_or(PROXY_PORT);
    let taken = |app| Plan { listen: was, app, was, name: name.clone(), moved: false, warning: None };
    let moved = |warning| Plan {
        listen: proxy,
        app: AppAddr::Port(was),
        was,
        name: name.clone(),
        moved: true,
        warning,
    };
    let asked = match (annotations.app_port, &annotations.app_socket) {
        (Some(_), Some(_)) => return Err("lameduck.dev/app-port and app-socket are both there".to_owned()),
        (port, socket) => port.map(AppAddr::Port).or_else(|| socket.clone().map(AppAddr::Socket)),
    };
    let (by_name, by_env) = match annotations.capture {
        Some(CaptureWay::PortName) if asked.is_some() => {
            return Err(
                "lameduck.dev/capture: port-name leaves the app its port: take app-port and app-socket away"
                    .to_owned(),
            );
        }
        Some(CaptureWay::PortName) => (true, false),
        Some(CaptureWay::PortEnv) => (false, true),
        Some(CaptureWay::Loopback) | None => (services == Services::Seen, has_port),
    };
    let plan = match (asked, &name) {
        (Some(app), _) => taken(app),
        (None, Some(_)) if by_name && services == Services::Seen => moved(None),
        (None, _) if by_env => taken(AppAddr::Port(SHIFTED)),
        (None, Some(name)) => moved(Some(format!(
            "a Service whose targetPort is the number {was} goes past the proxy: give it the name '{name}'"
        ))),
        (None, None) => {
            return Err(format!(
                "port {was} has no name, so no Service could find the proxy: name it (and roll that out first), or set \
                 the app's PORT to {was}, or annotate lameduck.dev/app-port"
            ));
        }
    };
    distinct(&plan, annotations, app)?;
    Ok(plan)
}

/// TCP port of the app: the annotated one, or the only one.
fn choose(app: &Map<String, Value>, annotations: &Annotations) -> Result<(u16, Option<String>), String> {
    let tcp: Vec<_> = ports(app).filter(|port| port.as_object().is_some_and(is_tcp)).collect();
    let named = |port: &&&Value, wanted: &str| {
        port["name"].as_str() == Some(wanted) || wanted.parse().is_ok_and(|n: u64| port["containerPort"] == n)
    };
    let port = match (&annotations.port, tcp.as_slice()) {
        (Some(wanted), all) => *all
            .iter()
            .find(|port| named(port, wanted))
            .ok_or_else(|| format!("annotation lameduck.dev/port: the app has no TCP port '{wanted}'"))?,
        (None, [only]) => only,
        (None, []) => return Err(NO_PORT.to_owned()),
        (None, _) => return Err("the app has several ports: say which by lameduck.dev/port".to_owned()),
    };
    let number = port["containerPort"].as_u64().and_then(|n| u16::try_from(n).ok()).filter(|n| *n != 0);
    let number = number.ok_or_else(|| format!("containerPort {} is not a port", port["containerPort"]))?;
    Ok((number, port["name"].as_str().map(str::to_owned)))
}

/// Checks that a pod has none of our ports if the app's are captured.
///
/// # Errors
/// Names the port that would be used twice.
pub fn captured(spec: &Map<String, Value>, annotations: &Annotations) -> Result<(), String> {
    let ours = ours(None, annotations);
    once(&ours)?;
    let named: Vec<u64> = routes(annotations).map(u64::from).collect();
    let all = containers(spec).chain(native_sidecars(spec)).flat_map(ports);
    not_taken(
        &ours,
        all.filter(|port| port["containerPort"].as_u64().is_none_or(|port| !named.contains(&port))),
    )
}

/// A pod's containers share one network namespace, so a port can be used only once.
fn distinct(plan: &Plan, annotations: &Annotations, app: &Map<String, Value>) -> Result<(), String> {
    let ours = ours(Some(plan), annotations);
    once(&ours)?;
    // A port of ours that a Service should find by name must be declared in the sidecar's own container.
    let named: Vec<u64> = routes(annotations).map(u64::from).chain([plan.was.into()]).collect();
    let others =
        ports(app).filter(|port| port["containerPort"].as_u64().is_none_or(|port| !named.contains(&port)));
    not_taken(&ours, others)
}

fn once(ours: &[(&str, u16)]) -> Result<(), String> {
    for (n, (what, port)) in ours.iter().enumerate() {
        if let Some((other, _)) = ours[..n].iter().find(|(_, earlier)| earlier == port) {
            return Err(format!("port {port} would be both {other}'s and {what}'s: {HELP}"));
        }
    }
    Ok(())
}

/// Ports of `--tcp`.
fn routes(annotations: &Annotations) -> impl Iterator<Item = u16> {
    let routes = annotations.flag("tcp").unwrap_or_default().split(',');
    routes.filter_map(|route| Some(route.parse::<TcpRoute>().ok()?.listen.port()))
}

/// Ports of the sidecar and of the app, each with its purpose. An invalid flag value is reported by the check of the
/// command line.
pub fn ours(plan: Option<&Plan>, annotations: &Annotations) -> Vec<(&'static str, u16)> {
    let mut ours: Vec<_> = plan.map(|plan| ("the proxy", plan.listen)).into_iter().collect();
    ours.push(("the probes", annotations.probe()));
    // None for `off`.
    let control = parse_listen(annotations.flag("control-listen").unwrap_or(CONTROL_ADDR));
    ours.extend(control.map(|addr| ("control", addr.port())));
    ours.extend(routes(annotations).map(|port| ("tcp", port)));
    ours.extend(plan.and_then(|plan| plan.app.port()).map(|port| ("the app", port)));
    ours
}

/// Refuses ports of ours that one of these container ports already uses.
///
/// # Errors
/// Names the port.
pub fn not_taken<'a>(ours: &[(&str, u16)], ports: impl Iterator<Item = &'a Value>) -> Result<(), String> {
    let tcp = ports.filter(|port| port.as_object().is_some_and(is_tcp));
    for port in tcp.filter_map(|port| port["containerPort"].as_u64()) {
        if ours.iter().any(|(_, ours)| u64::from(*ours) == port) {
            return Err(format!("port {port}, which lameduck needs, is another one's already: {HELP}"));
        }
    }
    Ok(())
}
