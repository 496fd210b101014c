//! What the parts of an injection hand to each other: plain data.

use serde_json::{Value, json};

/// What is the same for all pods, and what only the caller knows of this one.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The sidecar's image; its entrypoint is lameduck.
    pub image: String,
    /// The sidecar's imagePullPolicy; none leaves it to Kubernetes.
    pub pull_policy: Option<String>,
    /// What the hooks show to the probe port.
    pub token: String,
    /// Whether the pod's Services are changed along with it.
    pub services: Services,
    /// Says what is wrong with a proxy's command line (without the program's name).
    pub check: fn(&[String]) -> Result<(), String>,
    /// Whether an annotation of this name sets a flag of the proxy.
    pub is_flag: fn(&str) -> bool,
}

/// What the annotations ask for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Annotations {
    /// `container`: the app's, where there are several.
    pub container: Option<String>,
    /// `port`: the container port's name or number, where there are several.
    pub port: Option<String>,
    /// `app-port`: the proxy takes the container port, and the app listens here.
    pub app_port: Option<u16>,
    /// `app-socket`: the app listens on this unix socket.
    pub app_socket: Option<String>,
    /// `proxy-port`: where the proxy listens, unless it takes the app's port.
    pub proxy_port: Option<u16>,
    /// `probe-port`: where the kubelet asks.
    pub probe_port: Option<u16>,
    /// `sidecar: ordinary`, for a cluster before Kubernetes 1.29.
    pub ordinary: bool,
    /// `grace`, in seconds: what terminationGracePeriodSeconds is raised to.
    pub grace: Option<u64>,
    /// `pid1`.
    pub pid1: Pid1,
    /// `image`: the sidecar's.
    pub image: Option<String>,
    /// `image-pull-policy`: the sidecar's.
    pub pull_policy: Option<String>,
    /// `cpu-request`, `memory-request`, `cpu-limit`, `memory-limit`.
    pub resources: [Option<String>; 4],
    /// The proxy's own flags, with their values.
    pub flags: Vec<(String, String)>,
    /// Annotations of ours that mean nothing: typing errors.
    pub unknown: Vec<String>,
}

impl Annotations {
    /// The value of one of the proxy's flags, if it is annotated.
    pub fn flag(&self, name: &str) -> Option<&str> {
        self.flags.iter().find(|(flag, _)| flag == name).map(|(_, value)| value.as_str())
    }
}

/// How an app that is PID 1 and has no handler gets to hear SIGTERM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pid1 {
    /// A file that `NODE_OPTIONS` names lets Node exit.
    #[default]
    Preload,
    /// `shareProcessNamespace`: the app isn't PID 1 any more.
    Share,
    /// Nothing changes.
    Leave,
}

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
pub enum AppAddr {
    /// A port of its own.
    Port(u16),
    /// A unix socket; `PORT` is its path.
    Socket(String),
}

impl AppAddr {
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
    pub app: AppAddr,
    /// The container port's number before the injection.
    pub was: u16,
    /// The container port's name.
    pub name: Option<String>,
    /// The app keeps its port, and its name moves to the proxy's; else the proxy has the port and `PORT` is shifted.
    pub moved: bool,
    /// What may go past the proxy.
    pub warning: Option<String>,
}

/// The user's own preStop hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnHook {
    /// So many seconds, and nothing else: the least lame duck.
    Sleep(u64),
    /// The proxy sends this after the drain.
    Get {
        /// A path of the app itself, or a whole URL in the pod.
        url: String,
        /// `Name: value`.
        headers: Vec<String>,
    },
    /// The app's container runs this after the drain.
    Exec(Vec<String>),
}

/// What the container is made of.
pub struct Parts<'a> {
    /// Image and token.
    pub settings: &'a Settings,
    /// What the annotations ask for.
    pub annotations: &'a Annotations,
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
