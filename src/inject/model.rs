//! Plain data that the modules of `inject` exchange.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::names::PROBE_PORT;
use crate::config::CaptureRule;

/// Source text of values, by their location: it is put back instead of the value's usual text.
pub type Written = BTreeMap<String, String>;

/// Settings of one injection; all but the token and the ports of the Services are the same for every pod.
#[derive(Clone, Debug)]
pub struct PatchSettings {
    /// The sidecar's image; its entrypoint is lameduck.
    pub image: String,
    /// The sidecar's imagePullPolicy; none leaves it to Kubernetes.
    pub pull_policy: Option<String>,
    /// The sidecar's `cpu-request`, `memory-request`, `cpu-limit` and `memory-limit`, for a pod without that annotation.
    pub resources: [Option<String>; 4],
    /// Token that the hooks send to the probe port.
    pub token: String,
    /// Whether the pod's Services are changed too.
    pub services: Services,
    /// TCP ports of the Services that are seen to select the pod.
    pub service_ports: Vec<Value>,
    /// Checks a proxy's command line (without the program's name); the error says what is wrong.
    pub check: fn(&[String]) -> Result<(), String>,
    /// Flags of the proxy that an annotation of the same name sets.
    pub flags: fn() -> &'static [String],
}

/// Parsed annotations of a pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Annotations {
    /// `container`: name of the app's container, if the pod has several.
    pub container: Option<String>,
    /// `capture`: how the proxy gets the app's traffic; none chooses between the ways other than loopback, because
    /// other annotations place the proxy, or the sidecar is an ordinary one.
    pub capture: Option<CaptureWay>,
    /// Whether nothing says that the app should be served: neither `capture` nor a place of the proxy or the app.
    pub unasked: bool,
    /// `ports`: what captured ports are served as.
    pub ports: Vec<CaptureRule>,
    /// `port`: name or number of the container port, if there are several.
    pub port: Option<String>,
    /// `app-port`: port on which the app listens; the proxy takes the container port.
    pub app_port: Option<u16>,
    /// `app-socket`: path of the unix socket on which the app listens.
    pub app_socket: Option<String>,
    /// `proxy-port`: port on which the proxy listens, unless it takes the app's port.
    pub proxy_port: Option<u16>,
    /// `probe-port`: port for the kubelet's probes and hooks.
    pub probe_port: Option<u16>,
    /// `sidecar: ordinary`, for clusters before Kubernetes 1.29.
    pub ordinary: bool,
    /// `grace`: minimum for terminationGracePeriodSeconds, in seconds.
    pub grace: Option<u64>,
    /// `pid1`.
    pub pid1: Pid1,
    /// `image`: image of the sidecar.
    pub image: Option<String>,
    /// `image-pull-policy`: imagePullPolicy of the sidecar.
    pub pull_policy: Option<String>,
    /// `cpu-request`, `memory-request`, `cpu-limit`, `memory-limit`.
    pub resources: [Option<String>; 4],
    /// Flags of the proxy with their values.
    pub flags: Vec<(String, String)>,
    /// Unknown annotations with our prefix: probably typing errors.
    pub unknown: Vec<String>,
}

impl Annotations {
    /// Whether the app's ports are captured.
    pub fn captures(&self) -> bool {
        self.capture == Some(CaptureWay::Loopback)
    }

    /// Whether annotations say where the proxy or the app listens.
    pub fn place_the_proxy(&self) -> bool {
        self.places().any(|(_, there)| there)
    }

    /// Annotations that say where the proxy or the app listens, each with whether it is there.
    fn places(&self) -> impl Iterator<Item = (&'static str, bool)> {
        let all = [
            ("port", self.port.is_some()),
            ("app-port", self.app_port.is_some()),
            ("app-socket", self.app_socket.is_some()),
            ("proxy-port", self.proxy_port.is_some()),
        ];
        all.into_iter()
    }

    /// Annotations that mean nothing beside the way in which the proxy gets the app's traffic, each with when.
    pub fn idle(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let with = "with lameduck.dev/capture: loopback";
        let others = self.places().filter(|(_, there)| *there && self.captures());
        let ports = !self.ports.is_empty() && !self.captures();
        let ports = ports.then_some(("ports", "without lameduck.dev/capture: loopback"));
        others.map(move |(name, _)| (name, with)).chain(ports)
    }

