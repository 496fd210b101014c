//! `lameduck.dev/*` on a pod → what is wanted. Pure.

use std::time::Duration;

use serde_json::{Map, Value};

use super::share::{PRELOAD, PROGRAM};
use super::sidecar::DIR;

/// What our annotations and labels begin with.
pub const PREFIX: &str = "lameduck.dev/";
/// `enabled` or `disabled`: a label for the webhook's selectors; the CLI also reads it as an annotation.
pub const INJECT: &str = "lameduck.dev/inject";
/// What was there before the injection, for the next one and for `uninject`.
pub const INJECTED: &str = "lameduck.dev/injected";

/// Annotations that are the proxy's flags of the same name.
pub const FLAGS: [&str; 31] = [
    "access-log",
    "answer-timeout",
    "body-timeout",
    "control-listen",
    "drain-readiness",
    "forwarded",
    "head-timeout",
    "idle-timeout",
    "lame-duck",
    "log-format",
    "log-level",
    "max-connections",
    "max-head",
    "max-held",
    "max-held-bytes",
    "max-in-flight",
    "max-streams",
    "max-uri",
    "proxy-protocol-from",
    "ready-check",
    "ready-timeout",
    "reserve",
    "restart-grace",
    "stream-spread",
    "tcp",
    "threads",
    "tunnel-timeout",
    "upstream-protocol",
    "upstream-wait",
    "warm-up",
    "warm-up-count",
];

/// What the annotations ask for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wishes {
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

impl Wishes {
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

/// Reads the annotations of a pod.
///
/// # Errors
/// Which one has a value that means nothing.
pub fn read(annotations: &Map<String, Value>) -> Result<Wishes, String> {
    let mut wishes = Wishes::default();
    for (key, value) in annotations {
        let Some(name) = key.strip_prefix(PREFIX) else { continue };
        let value = value.as_str().ok_or_else(|| format!("annotation {key} is no string"))?;
        set(&mut wishes, name, value).map_err(|why| format!("annotation {key}: {why}"))?;
    }
    Ok(wishes)
}

fn set(wishes: &mut Wishes, name: &str, value: &str) -> Result<(), String> {
    let text = || Some(value.to_owned());
    match name {
        "inject" | "injected" => {}
        "container" => wishes.container = text(),
        "port" => wishes.port = text(),
        "app-port" => wishes.app_port = Some(port(value)?),
        "app-socket" => wishes.app_socket = Some(socket(value)?),
        "proxy-port" => wishes.proxy_port = Some(port(value)?),
        "probe-port" => wishes.probe_port = Some(port(value)?),
        "sidecar" => {
            wishes.ordinary = match value {
                "native" => false,
                "ordinary" => true,
                _ => return Err(format!("'{value}' is neither native nor ordinary")),
            }
        }
        "grace" => wishes.grace = Some(seconds(value)?),
        "pid1" => {
            wishes.pid1 = match value {
                "preload" => Pid1::Preload,
                "share" => Pid1::Share,
                "leave" => Pid1::Leave,
                _ => return Err(format!("'{value}' is none of preload, share, leave")),
            }
        }
        "image" => wishes.image = text(),
        "image-pull-policy" => wishes.pull_policy = text(),
        "cpu-request" => wishes.resources[0] = text(),
        "memory-request" => wishes.resources[1] = text(),
        "cpu-limit" => wishes.resources[2] = text(),
        "memory-limit" => wishes.resources[3] = text(),
        flag if FLAGS.contains(&flag) => wishes.flags.push((name.to_owned(), value.to_owned())),
        _ => wishes.unknown.push(name.to_owned()),
    }
    Ok(())
}

fn port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|port| *port != 0).ok_or_else(|| format!("'{text}' is no port"))
}

/// A file of its own in the directory that the app and the sidecar share.
fn socket(text: &str) -> Result<String, String> {
    let name = text.strip_prefix(DIR).and_then(|rest| rest.strip_prefix('/')).unwrap_or_default();
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) && name.len() < 80;
    if name.is_empty()
        || name.starts_with('.')
        || !plain
        || ["control.sock", PRELOAD, PROGRAM].contains(&name)
    {
        return Err(format!("'{text}' is no file of its own in {DIR}: write {DIR}/app.sock"));
    }
    Ok(text.to_owned())
}

fn seconds(text: &str) -> Result<u64, String> {
    let time =
        humantime::parse_duration(text).map_err(|_| format!("'{text}' is no time: write 75s or 2m"))?;
    let whole = time == Duration::from_secs(time.as_secs()) && !time.is_zero();
    whole.then_some(time.as_secs()).ok_or_else(|| format!("'{text}' is not a whole number of seconds over 0"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read_json(value: Value) -> Result<Wishes, String> {
        read(value.as_object().unwrap())
    }

    #[test]
    fn annotations_say_what_is_wanted() {
        let wishes = read_json(json!({
            "other/x": "y", "lameduck.dev/grace": "1m15s", "lameduck.dev/pid1": "share", "lameduck.dev/sidecar": "ordinary",
            "lameduck.dev/app-port": "8081", "lameduck.dev/lame-duck": "9s", "lameduck.dev/garce": "1s",
        }));
        let wishes = wishes.unwrap();
        assert_eq!((wishes.grace, wishes.pid1, wishes.ordinary), (Some(75), Pid1::Share, true));
        assert_eq!((wishes.app_port, wishes.unknown), (Some(8081), vec!["garce".to_owned()]));
        assert_eq!(wishes.flags, [("lame-duck".to_owned(), "9s".to_owned())]);
    }

    #[test]
    fn a_wrong_value_is_told() {
        for (key, value) in [
            ("app-port", "0"),
            ("app-socket", "/tmp/app.sock"),
            ("app-socket", "/run/lameduck/../x"),
            ("grace", "1.5s"),
            ("pid1", "on"),
            ("sidecar", "x"),
            ("grace", "10"),
        ] {
            let key = format!("{PREFIX}{key}");
            let error = read_json(json!({ &key: value })).unwrap_err();
            assert!(error.starts_with(&format!("annotation {key}: '{value}'")), "{error}");
        }
        assert!(read_json(json!({"lameduck.dev/grace": 5})).unwrap_err().contains("no string"));
    }
}
