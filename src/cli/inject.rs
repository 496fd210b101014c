//! Arguments of `inject`, `uninject` and `audit`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, json};

use crate::inject::PatchSettings;
use crate::inject::Services;
use crate::inject::command::{AuditTask, FileTask, Output};
use crate::inject::diff::Pointer;
use crate::inject::kinds;
use crate::inject::manifest::Task;
use crate::inject::names::PULL_POLICIES;
use crate::inject::quantity;
use crate::inject::resources::resources;

/// The text after the help of `inject`: the annotations that a pod can have.
pub(super) const ANNOTATIONS: &str = "\
Annotations of a pod (template), all lameduck.dev/NAME:
  inject: disabled              don't add the sidecar
  capture: loopback             serve every port of the app, also if all are known not to be HTTP
  capture: port-name | port-env for a program that does not move: the proxy gets one port, whose name moves, or PORT is
                                another number
  ports: 8080=http 9000=tcp 7000=skip
                                what captured ports are served as, instead of what their first bytes say
  container                     the only container of the app; by default all are the app's
  port                          port of the app that the proxy gets, if it gets one and there are several
  app-port                      port on which the app listens; the proxy takes the container port
  app-socket                    the same with a unix socket: /run/lameduck/app.sock, which is then the app's PORT
  proxy-port, probe-port        ports of the proxy for clients and for the kubelet's probes
  sidecar: ordinary             for Kubernetes before 1.29
  grace                         raise terminationGracePeriodSeconds to this, as in 90s
  pid1: preload | share | leave how to make SIGTERM work for an app that is PID 1 without a handler
  image, image-pull-policy      of the sidecar
  cpu-request, cpu-limit, memory-request, memory-limit
  and these flags of `lameduck proxy`: {flags}

Exit codes:
  0 = done; what can't be injected is left as it is, and the report on stderr says why
  1 = with --check: something would change; with --strict: something was skipped
  2 = the command line is wrong, or a file could not be read, written or understood";

pub(super) const EXIT_CODES: &str = "\
Exit codes:
  0 = done; what can't be injected is left as it is, and the report on stderr says why
  1 = with --check: something would change
  2 = the command line is wrong, or a file could not be read, written or understood";

pub(super) const AUDIT_EXIT_CODES: &str = "\
Exit codes:
  0 = every pod that should have the sidecar has it, in the wanted version, unless it is left without it for a reason
  1 = replacing a pod would change it, or a label or annotation means nothing where it is
  2 = the command line is wrong, or the input could not be read or has no pods";

#[derive(Debug, Args)]
pub(super) struct AuditArgs {
    /// Output of kubectl get namespaces,pods -A -o json (or -o yaml), with deployments,statefulsets,daemonsets if their
    /// labels are to be checked too: files, or - for stdin; at most 64 MiB each
    #[arg(value_name = "FILE|DIR|-", default_value = "-")]
    pub inputs: Vec<PathBuf>,
    /// Image that the sidecars should have, as given to the webhook [default: any with the tag of this version]
    #[arg(long, env = "LAMEDUCK_IMAGE", value_name = "IMAGE")]
    pub image: Option<String>,
}

impl AuditArgs {
    /// Makes the task, with the same checks as for `inject`.
    pub fn task(
        self,
        check: fn(&[String]) -> Result<(), String>,
        flags: fn() -> &'static [String],
    ) -> AuditTask {
        let settings = PatchSettings {
            image: self.image.clone().unwrap_or_default(),
            pull_policy: None,
            resources: Default::default(),
            token: String::new(),
            service_ports: vec![],
            services: Services::Unseen,
            check,
            flags,
        };
        AuditTask { inputs: self.inputs, settings: Box::new(settings), image: self.image }
    }
}

#[derive(Debug, Args)]
pub(super) struct FileArgs {
    /// Manifests: files, folders (every .yaml, .yml and .json in and under them), or - for stdin
    #[arg(value_name = "FILE|DIR|-", default_value = "-")]
    pub inputs: Vec<PathBuf>,
    /// Change the files in place, and print nothing
    #[arg(long, short, conflicts_with_all = ["check", "diff"])]
    pub in_place: bool,
    /// Print no manifests; exit with 1 if something would change
    #[arg(long)]
    pub check: bool,
    /// Print what would change instead of the manifests
    #[arg(long)]
    pub diff: bool,
}

