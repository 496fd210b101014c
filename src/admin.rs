//! The probe listener (kubelet, Prometheus, hooks) and the control listeners (operators): routes and handlers.
//!
//! Runs on its own thread, so that it responds while the data plane is saturated, and closes last.

mod app_port;
mod app_probe;
mod control_socket;
mod leases;
mod serve;
mod sockets;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::{HeaderMap, Request, StatusCode};
use serde::Serialize;
use serde_json::json;
use subtle::ConstantTimeEq;

pub use self::sockets::{Bound, bind};
use crate::answer::{Answer, answer, text, wrong_method};
use crate::config::UpstreamAddr;
use crate::control::handle::{Control, DrainOutcome, HoldAnswer, Status};
use crate::control::leases::Leases;
use crate::drain::ledger::LedgerRow;
use crate::drain::machine::Trigger;
use crate::proxy::captured::{BypassedPort, CapturedPorts};
use crate::readiness::Readiness;
use crate::repeated::ByReason;

/// What the listeners read and control. The functions are called on the admin thread only.
pub struct Admin {
    /// Control of the drain.
    pub control: Control,
    /// Current result of `/readyz`.
    pub ready: Box<dyn Fn() -> Readiness + Send + Sync>,
    /// Current requests in flight.
    pub ledger: Box<dyn Fn() -> Vec<LedgerRow> + Send + Sync>,
    /// Work of the app that is no request.
    pub leases: Arc<Leases>,
    /// The app's ports, with --capture.
    pub captured: Arc<CapturedPorts>,
    /// Metrics in Prometheus text format, version 0.0.4.
    pub metrics: Box<dyn Fn() -> String + Send + Sync>,
}

/// Listener on which a request arrived.
#[derive(Clone, Debug)]
enum AdminListener {
    /// Open to everyone; `/drain` requires the token.
    Probe { token: Option<String> },
    /// Access is limited by the socket file's mode.
    ControlSocket,
    /// Open to every process of this machine, but not to web pages in its browsers.
    ControlTcp,
}

type Ask = Request<Incoming>;

const TOKEN: HeaderName = HeaderName::from_static("lameduck-token");
/// Header field that clients of the control listener send.
const CONTROL: HeaderName = HeaderName::from_static("lameduck-control");
/// Limit on an operator's timeout, far below an overflow when times are added.
const MAX_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// The probe listener's routes, each with its methods.
const PROBE_ROUTES: [(&str, &str); 4] =
    [("/livez", "GET, HEAD"), ("/readyz", "GET, HEAD"), ("/metrics", "GET, HEAD"), ("/drain", "GET")];
/// The control listeners' routes.
const CONTROL_ROUTES: [(&str, &str); 11] = [
    ("/status", "GET, HEAD"),
    ("/ledger", "GET, HEAD"),
    ("/metrics", "GET, HEAD"),
    ("/app", "GET"),
    ("/drain", "POST"),
    ("/resume", "POST"),
    ("/hold", "POST"),
    ("/switch", "POST"),
    ("/leases", "POST"),
    ("/leases/renew", "POST"),
    ("/leases/return", "POST"),
];

