//! Accepts connections and serves the routes. One request per connection: limits stay simple, a new certificate takes
//! effect with the next connection, and no client pool holds an idle connection when the process ends.

use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use hyper::header;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;

use super::handover::HANDED_OVER;
use super::review::{ReviewOutcome, Reviewed, allowed_anyway, review};
use super::state::{Webhook, random_token};
use crate::answer::{Answer, answer, text, wrong_method};
use crate::proxy::accept::syn_drain::handshakes_end;

/// Limit on open connections per listener; further clients wait in the accept queue.
const MAX_CONNECTIONS: u32 = 256;
/// Time limit for a connection from accept to close, with handshake, review and response: the maximum of an API server.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for a request head, after the handshake.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Limit on a request head in bytes.
const MAX_HEAD: usize = 16 << 10;
/// Limit on an AdmissionReview in bytes. An API server accepts objects of up to 3 MiB.
pub const MAX_BODY: usize = 4 << 20;
/// Bodies up to this size, in bytes, are read without a permit: all connections together stay below `MAX_BODIES`.
const SMALL_BODY: usize = 64 << 10;
/// Pause after a failed accept (no free file descriptor).
const BACK_OFF: Duration = Duration::from_millis(50);

/// Which listener a connection came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WebhookListener {
    /// The API server, over TLS.
    Review,
    /// The kubelet and Prometheus.
    Probe,
}

/// Serves until `stop`, then finishes the connections in the accept queue and those in progress.
pub async fn serve(
    listener: TcpListener,
    asked: WebhookListener,
    webhook: Arc<Webhook>,
    stop: impl Future<Output = ()>,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS as usize));
    let accept_one = async || {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve_one(stream, asked, Arc::clone(&webhook), place));
            }
            Err(_) => tokio::time::sleep(BACK_OFF).await,
        }
    };
    let accept_all = async {
        loop {
            accept_one().await;
        }
    };
    tokio::select! {
        () = accept_all => {}
        () = stop => {}
    }
    handshakes_end(&listener).await;
    while tokio::time::timeout(Duration::ZERO, accept_one()).await.is_ok() {}
    drop(listener);
    // All permits are free when all connections have ended.
    let _ = tokio::time::timeout(REVIEW_TIMEOUT, places.acquire_many(MAX_CONNECTIONS)).await;
}

async fn serve_one(
    stream: TcpStream,
    asked: WebhookListener,
    webhook: Arc<Webhook>,
    _place: OwnedSemaphorePermit,
) {
    let serve = async {
        match asked {
            WebhookListener::Probe => http(stream, asked, &webhook).await,
            WebhookListener::Review => match TlsAcceptor::from(Arc::clone(&webhook.tls)).accept(stream).await
            {
                Ok(stream) => http(stream, asked, &webhook).await,
                Err(why) => tracing::debug!("a TLS handshake failed: {why}"),
            },
        }
    };
    if tokio::time::timeout(REVIEW_TIMEOUT, serve).await.is_err() {
        tracing::debug!(?asked, "a connection took too long");
    }
}

