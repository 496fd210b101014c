//! The verdict of `/readyz`, a pure function with reasons, and the requests to the app that it depends on.

pub mod stale_socket;

use std::fmt;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{self, HeaderValue};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;

use crate::config::{DrainReadiness, ReadyCheck, Sidecar, UpstreamAddr, WarmUp};
use crate::drain::machine::{Phase, Trigger};
use crate::upstream;

/// Time limit for one warm-up request. It is long because the first requests to an app are slow.
const WARM_UP_TIMEOUT: Duration = Duration::from_secs(30);

/// Input of the verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inputs {
    /// Phase of the drain.
    pub phase: Phase,
    /// Trigger of the running drain, if there is one.
    pub trigger: Option<Trigger>,
    /// Whether we run in a pod: SIGTERM then means that the pod is deleted.
    pub in_pod: bool,
    /// Sidecar mode, which decides what SIGTERM means.
    pub sidecar: Sidecar,
    /// Latest result of `check_app`.
    pub app_up: bool,
    /// Whether warm-up is finished, or was not requested.
    pub warmed_up: bool,
    /// `--drain-readiness`.
    pub drain_readiness: Option<DrainReadiness>,
    /// Whether only the app restarts, while requests are held.
    pub restarting: bool,
}

/// Result of `/readyz`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Status 200.
    Ready,
    /// Status 503, with all reasons.
    NotReady(Vec<Reason>),
}

/// Reason for not being ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The app's port is closed, or its check fails.
    AppDown,
    /// `--warm-up` has not finished.
    WarmingUp,
    /// The app's hook was called, but not the sidecar's: only the app restarts.
    AppRestarting,
    /// A drain of a kind that ends readiness at once.
    LameDuck(Option<Trigger>),
    /// New connections are refused.
    Leaving(Phase),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AppDown => f.write_str("the app does not answer"),
            Self::WarmingUp => f.write_str("warm-up is not done"),
            Self::AppRestarting => f.write_str("the app is restarting; requests are held"),
            Self::LameDuck(Some(Trigger::Operator { .. })) => f.write_str("an operator began a drain"),
            Self::LameDuck(Some(Trigger::Signal)) => f.write_str("a signal began a drain"),
            Self::LameDuck(_) => f.write_str("a drain began"),
            Self::Leaving(phase) => write!(f, "{}: new connections are refused", phase.name()),
        }
    }
}

/// The verdict. A pod that is being deleted stays ready until Draining: kube-proxy falls back to terminating but ready
/// pods if there are no others (Kubernetes: "ProxyTerminatingEndpoints", stable since 1.28).
pub fn verdict(inputs: &Inputs) -> Readiness {
    let mut reasons = Vec::new();
    match inputs.phase {
        Phase::Serving => {}
        Phase::LameDuck if !stays_ready(inputs) => reasons.push(Reason::LameDuck(inputs.trigger)),
        Phase::LameDuck => {}
        leaving => reasons.push(Reason::Leaving(leaving)),
    }
    if inputs.restarting {
        reasons.push(Reason::AppRestarting);
    }
    if !inputs.app_up {
        reasons.push(Reason::AppDown);
    }
    if !inputs.warmed_up {
        reasons.push(Reason::WarmingUp);
    }
    if reasons.is_empty() { Readiness::Ready } else { Readiness::NotReady(reasons) }
}

fn stays_ready(inputs: &Inputs) -> bool {
    match (inputs.drain_readiness, inputs.trigger) {
        (Some(choice), _) => choice == DrainReadiness::Keep,
        (None, Some(Trigger::Hook | Trigger::AppHook | Trigger::SidecarHook)) => true,
        (None, Some(Trigger::Signal)) => inputs.in_pod || inputs.sidecar != Sidecar::None,
        (None, Some(Trigger::Operator { .. }) | None) => false,
    }
}

/// Checks the app once; false if it doesn't answer within `timeout`. Every address of a host name is tried.
pub async fn check_app(addr: &UpstreamAddr, check: &ReadyCheck, timeout: Duration) -> bool {
    let asked = async {
        match check {
            ReadyCheck::Connect => upstream::connect(addr).await.is_ok(),
            ReadyCheck::Path(path) => {
                let status = match get("GET", path) {
                    Some(request) => ask(addr, request, |answer| async move { answer.status() }).await,
                    None => None,
                };
                status.is_some_and(|status| status.is_success() || status.is_redirection())
            }
        }
    };
    tokio::time::timeout(timeout, asked).await.unwrap_or(false)
}

