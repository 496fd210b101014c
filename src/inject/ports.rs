//! Which port the proxy takes over from the app, and how clients find it. Pure.

use serde_json::{Map, Value, json};

use super::annotations::Wishes;
use crate::config::{TcpRoute, parse_listen};

/// Where the proxy listens when it doesn't take the app's own port.
pub const PROXY: u16 = 4880;
/// Where the kubelet asks, unless it is annotated.
pub const PROBE: u16 = 4881;
/// Control over TCP, for this pod only: the proxy's default in a pod, unless it is annotated.
pub const CONTROL: &str = "127.0.0.1:4882";
const HELP: &str = "see lameduck.dev/proxy-port, probe-port, control-listen, tcp and app-port";
/// What an app's `PORT` becomes when the proxy takes its port.
const SHIFTED: u16 = 4883;

/// Whether the Services that lead to the pod are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Services {
    /// The CLI: numeric target ports are given the port's name in the same go.
    Seen,
    /// The webhook: a numeric target port may go past the proxy.
    Unseen,
}

/// Where the app listens from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum App {
    /// A port of its own.
    Port(u16),
    /// A unix socket; `PORT` is its path.
    Socket(String),
}

impl App {
    /// The proxy's `--upstream`.
    pub fn upstream(&self) -> String {
        match self {
            Self::Port(port) => format!("127.0.0.1:{port}"),
            Self::Socket(path) => format!("unix:{path}"),
        }
    }

    /// What the app's `PORT` is set to.
    pub fn variable(&self) -> Value {
        match self {
            Self::Port(port) => json!(port),
            Self::Socket(path) => json!(path),
        }
    }

    /// The port, unless it is a socket.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Port(port) => Some(*port),
            Self::Socket(_) => None,
        }
    }
}

/// What becomes of the ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Where the proxy listens.
    pub listen: u16,
    /// Where the kubelet asks.
    pub probe: u16,
    /// Where the app listens from now on.
    pub app: App,
    /// The container port's number before the injection.
    pub was: u16,
    /// The container port's name.
    pub name: Option<String>,
    /// The app keeps its port, and its name moves to the proxy's; else the proxy has the port and `PORT` is shifted.
    pub moved: bool,
    /// What may go past the proxy.
    pub warning: Option<String>,
}

/// Chooses.
///
/// # Errors
/// Why it can't be told, and what would tell it.
pub fn plan(app: &Map<String, Value>, wishes: &Wishes, services: Services) -> Result<Plan, String> {
    let (was, name) = choose(app, wishes)?;
    let literal = env(app, "PORT").and_then(|var| var.get("value")).and_then(Value::as_str);
    let has_port = literal.is_some_and(|value| value.parse() == Ok(was));
    let probe = wishes.probe_port.unwrap_or(PROBE);
    let proxy = wishes.proxy_port.unwrap_or(PROXY);
    let taken = |app| Plan { listen: was, probe, app, was, name: name.clone(), moved: false, warning: None };
    let moved = |warning| Plan {
        listen: proxy,
        probe,
        app: App::Port(was),
        was,
        name: name.clone(),
        moved: true,
        warning,
    };
    let asked = match (wishes.app_port, &wishes.app_socket) {
        (Some(_), Some(_)) => return Err("lameduck.dev/app-port and app-socket are both there".to_owned()),
        (port, socket) => port.map(App::Port).or_else(|| socket.clone().map(App::Socket)),
    };
    let plan = match (asked, &name, has_port, services) {
        (Some(app), ..) => taken(app),
        (None, Some(_), _, Services::Seen) => moved(None),
        (None, _, true, _) => taken(App::Port(SHIFTED)),
        (None, Some(name), false, Services::Unseen) => moved(Some(format!(
            "a Service whose targetPort is the number {was} goes past the proxy: give it the name '{name}'"
        ))),
        (None, None, false, _) => {
            return Err(format!(
                "port {was} has no name, so no Service could find the proxy: name it (and roll that out first), or set \
                 the app's PORT to {was}, or annotate lameduck.dev/app-port"
            ));
        }
    };
    distinct(&plan, wishes, app)?;
    Ok(plan)
}