async fn http(stream: impl AsyncRead + AsyncWrite + Unpin, asked: WebhookListener, webhook: &Webhook) {
    let service = service_fn(async |ask: Request<Incoming>| {
        let answer = match asked {
            WebhookListener::Review => mutate(ask, webhook).await,
            WebhookListener::Probe => probe(&ask, webhook),
        };
        Ok::<_, Infallible>(answer)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .keep_alive(false)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(why) = connection.await {
        tracing::debug!(?asked, "a connection failed: {why}");
    }
}

async fn mutate(ask: Request<Incoming>, webhook: &Webhook) -> Answer {
    match (ask.method(), ask.uri().path()) {
        (&Method::POST, "/mutate" | HANDED_OVER) => {}
        (_, "/mutate" | HANDED_OVER) => return wrong_method("POST"),
        _ => return text(StatusCode::NOT_FOUND, "not found; the route is /mutate"),
    }
    let handed_over = ask.uri().path() == HANDED_OVER;
    let length =
        ask.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let length = length.unwrap_or(MAX_BODY).min(MAX_BODY);
    // Small reviews don't wait behind clients that announce a large body and send nothing. The semaphore is never
    // closed.
    let _room =
        if length > SMALL_BODY { webhook.body_room.acquire_many(length as u32).await.ok() } else { None };
    let body = match read(ask.into_body()).await {
        Ok(Some(body)) => body,
        Ok(None) => {
            return text(
                StatusCode::PAYLOAD_TOO_LARGE,
                &format!("an AdmissionReview may have at most {MAX_BODY} bytes"),
            );
        }
        Err(why) => return text(StatusCode::BAD_REQUEST, &why.to_string()),
    };
    if let Some(newer) = webhook.newer().filter(|_| !handed_over)
        && let Some(response) = newer.review(&body).await
    {
        return answer(StatusCode::OK, "application/json", response);
    }
    let began = Instant::now();
    match reviewed(&body, webhook) {
        Ok(reviewed) => {
            webhook.metrics.review(&reviewed.outcome, began.elapsed());
            log(&reviewed);
            if let Some(events) = &webhook.events {
                events.tell(&reviewed);
            }
            answer(StatusCode::OK, "application/json", reviewed.answer.to_string().into())
        }
        Err(why) => {
            webhook.metrics.review(&ReviewOutcome::Failed(String::new()), began.elapsed());
            tracing::warn!("refused a request to /mutate: {why}");
            text(StatusCode::BAD_REQUEST, &why)
        }
    }
}

/// Reads the body; none if it is too long. Such a body is still read to its end, within a limit, so that the client can
/// read the response.
async fn read(mut body: Incoming) -> Result<Option<Bytes>, hyper::Error> {
    let (mut bytes, mut length) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        length += data.len();
        if length > 4 * MAX_BODY {
            break;
        }
        if length <= MAX_BODY {
            bytes.extend_from_slice(&data);
        } else {
            bytes = Vec::new();
        }
    }
    Ok((length <= MAX_BODY).then(|| bytes.into()))
}

/// A bug of ours must not block a pod: after a panic the pod is allowed unchanged.
fn reviewed(body: &[u8], webhook: &Webhook) -> Result<Reviewed, String> {
    let review = || review(body, &webhook.settings, random_token);
    catch_unwind(AssertUnwindSafe(review)).unwrap_or_else(|_| allowed_anyway(body))
}

fn log(reviewed: &Reviewed) {
    let Reviewed { outcome, namespace, name, dry_run, warnings, .. } = reviewed;
    let result = outcome.name();
    match outcome {
        ReviewOutcome::Failed(reason) => {
            tracing::error!(namespace, pod = name, outcome = result, reason, "review");
        }
        ReviewOutcome::Skipped(reason) => {
            tracing::info!(namespace, pod = name, outcome = result, reason, dry_run, "review");
        }
        // The API server shows each injected pod again, with the service account's mount in its sidecar.
        ReviewOutcome::Unchanged if warnings.is_empty() => {
            tracing::debug!(namespace, pod = name, outcome = result, dry_run, "review");
        }
        ReviewOutcome::Injected | ReviewOutcome::Unchanged => {
            let warnings = (!warnings.is_empty()).then(|| warnings.join("; "));
            tracing::info!(namespace, pod = name, outcome = result, warnings, dry_run, "review");
        }
    }
}

fn probe(ask: &Request<Incoming>, webhook: &Webhook) -> Answer {
    match (ask.method(), ask.uri().path()) {
        (&Method::GET | &Method::HEAD, "/livez") => text(StatusCode::OK, "ok"),
        (&Method::GET | &Method::HEAD, "/readyz") => match webhook.ready() {
            Ok(()) => text(StatusCode::OK, "ready"),
            Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, &why),
        },
        (&Method::GET | &Method::HEAD, "/metrics") => {
            answer(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", webhook.render().into())
        }
        (_, "/livez" | "/readyz" | "/metrics") => wrong_method("GET, HEAD"),
        _ => text(StatusCode::NOT_FOUND, "not found; the routes are /livez, /readyz and /metrics"),
    }
}
