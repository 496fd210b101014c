//! What the defaults depend on: the environment and the machine. Nothing else reads the environment.

use std::path::Path;

use super::webhook;
use crate::config::{ControlAddr, ControlPlaces};

/// Whether this runs in a pod: Kubernetes gives `KUBERNETES_SERVICE_HOST` to every container.
pub fn in_pod() -> bool {
    std::env::var_os("KUBERNETES_SERVICE_HOST").is_some_and(|host| !host.is_empty())
}

/// What the defaults depend on.
#[derive(Clone, Debug, Default)]
pub(super) struct Surroundings {
    /// This runs in a pod.
    pub in_pod: bool,
    /// `PORT`, which `run` takes over.
    pub port: Option<String>,
    /// Where the control socket is by default, best first.
    pub control: Vec<ControlAddr>,
    /// Cores that this process may use.
    pub cores: usize,
    /// The API server's host and port.
    pub api: Option<(String, u16)>,
}

impl Surroundings {
    /// Those of this process.
    pub fn look() -> Self {
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

    /// Where a client looks for the proxy, or a proxy for a place.
    pub fn places(&self, given: Option<ControlAddr>) -> ControlPlaces {
        ControlPlaces { given, defaults: self.control.clone() }
    }
}