/// The app's TCP port: the annotated one, or the only one.
fn choose(app: &Map<String, Value>, wishes: &Wishes) -> Result<(u16, Option<String>), String> {
    let tcp: Vec<_> = ports(app).filter(|port| protocol(port) == "TCP").collect();
    let named = |port: &&&Value, wanted: &str| {
        port["name"].as_str() == Some(wanted) || wanted.parse().is_ok_and(|n: u64| port["containerPort"] == n)
    };
    let port = match (&wishes.port, tcp.as_slice()) {
        (Some(wanted), all) => *all
            .iter()
            .find(|port| named(port, wanted))
            .ok_or_else(|| format!("annotation lameduck.dev/port: the app has no TCP port '{wanted}'"))?,
        (None, [only]) => only,
        (None, []) => return Err("the app has no TCP containerPort to stand in front of".to_owned()),
        (None, _) => return Err("the app has several ports: say which by lameduck.dev/port".to_owned()),
    };
    let number = port["containerPort"].as_u64().and_then(|n| u16::try_from(n).ok()).filter(|n| *n != 0);
    let number = number.ok_or_else(|| format!("containerPort {} is no port", port["containerPort"]))?;
    Ok((number, port["name"].as_str().map(str::to_owned)))
}

/// The pod's containers share one network: no port twice.
fn distinct(plan: &Plan, wishes: &Wishes, app: &Map<String, Value>) -> Result<(), String> {
    let ours = ours(plan, wishes);
    for (n, (what, port)) in ours.iter().enumerate() {
        if let Some((other, _)) = ours[..n].iter().find(|(_, earlier)| earlier == port) {
            return Err(format!("port {port} would be both {other}'s and {what}'s: {HELP}"));
        }
    }
    // Its own container is the place to name a port of ours that a Service shall find by name.
    let named: Vec<u64> = routes(wishes).map(u64::from).chain([plan.was.into()]).collect();
    let others =
        ports(app).filter(|port| port["containerPort"].as_u64().is_none_or(|port| !named.contains(&port)));
    not_taken(plan, wishes, others)
}

/// Where `--tcp` listens.
fn routes(wishes: &Wishes) -> impl Iterator<Item = u16> {
    let routes = wishes.flag("tcp").unwrap_or_default().split(',');
    routes.filter_map(|route| Some(route.parse::<TcpRoute>().ok()?.listen.port()))
}

/// Where the sidecar and the app listen, and what for. A flag that means nothing is told by the command line's check.
fn ours(plan: &Plan, wishes: &Wishes) -> Vec<(&'static str, u16)> {
    let mut ours = vec![("the proxy", plan.listen), ("the probes", plan.probe)];
    // None for `off`.
    let control = parse_listen(wishes.flag("control-listen").unwrap_or(CONTROL));
    ours.extend(control.map(|addr| ("control", addr.port())));
    ours.extend(routes(wishes).map(|port| ("tcp", port)));
    ours.extend(plan.app.port().map(|port| ("the app", port)));
    ours
}

/// Refuses a port of ours that one of these container ports has.
///
/// # Errors
/// Which one.
pub fn not_taken<'a>(
    plan: &Plan,
    wishes: &Wishes,
    ports: impl Iterator<Item = &'a Value>,
) -> Result<(), String> {
    let ours = ours(plan, wishes);
    for port in ports.filter(|port| protocol(port) == "TCP").filter_map(|port| port["containerPort"].as_u64())
    {
        if ours.iter().any(|(_, ours)| u64::from(*ours) == port) {
            return Err(format!("port {port}, which lameduck needs, is another one's already: {HELP}"));
        }
    }
    Ok(())
}

/// A container's ports.
pub fn ports(container: &Map<String, Value>) -> impl Iterator<Item = &Value> {
    container.get("ports").and_then(Value::as_array).into_iter().flatten().filter(|port| port.is_object())
}

/// A variable of a container.
pub fn env<'a>(container: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    container.get("env")?.as_array()?.iter().rfind(|var| var["name"] == name)
}

fn protocol(port: &Value) -> &str {
    port["protocol"].as_str().unwrap_or("TCP")
}
