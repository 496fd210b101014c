//! Names and numbers that the sidecar, the patch and its undoing agree on.

/// What our annotations and labels begin with.
pub const PREFIX: &str = "lameduck.dev/";
/// `enabled` or `disabled`: a label for the webhook's selectors; the CLI also reads it as an annotation.
pub const INJECT: &str = "lameduck.dev/inject";
/// What was there before the injection, for the next one and for `uninject`.
pub const INJECTED: &str = "lameduck.dev/injected";

/// The name of the sidecar container and of its volume.
pub const SIDECAR: &str = "lameduck";
/// The directory that the sidecar shares with the app: the control socket, the preload and the program.
pub const SHARE_DIR: &str = "/run/lameduck";
/// The Node preload, in [`SHARE_DIR`]: ends Node at SIGTERM as PID 1.
pub const PRELOAD: &str = "preload.js";
/// This program, in [`SHARE_DIR`]: for a preStop exec in the app's container.
pub const PROGRAM: &str = "lameduck";

/// The variable of the hooks' token: other users of a node can read a command line.
pub const TOKEN_ENV: &str = "LAMEDUCK_TOKEN";
/// The variable of `--after-drain-header`, one field per line: it can be as secret as the token.
pub const AFTER_DRAIN_HEADER_ENV: &str = "LAMEDUCK_AFTER_DRAIN_HEADER";

/// The port on which the proxy listens when it doesn't take the app's own port.
pub const PROXY_PORT: u16 = 4880;
/// The port for probes and hooks, unless it is annotated.
pub const PROBE_PORT: u16 = 4881;
/// Control over TCP, for this pod only, unless it is annotated: the proxy's default in a pod.
pub const CONTROL_ADDR: &str = "127.0.0.1:4882";

/// `--reserve` where the app has a preStop hook of its own: ten seconds more than without.
pub const OWN_HOOK_RESERVE: &str = "15s";

/// What is appended to `NODE_OPTIONS`. Node 8 accepts it with a space only, not with `=`.
pub fn preload_option() -> String {
    format!("--require {SHARE_DIR}/{PRELOAD}")
}
