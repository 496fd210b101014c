//! Deploys the slow app on the cluster, with its sidecar injected in each possible way.

use std::process::Command;

use super::cluster::{Namespace, with_input};
use super::images::{LAMEDUCK, lameduck};
use super::webhook;

/// The example for people without the webhook, complete as they would apply it.
const HAND: &str = include_str!("../../manifests/sidecar/slow.yaml");

/// The app as its owner would deploy it.
const PLAIN: &str = include_str!("../../examples/slow/deployment.yaml");

/// What `restricted` requires of the app's containers, and the default grace period of the cases.
const OURS: Changes<'static> = &[
    (
        "      labels: {app: slow}\n    spec:\n",
        "      labels: {app: slow}
      annotations: {lameduck.dev/grace: 75s}
    spec:
      securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
",
    ),
    (
        "          image: slow:1.0.0   # node server.js as PID 1\n",
        "          image: slow:1.0.0
          imagePullPolicy: Never
          securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
",
    ),
];

/// Replacements `(from, to)`; each `from` must occur.
pub type Changes<'a> = &'a [(&'a str, &'a str)];

/// How the sidecar gets into the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// By hand: `manifests/sidecar/slow.yaml` unchanged.
    Hand,
    /// By `lameduck inject`.
    Inject,
    /// By the webhook, through a label on the namespace.
    Webhook,
}

impl Namespace {
    /// Applies the slow app with these changes, and waits until all replicas are ready.
    pub fn deploy(&self, by: By, changes: Changes<'_>) {
        match by {
            By::Hand => self.apply(&changed(HAND, changes)),
            By::Inject => self.apply(&inject(&plain(changes))),
            By::Webhook => {
                webhook::installed();
                self.kubectl(&["label", "namespace", self.name, "lameduck.dev/inject=enabled"]);
                self.apply(&plain(changes));
            }
        }
        self.rolled_out();
    }
}

/// The plain Deployment and its Service.
pub fn plain(changes: Changes<'_>) -> String {
    changed(&changed(PLAIN, OURS), changes)
}

/// Output of `lameduck inject` for this manifest.
///
/// # Panics
/// If it fails, or skipped something.
pub fn inject(yaml: &str) -> String {
    let arguments =
        ["inject", "--image", LAMEDUCK, "--image-pull-policy", "Never", "--token-seed", "test", "-"];
    let output = with_input(Command::new(lameduck()).args(arguments), yaml);
    let report = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !report.contains("skipped"), "inject: {report}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The text with these replacements.
pub fn changed(text: &str, changes: Changes<'_>) -> String {
    changes.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "no {from:?} in {text}");
        text.replace(from, to)
    })
}