/// Response to a request that no route takes: 405 for another method, 404 with the routes that there are.
fn no_route(routes: &[(&str, &'static str)], path: &str) -> Answer {
    if let Some((_, methods)) = routes.iter().find(|(route, _)| *route == path) {
        return wrong_method(methods);
    }
    let method = |methods: &'static str| methods.split(',').next().unwrap_or_default();
    let list: Vec<_> = routes.iter().map(|(route, methods)| format!("{} {route}", method(methods))).collect();
    text(StatusCode::NOT_FOUND, &format!("not found; the routes are {}", list.join(", ")))
}

impl Admin {
    async fn answer(&self, which: &AdminListener, ask: &Ask) -> Answer {
        match which {
            AdminListener::Probe { token } => self.probe(token.as_deref(), ask).await,
            AdminListener::ControlTcp if !from_this_machine(ask.headers()) => {
                text(StatusCode::FORBIDDEN, "the control port accepts only a loopback Host, and no web pages")
            }
            // Protects against requests forged through an app that can be made to POST to any address: it can't set
            // this header.
            AdminListener::ControlTcp if !ask.method().is_safe() && !ask.headers().contains_key(CONTROL) => {
                text(
                    StatusCode::FORBIDDEN,
                    "changes over TCP need the header Lameduck-Control, with any value",
                )
            }
            AdminListener::ControlSocket | AdminListener::ControlTcp => self.control(ask).await,
        }
    }

    async fn probe(&self, token: Option<&str>, ask: &Ask) -> Answer {
        match (ask.method().as_str(), path(ask)) {
            ("GET" | "HEAD", "/livez") => text(StatusCode::OK, "ok"),
            ("GET" | "HEAD", "/readyz") => self.readyz(),
            ("GET" | "HEAD", "/metrics") => self.metrics(),
            ("GET", "/drain") => self.hook(token, ask).await,
            (_, path) if path.starts_with(app_probe::PREFIX) => self.app_probe(ask).await,
            ("GET" | "HEAD", path) if path.starts_with(app_port::PREFIX) => self.app_port(path).await,
            (_, path) => no_route(&PROBE_ROUTES, path),
        }
    }

    async fn control(&self, ask: &Ask) -> Answer {
        match (ask.method().as_str(), path(ask)) {
            ("GET" | "HEAD", "/status") => self.status(),
            ("GET" | "HEAD", "/ledger") => json(StatusCode::OK, &(self.ledger)()),
            ("GET" | "HEAD", "/metrics") => self.metrics(),
            ("POST", "/drain") => self.operator(ask).await,
            ("POST", "/hold") => self.hold(ask).await,
            ("POST", "/switch") => self.switch(ask).await,
            ("GET", "/app") => json(StatusCode::OK, &json!({ "answers": self.control.app_answers().await })),
            ("POST", "/resume") => self.resume(ask).await,
            ("POST", "/leases") => self.lease(ask),
            ("POST", "/leases/renew") => self.renew_lease(ask),
            ("POST", "/leases/return") => self.return_lease(ask),
            (_, path) => no_route(&CONTROL_ROUTES, path),
        }
    }

    fn readyz(&self) -> Answer {
        match (self.ready)() {
            Readiness::Ready => text(StatusCode::OK, "ok"),
            Readiness::NotReady(reasons) => {
                let lines: Vec<String> = reasons.iter().map(ToString::to_string).collect();
                text(StatusCode::SERVICE_UNAVAILABLE, &lines.join("\n"))
            }
        }
    }

    fn metrics(&self) -> Answer {
        let body = (self.metrics)();
        answer(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", body.into())
    }

    fn status(&self) -> Answer {
        #[derive(Serialize)]
        struct Reply {
            #[serde(flatten)]
            status: Status,
            ready: bool,
            reasons: Vec<String>,
            /// Address of the probe listener.
            probe: Option<SocketAddr>,
            /// Captured ports.
            captured: Vec<u16>,
            /// Ports that the app opened and that are not captured.
            bypassed: Vec<BypassedPort>,
        }
        let (ready, reasons) = match (self.ready)() {
            Readiness::Ready => (true, vec![]),
            Readiness::NotReady(reasons) => (false, reasons.iter().map(ToString::to_string).collect()),
        };
        let probe = self.control.settings().probe_listen;
        let mut captured: Vec<_> = self.captured.all().iter().map(|port| port.number()).collect();
        captured.dedup();
        let (status, bypassed) = (self.control.status(), self.captured.bypassed());
        json(StatusCode::OK, &Reply { status, ready, reasons, probe, captured, bypassed })
    }

    /// The blocking preStop hook. The kubelet ignores the response's status, so a refusal is logged as a warning.
    async fn hook(&self, token: Option<&str>, ask: &Ask) -> Answer {
        let Some(token) = token else {
            warn_of_refusal("no token is configured (--token)");
            return text(StatusCode::FORBIDDEN, "no token is configured: start lameduck with --token");
        };
        let shown = ask.headers().get(TOKEN).map_or(&b""[..], HeaderValue::as_bytes);
        if !bool::from(shown.ct_eq(token.as_bytes())) {
            warn_of_refusal("its Lameduck-Token is missing or wrong");
            return text(StatusCode::FORBIDDEN, "the Lameduck-Token header is missing or wrong");
        }
        let trigger = match parameters(ask, ["hook"]) {
            Ok([None | Some("")]) => Trigger::Hook,
            Ok([Some("app")]) => Trigger::AppHook,
            Ok([Some("sidecar")]) => Trigger::SidecarHook,
            Ok([Some(_)]) => {
                return text(StatusCode::BAD_REQUEST, "hook must be app or sidecar, or be omitted");
            }
            Err(why) => return text(StatusCode::BAD_REQUEST, &why),
        };
        ended(self.control.drain(trigger).await)
    }

    async fn hold(&self, ask: &Ask) -> Answer {
        let [most, streams, wait] = match parameters(ask, ["max", "streams", "wait"]) {
            Ok(values) => values,
            Err(why) => return text(StatusCode::BAD_REQUEST, &why),
        };
        let Some(most) = time(most.unwrap_or("60s")) else {
            return text(StatusCode::BAD_REQUEST, "max must be a time over 0, such as 60s");
        };
        let (keep, wait) = match (streams.unwrap_or("end"), wait.unwrap_or("true")) {
            (streams @ ("keep" | "end"), wait @ ("true" | "false")) => (streams == "keep", wait == "true"),
            _ => {
                return text(
                    StatusCode::BAD_REQUEST,
                    "streams must be keep or end, wait must be true or false",
                );
            }
        };
        let outcome = match self.control.hold(most, keep, wait).await {
            HoldAnswer::Begun => "holding",
            HoldAnswer::Idle => "idle",
            HoldAnswer::Released => "released",
            HoldAnswer::Refused => return text(StatusCode::CONFLICT, "a drain or a restart is under way"),
        };
        json(StatusCode::OK, &json!({ "outcome": outcome }))
    }

    async fn switch(&self, ask: &Ask) -> Answer {
        let [to, timeout, wait] = match parameters(ask, ["to", "timeout", "wait"]) {
            Ok(values) => values,
            Err(why) => return text(StatusCode::BAD_REQUEST, &why),
        };
        let to = match to.map(str::parse::<UpstreamAddr>).transpose() {
            Ok(to) => to,
            Err(why) => return text(StatusCode::BAD_REQUEST, &why),
        };
        let Some(timeout) = time(timeout.unwrap_or("30s")) else {
            return text(StatusCode::BAD_REQUEST, "timeout must be a time over 0, such as 30s");
        };
        match self.control.switch(to, timeout, wait != Some("false")).await {
            Ok(()) => json(StatusCode::OK, &json!({ "outcome": "switched" })),
            Err(why) => text(StatusCode::CONFLICT, &why),
        }
    }

    async fn resume(&self, ask: &Ask) -> Answer {
        match parameters(ask, ["only"]) {
            Ok([None]) => self.control.resume().await,
            Ok([Some("hold")]) => self.control.release(),
            Ok(_) => return text(StatusCode::BAD_REQUEST, "only must be hold"),
            Err(why) => return text(StatusCode::BAD_REQUEST, &why),
        }
        json(StatusCode::OK, &json!({ "outcome": "resumed" }))
    }

    async fn operator(&self, ask: &Ask) -> Answer {
        let [timeout, wait, hook] = match parameters(ask, ["timeout", "wait", "hook"]) {
            Ok(values) => values,
            Err(why) => return text(StatusCode::BAD_REQUEST, &why),
        };
        match (hook, timeout, wait) {
            (None, ..) => {}
            // The app's container can't use the socket and has no token, but it is in this pod.
            (Some("app"), None, None) => return ended(self.control.drain(Trigger::AppHook).await),
            (Some(_), ..) => {
                return text(StatusCode::BAD_REQUEST, "hook must be app, without other parameters");
            }
        }
        let timeout = match timeout.map(time) {
            Some(None) => return text(StatusCode::BAD_REQUEST, "timeout must be a time over 0, such as 30s"),
            Some(some) => some,
            None => None,
        };
        let trigger = Trigger::Operator { timeout };
        match wait {
            None | Some("true") => ended(self.control.drain(trigger).await),
            Some("false") => {
                let control = self.control.clone();
                tokio::spawn(async move { control.drain(trigger).await });
                json(StatusCode::ACCEPTED, &json!({ "outcome": "begun" }))
            }
            Some(_) => text(StatusCode::BAD_REQUEST, "wait must be true or false"),
        }
    }
}

/// The log is rate-limited, since anyone can send such requests.
fn warn_of_refusal(why: &'static str) {
    static REFUSED: ByReason = ByReason::new();
    if let Some(times) = REFUSED.due(why) {
        tracing::warn!(times, "refused /drain: {why}");
    }
}

fn time(text: &str) -> Option<Duration> {
    humantime::parse_duration(text).ok().filter(|time| !time.is_zero() && *time <= MAX_TIMEOUT)
}

/// Rejects requests of web pages. A page whose owner rebinds its name to 127.0.0.1 can make a browser send requests
/// here; they carry that name in Host, and an Origin if they could change something.
fn from_this_machine(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let ip = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let loopback =
        name.eq_ignore_ascii_case("localhost") || ip.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    loopback && !headers.contains_key(header::ORIGIN)
}

/// The path with exactly one leading slash: kubelets send `//drain` for a hook path that already has a slash
/// (kubernetes/kubernetes).
fn path(ask: &Ask) -> &str {
    let path = ask.uri().path();
    let rest = path.trim_start_matches('/');
    if rest.len() == path.len() { path } else { &path[path.len() - rest.len() - 1..] }
}

/// Values of these query parameters. Any other parameter is an error, since a typo must not start another kind of
/// drain.
fn parameters<'a, const N: usize>(ask: &'a Ask, names: [&str; N]) -> Result<[Option<&'a str>; N], String> {
    let mut values = [None; N];
    for pair in ask.uri().query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let known = names.iter().position(|known| *known == name);
        let n = known.ok_or_else(|| format!("unknown parameter; the parameters are {}", names.join(", ")))?;
        values[n] = Some(value);
    }
    Ok(values)
}

fn ended(outcome: DrainOutcome) -> Answer {
    let body = match outcome {
        DrainOutcome::Drained { verdict } => json!({ "outcome": "drained", "verdict": verdict.to_string() }),
        DrainOutcome::AppMayStop => json!({ "outcome": "app-may-stop" }),
        DrainOutcome::Resumed => json!({ "outcome": "resumed" }),
    };
    json(StatusCode::OK, &body)
}

fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(mut body) => {
            body.push(b'\n');
            answer(status, "application/json", body.into())
        }
        Err(why) => text(StatusCode::INTERNAL_SERVER_ERROR, &why.to_string()),
    }
}
