//! One request to a running proxy.

use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;

use super::reach;
use super::terminal::CommandError;
use super::view::ProxyState;
use crate::config::ControlAddr;

/// Time limit for responses, except those that are delayed on purpose.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Limit on a response in bytes: enough for 50,000 requests in the ledger.
const MAX_RESPONSE: usize = 64 << 20;
/// Reads the proxy's state.
pub async fn state(control: &ControlAddr) -> Result<ProxyState, CommandError> {
    parse(&get(control, "/status").await?)
}

/// Sends a GET and returns the response body; fails after a few seconds without one.
pub async fn get(control: &ControlAddr, target: &str) -> Result<Bytes, CommandError> {
    in_time(control, call(control, Method::GET, target)).await
}

/// Result of `call`; fails after a few seconds without one.
pub async fn in_time(
    control: &ControlAddr,
    call: impl Future<Output = Result<Bytes, CommandError>>,
) -> Result<Bytes, CommandError> {
    let late = |_| format!("lameduck on {control} did not respond within {} s", RESPONSE_TIMEOUT.as_secs());
    tokio::time::timeout(RESPONSE_TIMEOUT, call).await.map_err(late)?
}

/// Sends one request on its own connection; returns the response body, or an error for a status other than 2xx.
pub async fn call(control: &ControlAddr, method: Method, target: &str) -> Result<Bytes, CommandError> {
    let stream = reach::connect(control).await?;
    let broken = |why: hyper::Error| format!("lameduck on {control} closed the connection: {why}");
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let request = Request::builder().method(method).uri(target).header(header::HOST, "localhost");
    let request = request.header("Lameduck-Control", env!("CARGO_PKG_VERSION"));
    let request = request.body(Empty::<Bytes>::new()).map_err(|why| why.to_string())?;
    let exchange = async move {
        let answer = sender.send_request(request).await.map_err(broken)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_RESPONSE).collect().await;
        Ok::<_, CommandError>((status, body.map_err(|why| why.to_string())?.to_bytes()))
    };
    // Both futures run in this task: the connection ends once the exchange has dropped its sender.
    let (status, body) = tokio::join!(exchange, connection).0?;
    match status {
        StatusCode::OK | StatusCode::CREATED | StatusCode::ACCEPTED => Ok(body),
        refused => Err(format!("{refused}: {}", String::from_utf8_lossy(&body).trim_end())),
    }
}

/// Parses a JSON response.
pub fn parse<'a, T: Deserialize<'a>>(answer: &'a [u8]) -> Result<T, CommandError> {
    serde_json::from_slice(answer)
        .map_err(|why| format!("can't read the response (from another lameduck version?): {why}"))
}
