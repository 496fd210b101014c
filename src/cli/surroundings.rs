//! The environment and the machine, on which the defaults depend. Only `cli` reads the environment.

use std::path::Path;

use super::webhook;
use crate::config::{ControlAddr, ControlPlaces};

/// Whether this process runs in a pod: Kubernetes sets `KUBERNETES_SERVICE_HOST` in every container.
pub fn in_pod() -> bool {
    std::env::var_os("KUBERNETES_SERVICE_HOST").is_some_and(|host| !host.is_empty())
}

/// The parts of the environment and the machine that the defaults depend on.
#[derive(Clone, Debug, Default)]
pub(super) struct Surroundings {
    /// This process runs in a pod.
    pub in_pod: bool,
    /// `PORT`, which `run` takes over.
    pub port: Option<String>,
    /// Default places of the control socket, best first.
    pub control: Vec<ControlAddr>,
    /// Number of cores that this process may use.
    pub cores: usize,
    /// Host and port of the API server, in a pod.
    pub api: Option<(String, u16)>,
}

impl Surroundings {
    /// Reads them for this process.
    pub fn of_process() -> Self {
        let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
        let uid = rustix::process::geteuid().as_raw();
        Self {
            in_pod: in_pod(),
            port: std::env::var("PORT").ok().filter(|port| !port.is_empty()),
            control: ControlPlaces::defaults(runtime_dir.as_ref().map(Path::new), uid),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            api: webhook::api(),
        }
    }

    /// Places where a client looks for the proxy, or where a proxy may create its socket.
    pub fn places(&self, given: Option<ControlAddr>) -> ControlPlaces {
        ControlPlaces { given, defaults: self.control.clone() }
    }
}
