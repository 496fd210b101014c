//! What can be typed after `inject` and `uninject`, and what it means.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::inject::Services;
use crate::inject::Settings;
use crate::inject::command::{FileTask, Output};
use crate::inject::manifest::Task;

/// For `inject` alone: what a pod's owner can say.
pub(super) const ANNOTATIONS: &str = "\
Annotations of a pod (template), all lameduck.dev/NAME:
  inject: disabled              leave this one alone
  container, port               the app's, where there are several
  app-port                      the proxy takes the container port, the app listens here
  app-socket                    the same, but on a unix socket: /run/lameduck/app.sock, which is its PORT then
  proxy-port, probe-port        where the proxy listens, and where the kubelet asks
  sidecar: ordinary             for Kubernetes before 1.29
  grace                         what terminationGracePeriodSeconds is raised to, as in 90s
  pid1: preload | share | leave how an app as PID 1 without a handler gets to hear SIGTERM
  image, image-pull-policy      the sidecar's
  cpu-request, cpu-limit, memory-request, memory-limit
  and these flags of `lameduck proxy`: {flags}

Exit codes:
  0 = done; what can't be injected is left as it is, and the report on stderr says why
  1 = with --check: something would change
  2 = the command line is wrong, or a file could not be read, written or understood";

pub(super) const EXIT_CODES: &str = "\
Exit codes:
  0 = done; what can't be injected is left as it is, and the report on stderr says why
  1 = with --check: something would change
  2 = the command line is wrong, or a file could not be read, written or understood";

#[derive(Debug, Args)]
pub(super) struct FileArgs {
    /// Manifests: files, folders (every .yaml, .yml and .json in and under them), or - for stdin
    #[arg(value_name = "FILE|DIR|-", default_value = "-")]
    pub inputs: Vec<PathBuf>,
    /// Change the files themselves, and print nothing
    #[arg(long, short, conflicts_with_all = ["check", "diff"])]
    pub in_place: bool,
    /// Print no manifests; exit 1 if something would change
    #[arg(long)]
    pub check: bool,
    /// Print what would change instead of the manifests
    #[arg(long)]
    pub diff: bool,
}

#[derive(Debug, Args)]
pub(super) struct InjectArgs {
    #[command(flatten)]
    pub files: FileArgs,
    /// The sidecar's image, whose entrypoint is lameduck
    #[arg(long, env = "LAMEDUCK_IMAGE", value_name = "IMAGE",
          default_value = concat!("lameduck:", env!("CARGO_PKG_VERSION")))]
    pub image: String,
    /// The sidecar's imagePullPolicy [default: left to Kubernetes]
    #[arg(long, env = "LAMEDUCK_IMAGE_PULL_POLICY", value_name = "POLICY",
          value_parser = ["Always", "IfNotPresent", "Never"])]
    pub image_pull_policy: Option<String>,
    /// A secret from which each workload's token for /drain is derived: the same seed, the same manifests
    #[arg(
        long,
        env = "LAMEDUCK_TOKEN_SEED",
        value_name = "TEXT",
        hide_env_values = true,
        default_value = ""
    )]
    pub token_seed: String,
    /// The namespace of objects that name none: the one that you apply them to
    #[arg(long, short, value_name = "NAME", default_value = "default")]
    pub namespace: String,
}

impl InjectArgs {
    /// What is to be done; `check` says what is wrong with a proxy's command line,
    /// `is_flag` which annotations are flags.
    pub fn request(
        self,
        check: fn(&[String]) -> Result<(), String>,
        is_flag: fn(&str) -> bool,
    ) -> Result<FileTask, String> {
        let settings = Settings {
            image: self.image,
            pull_policy: self.image_pull_policy,
            token: String::new(),
            services: Services::Seen,
            check,
            is_flag,
        };
        let (settings, seed) = (Box::new(settings), self.token_seed);
        self.files.request(Task::Inject { settings, seed, namespace: self.namespace })
    }
}

impl FileArgs {
    pub fn request(self, task: Task) -> Result<FileTask, String> {
        let stdin = self.inputs.iter().filter(|path| *path == Path::new("-")).count();
        if stdin > 1 || (stdin == 1 && self.in_place) {
            return Err("- (stdin) can be read once, and not changed in place".to_owned());
        }
        let output = match self {
            Self { diff: true, .. } => Output::Diff,
            Self { in_place: true, .. } => Output::InPlace,
            Self { check: true, .. } => Output::Nothing,
            Self { .. } => Output::Stdout,
        };
        Ok(FileTask { inputs: self.inputs, task, output, check: self.check })
    }
}
