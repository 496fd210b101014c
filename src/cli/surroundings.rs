//! What the defaults depend on: the environment and the machine. Nothing else reads the environment.

use std::path::{Path, PathBuf};

use super::clients::ControlArgs;
use super::webhook;

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
    /// Where the control socket may be, best first.
    pub control_candidates: Vec<PathBuf>,
    /// Cores that this process may use.
    pub cores: usize,
    /// The API server's host and port.
    pub api: Option<(String, u16)>,
}

impl Surroundings {
    pub fn look() -> Self {
        let mut control_candidates = vec![PathBuf::from("/run/lameduck/control.sock")];
        if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
            control_candidates.push(Path::new(&dir).join("lameduck.sock"));
        }
        let uid = rustix::process::getuid().as_raw();
        control_candidates.push(format!("/tmp/lameduck-{uid}.sock").into());
        Self {
            in_pod: in_pod(),
            port: std::env::var("PORT").ok().filter(|port| !port.is_empty()),
            control_candidates,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            api: webhook::api(),
        }
    }

    /// The first place where a socket can be made; its directory may still be missing.
    pub fn control_to_serve(&self) -> PathBuf {
        let usable = |path: &&PathBuf| {
            let dir = path.parent().unwrap_or(Path::new("/"));
            writable(dir) || (!dir.exists() && dir.parent().is_some_and(writable))
        };
        self.control_candidates.iter().find(usable).unwrap_or(&self.control_candidates[0]).clone()
    }

    /// The first place where there is a socket; else the one where it should be.
    pub fn control_to_call(&self, args: ControlArgs) -> PathBuf {
        let found = || self.control_candidates.iter().find(|path| path.exists()).cloned();
        args.control.or_else(found).unwrap_or_else(|| self.control_to_serve())
    }
}

fn writable(dir: &Path) -> bool {
    use rustix::fs::Access;
    dir.is_dir() && rustix::fs::access(dir, Access::WRITE_OK | Access::EXEC_OK).is_ok()
}
