//! Names and numbers that the sidecar, the patch and its removal share.

/// Prefix of our annotations and labels.
pub const PREFIX: &str = "lameduck.dev/";
/// `enabled` or `disabled`: a label for the webhook's selectors; the CLI also reads it as an annotation.
pub const INJECT: &str = "lameduck.dev/inject";
/// Reason for leaving a pod as it is that its owner has given.
pub const DISABLED: &str = "lameduck.dev/inject is disabled";
/// Record of what the injection changed, for the next injection and for `uninject`.
pub const INJECTED: &str = "lameduck.dev/injected";

/// Warnings for the owner of a pod that the webhook has changed, one a line.
pub const WARNINGS: &str = "lameduck.dev/warnings";
/// Values of imagePullPolicy.
pub const PULL_POLICIES: [&str; 3] = ["Always", "IfNotPresent", "Never"];

/// Name of the sidecar container and of its volume.
pub const SIDECAR: &str = "lameduck";
/// A container's probes.
pub const PROBES: [&str; 3] = ["livenessProbe", "readinessProbe", "startupProbe"];
/// Directory that the sidecar shares with the app: the control socket, the preload and the program.
pub const SHARE_DIR: &str = "/run/lameduck";
/// File name of the shim in [`SHARE_DIR`]: moves the app's sockets to another loopback address.
pub const SHIM: &str = "shim.so";
/// File name of the Node preload in [`SHARE_DIR`]: makes Node as PID 1 exit at SIGTERM.
pub const PRELOAD: &str = "preload.js";
/// File name of this program in [`SHARE_DIR`], for a preStop exec in the app's container.
pub const PROGRAM: &str = "lameduck";

/// Variable with the hooks' token: a command line is readable by other users of the node.
pub const TOKEN_ENV: &str = "LAMEDUCK_TOKEN";
/// Variable for `--after-drain-header`, one field per line: its value can be as secret as the token.
pub const AFTER_DRAIN_HEADER_ENV: &str = "LAMEDUCK_AFTER_DRAIN_HEADER";

/// Default port of the proxy when it doesn't take the app's port.
pub const PROXY_PORT: u16 = 4880;
/// Default port for probes and hooks.
pub const PROBE_PORT: u16 = 4881;
/// Default address for control over TCP, for this pod only: the proxy's default in a pod.
pub const CONTROL_ADDR: &str = "127.0.0.1:4882";

/// `--reserve` in seconds if the app has its own preStop hook: ten seconds more than the default.
pub const OWN_HOOK_RESERVE: u64 = 15;

/// Path of the shim in the app's containers.
pub fn shim() -> String {
    format!("{SHARE_DIR}/{SHIM}")
}

/// Path of the Node preload in the app's containers.
pub fn preload_file() -> String {
    format!("{SHARE_DIR}/{PRELOAD}")
}

/// Text that is appended to `NODE_OPTIONS`. Node 8 accepts the path after a space only, not after `=`.
pub fn preload_option() -> String {
    format!("--require {}", preload_file())
}