/// Checks each address once, as [`check_app`], the first by `check` and the others by connecting. Returns those that don't
/// answer.
pub async fn silent(app: &[UpstreamAddr], check: &ReadyCheck, timeout: Duration) -> Vec<UpstreamAddr> {
    let mut silent = Vec::new();
    for (number, addr) in app.iter().enumerate() {
        let check = if number == 0 { check } else { &ReadyCheck::Connect };
        if !check_app(addr, check, timeout).await {
            silent.push(addr.clone());
        }
    }
    silent
}

/// Sends each request `count` times, one after the other, and reads the responses to their end. Returns how many
/// failed: no response within 30 s, or a 5xx. Failures don't keep us from being ready, since the app won't get any
/// warmer.
pub async fn warm_up(addr: &UpstreamAddr, requests: &[WarmUp], count: u32) -> u64 {
    let mut failed = 0;
    for _ in 0..count {
        for WarmUp { method, path } in requests {
            let Some(request) = get(method, path) else {
                failed += 1;
                continue;
            };
            let asked = ask(addr, request, |answer| async move {
                let fine = !answer.status().is_server_error();
                let mut body = answer.into_body();
                while let Some(Ok(_)) = body.frame().await {}
                fine
            });
            let answer = tokio::time::timeout(WARM_UP_TIMEOUT, asked).await;
            failed += u64::from(answer != Ok(Some(true)));
        }
    }
    failed
}

fn get(method: &str, path: &str) -> Option<Request<Empty<Bytes>>> {
    Request::builder().method(method).uri(path).body(Empty::new()).ok()
}