    /// Port for the kubelet's probes and hooks.
    pub fn probe(&self) -> u16 {
        self.probe_port.unwrap_or(PROBE_PORT)
    }

    /// Value of a proxy flag, if the pod has an annotation for it.
    pub fn flag(&self, name: &str) -> Option<&str> {
        self.flags.iter().find(|(flag, _)| flag == name).map(|(_, value)| value.as_str())
    }
}

/// How the proxy gets the app's traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaptureWay {
    /// The app moves to another loopback address, and the proxy takes all its ports.
    Loopback,
    /// The name of the app's port moves to the proxy's port.
    PortName,
    /// The proxy takes the app's port, and `PORT` gets another one.
    PortEnv,
}

/// How SIGTERM reaches an app that runs as PID 1 without a handler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pid1 {
    /// `NODE_OPTIONS` loads a file that makes Node exit.
    #[default]
    Preload,
    /// `shareProcessNamespace`: the app is not PID 1 any more.
    Share,
    /// No change.
    Leave,
}

/// Whether the Services that select the pod are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Services {
    /// The CLI: a numeric target port is replaced by the port's name in the same run.
    Seen,
    /// The webhook: a numeric target port may bypass the proxy.
    Unseen,
}

/// Address on which the app listens after the injection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AppAddr {
    /// TCP port of loopback.
    Port(u16),
    /// Unix socket; `PORT` is set to its path.
    Socket(String),
}

impl AppAddr {
    /// Value of the proxy's `--upstream`.
    pub fn upstream(&self) -> String {
        match self {
            Self::Port(port) => format!("127.0.0.1:{port}"),
            Self::Socket(path) => format!("unix:{path}"),
        }
    }

    /// Value of the app's `PORT` variable.
    pub fn variable(&self) -> Value {
        match self {
            Self::Port(port) => json!(port),
            Self::Socket(path) => json!(path),
        }
    }

    /// TCP port; none for a unix socket.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Port(port) => Some(*port),
            Self::Socket(_) => None,
        }
    }
}

/// Ports after the injection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Port on which the proxy listens.
    pub listen: u16,
    /// Address on which the app listens.
    pub app: AppAddr,
    /// Number of the container port before the injection.
    pub was: u16,
    /// Name of the container port.
    pub name: Option<String>,
    /// True: the app keeps its port, and the port's name moves to the proxy's port. False: the proxy takes the port,
    /// and `PORT` gets another one.
    pub moved: bool,
    /// Warning about traffic that may bypass the proxy.
    pub warning: Option<String>,
}

/// The user's own preStop hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnHook {
    /// Only sleeps, for this number of seconds: the minimum lame-duck phase.
    Sleep(u64),
    /// HTTP GET that the proxy sends after the drain.
    Get {
        /// Path on the app, or a full URL within the pod.
        url: String,
        /// Header fields as `Name: value`.
        headers: Vec<String>,
    },
    /// Command that the app's container runs after the drain.
    Exec(Vec<String>),
}

/// Input for the sidecar's container.
pub struct Parts<'a> {
    /// Image and token.
    pub settings: &'a PatchSettings,
    /// Parsed annotations.
    pub annotations: &'a Annotations,
    /// Ports that the proxy takes; none if it captures those that the app opens.
    pub plan: Option<&'a Plan>,
    /// What captured ports are served as.
    pub rules: Vec<CaptureRule>,
    /// terminationGracePeriodSeconds of the pod.
    pub grace: u64,
    /// The user's own preStop hooks.
    pub own: Vec<OwnHook>,
    /// Whether the pod is to complete, as a Job's, and no Service is seen to select it.
    pub completes: bool,
    /// Whether Node loads the preload.
    pub preload: bool,
    /// runAsUser of the sidecar.
    pub user: u64,
    /// `resources` of the sidecar.
    pub resources: Value,
}

impl Parts<'_> {
    /// Whether the app's container mounts the shared directory.
    pub fn shares(&self) -> bool {
        self.plan.is_none() || self.preload || self.own.iter().any(|own| matches!(own, OwnHook::Exec(_)))
    }
}