/// Requests and limits of the sidecar, for `inject` and `webhook`.
#[derive(Debug, Args)]
pub(super) struct ResourceArgs {
    /// CPU request of the sidecar [default: 10m]
    #[arg(long, env = "LAMEDUCK_CPU_REQUEST", value_name = "QUANTITY", value_parser = quantity::parse)]
    pub cpu_request: Option<String>,
    /// Memory request of the sidecar [default: 24Mi]
    #[arg(long, env = "LAMEDUCK_MEMORY_REQUEST", value_name = "QUANTITY", value_parser = quantity::parse)]
    pub memory_request: Option<String>,
    /// CPU limit of the sidecar, where a ResourceQuota demands one [default: none]
    #[arg(long, env = "LAMEDUCK_CPU_LIMIT", value_name = "QUANTITY", value_parser = quantity::parse)]
    pub cpu_limit: Option<String>,
    /// Memory limit of the sidecar, where a ResourceQuota demands one [default: none]
    #[arg(long, env = "LAMEDUCK_MEMORY_LIMIT", value_name = "QUANTITY", value_parser = quantity::parse)]
    pub memory_limit: Option<String>,
}

impl ResourceArgs {
    /// Requests and limits of CPU and memory.
    ///
    /// # Errors
    /// A request is over its limit.
    pub fn checked(self) -> Result<[Option<String>; 4], String> {
        let all = [self.cpu_request, self.memory_request, self.cpu_limit, self.memory_limit];
        // As in a pod that is not Guaranteed.
        let pod = Map::from_iter([("containers".to_owned(), json!([{}]))]);
        resources(&pod, &Default::default(), &all).map(|_| all)
    }
}

#[derive(Debug, Args)]
pub(super) struct InjectArgs {
    #[command(flatten)]
    pub files: FileArgs,
    /// Image of the sidecar; its entrypoint must be lameduck
    #[arg(long, env = "LAMEDUCK_IMAGE", value_name = "IMAGE",
          default_value = concat!("lameduck:", env!("CARGO_PKG_VERSION")))]
    pub image: String,
    /// imagePullPolicy of the sidecar [default: left to Kubernetes]
    #[arg(long, env = "LAMEDUCK_IMAGE_PULL_POLICY", value_name = "POLICY",
          value_parser = PULL_POLICIES)]
    pub image_pull_policy: Option<String>,
    #[command(flatten)]
    pub resources: ResourceArgs,
    /// Secret from which the /drain token of each workload is derived. The same seed gives the same manifests
    #[arg(
        long,
        env = "LAMEDUCK_TOKEN_SEED",
        value_name = "TEXT",
        hide_env_values = true,
        default_value = ""
    )]
    pub token_seed: String,
    /// Namespace of objects that don't name one; give the namespace to which you apply them
    #[arg(long, short, value_name = "NAME", default_value = "default")]
    pub namespace: String,
    /// A further kind of workload and the path of its pod template, as in Rollout=spec.template. Can be given several
    /// times
    #[arg(long = "kind", value_name = "KIND=PATH", value_parser = kinds::parse)]
    pub kinds: Vec<(String, Pointer)>,
    /// Exit with 1 if a workload was skipped, unless by lameduck.dev/inject: disabled
    #[arg(long)]
    pub strict: bool,
}

impl InjectArgs {
    /// Makes the task. `check` validates the command line of a proxy, `flags` are those that annotations set.
    ///
    /// # Errors
    /// The text for the user if the arguments contradict each other.
    pub fn request(
        self,
        check: fn(&[String]) -> Result<(), String>,
        flags: fn() -> &'static [String],
    ) -> Result<FileTask, String> {
        let settings = PatchSettings {
            image: self.image,
            pull_policy: self.image_pull_policy,
            resources: self.resources.checked()?,
            token: String::new(),
            service_ports: vec![],
            services: Services::Seen,
            check,
            flags,
        };
        let (settings, seed) = (Box::new(settings), self.token_seed);
        let task = Task::Inject { settings, seed, namespace: self.namespace, kinds: self.kinds };
        Ok(FileTask { strict: self.strict, ..self.files.request(task)? })
    }
}

impl FileArgs {
    pub fn request(self, task: Task) -> Result<FileTask, String> {
        let stdin = self.inputs.iter().filter(|path| *path == Path::new("-")).count();
        if stdin > 1 || (stdin == 1 && self.in_place) {
            return Err("- (stdin) can be read only once, and not edited in place".to_owned());
        }
        let output = match self {
            Self { diff: true, .. } => Output::Diff,
            Self { in_place: true, .. } => Output::InPlace,
            Self { check: true, .. } => Output::Nothing,
            Self { .. } => Output::Stdout,
        };
        Ok(FileTask { inputs: self.inputs, task, output, check: self.check, strict: false })
    }
}