/// Sends one HTTP/1.1 request on its own connection, adding `Host` and `User-Agent` if missing. None if no response
/// head arrived.
pub async fn ask<F, T>(
    addr: &UpstreamAddr,
    mut request: Request<Empty<Bytes>>,
    read: impl FnOnce(Response<Incoming>) -> F,
) -> Option<T>
where
    F: Future<Output = T>,
{
    let headers = request.headers_mut();
    let agent = HeaderValue::from_static(concat!("lameduck-probe/", env!("CARGO_PKG_VERSION")));
    headers.entry(header::HOST).or_insert(addr.http_host().parse().ok()?);
    headers.entry(header::USER_AGENT).or_insert(agent);
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    let stream = upstream::connect(addr).await.ok()?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.ok()?;
    let exchange = async move {
        let answer = sender.send_request(request).await.ok()?;
        Some(read(answer).await)
    };
    // Both futures run in this task: the connection ends once the exchange has dropped its sender.
    tokio::join!(exchange, connection).0
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    const SERVING: Inputs = Inputs {
        phase: Phase::Serving,
        trigger: None,
        in_pod: false,
        sidecar: Sidecar::None,
        app_up: true,
        warmed_up: true,
        drain_readiness: None,
        restarting: false,
    };
    const OPERATOR: Trigger = Trigger::Operator { timeout: None };
    const HOOKS: [Trigger; 3] = [Trigger::Hook, Trigger::AppHook, Trigger::SidecarHook];

    fn lame_duck(trigger: Trigger) -> Inputs {
        Inputs { phase: Phase::LameDuck, trigger: Some(trigger), ..SERVING }
    }

    fn reasons(inputs: &Inputs) -> Vec<String> {
        match verdict(inputs) {
            Readiness::Ready => vec![],
            Readiness::NotReady(reasons) => reasons.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn serving_with_the_app_up_and_warm_is_ready() {
        assert_eq!(verdict(&SERVING), Readiness::Ready);
        assert_eq!(reasons(&Inputs { app_up: false, ..SERVING }), ["the app does not answer"]);
        assert_eq!(reasons(&Inputs { warmed_up: false, ..SERVING }), ["warm-up is not done"]);
        let restarting = Inputs { restarting: true, app_up: false, ..SERVING };
        assert_eq!(
            reasons(&restarting),
            ["the app is restarting; requests are held", "the app does not answer"]
        );
    }

    #[test]
    fn a_pod_that_is_deleted_stays_ready_until_draining() {
        let ordinary = Inputs { sidecar: Sidecar::Ordinary, ..lame_duck(Trigger::Signal) };
        let wrapped = Inputs { in_pod: true, ..lame_duck(Trigger::Signal) };
        for inputs in HOOKS.map(lame_duck).into_iter().chain([ordinary, wrapped]) {
            assert_eq!(verdict(&inputs), Readiness::Ready, "{inputs:?}");
            for phase in [Phase::Draining, Phase::Forcing, Phase::Drained] {
                let why = format!("{}: new connections are refused", phase.name());
                assert_eq!(reasons(&Inputs { phase, ..inputs }), [why]);
            }
            assert_eq!(reasons(&Inputs { app_up: false, ..inputs }).len(), 1);
        }
    }

    #[test]
    fn an_operator_and_a_signal_outside_kubernetes_make_it_unready_at_once() {
        assert_eq!(reasons(&lame_duck(OPERATOR)), ["an operator began a drain"]);
        assert_eq!(reasons(&lame_duck(Trigger::Signal)), ["a signal began a drain"]);
        assert_eq!(reasons(&Inputs { in_pod: true, ..lame_duck(OPERATOR) }).len(), 1);
    }

    #[test]
    fn drain_readiness_overrides_the_lame_duck_and_nothing_else() {
        for trigger in HOOKS.into_iter().chain([OPERATOR, Trigger::Signal]) {
            let choose = |choice| Inputs { drain_readiness: Some(choice), ..lame_duck(trigger) };
            assert_eq!(verdict(&choose(DrainReadiness::Keep)), Readiness::Ready);
            assert_eq!(reasons(&choose(DrainReadiness::Fail)).len(), 1);
            let draining = Inputs { phase: Phase::Draining, ..choose(DrainReadiness::Keep) };
            assert_eq!(reasons(&draining).len(), 1);
        }
    }

    /// An app that answers every request with `answer`, and counts the requests.
    async fn app(addr: &str, answer: &'static str) -> (u16, tokio::sync::mpsc::UnboundedReceiver<String>) {
        let listener = TcpListener::bind(addr).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (seen, requests) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let seen = seen.clone();
                tokio::spawn(async move {
                    let mut head = vec![0; 4096];
                    let n = stream.read(&mut head).await.unwrap_or(0);
                    let _ = seen.send(String::from_utf8_lossy(&head[..n]).into_owned());
                    let _ = stream.write_all(answer.as_bytes()).await;
                    // Stays open: the caller must not depend on the close.
                    while stream.read(&mut head).await.is_ok_and(|n| n > 0) {}
                });
            }
        });
        (port, requests)
    }

    async fn check(upstream: &str, check: &str) -> bool {
        check_app(&upstream.parse().unwrap(), &check.parse().unwrap(), Duration::from_secs(5)).await
    }

    #[tokio::test]
    async fn an_app_on_either_loopback_address_is_found_by_localhost() {
        for addr in ["127.0.0.1:0", "[::1]:0"] {
            let (port, _requests) = app(addr, "").await;
            assert!(check(&format!("localhost:{port}"), "connect").await, "{addr}");
        }
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        assert!(!check(&closed.to_string(), "connect").await);
        assert!(!check("unix:/nowhere/app.sock", "connect").await);
    }

    #[tokio::test]
    async fn a_path_check_wants_2xx_or_3xx() {
        for (answer, ready) in [
            ("HTTP/1.1 204 No Content\r\n\r\n", true),
            ("HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n", true),
            ("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", false),
            ("HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", false),
            ("SSH-2.0-OpenSSH\r\n", false),
            // An endless body must not delay the verdict.
            ("HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n", true),
        ] {
            let (port, mut requests) = app("127.0.0.1:0", answer).await;
            assert_eq!(check(&format!("127.0.0.1:{port}"), "/healthz").await, ready, "{answer}");
            let head = requests.recv().await.unwrap();
            assert!(head.starts_with("GET /healthz HTTP/1.1\r\nhost: 127.0.0.1"), "{head}");
        }
    }

    #[tokio::test]
    async fn a_silent_app_is_down_after_the_timeout() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = listener.local_addr().unwrap().to_string().parse().unwrap();
        let path = ReadyCheck::Path("/".into());
        assert!(!check_app(&upstream, &path, Duration::from_millis(50)).await);
    }

    #[tokio::test]
    async fn warm_up_sends_each_request_count_times_and_tells_failures() {
        let (port, mut requests) = app("127.0.0.1:0", "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        let upstream = format!("127.0.0.1:{port}").parse().unwrap();
        let wanted = ["GET /".parse().unwrap(), "HEAD /x".parse().unwrap()];
        assert_eq!(warm_up(&upstream, &wanted, 2).await, 0);
        for line in ["GET / ", "HEAD /x ", "GET / ", "HEAD /x "] {
            assert!(requests.recv().await.unwrap().starts_with(line));
        }
        assert!(requests.try_recv().is_err());
        let (port, _requests) = app("127.0.0.1:0", "HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n").await;
        assert_eq!(warm_up(&format!("127.0.0.1:{port}").parse().unwrap(), &wanted, 3).await, 6);
    }
}
