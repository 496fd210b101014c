//! Minimal client for the API server: JSON over one HTTP/1.1 connection, authenticated as the pod's service account.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::x509::roots;
use crate::cli::Cluster;
use crate::tls::client::client_config;

/// Time limit for a connect, and for each request up to the response's last byte.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Limit on a response body in bytes.
const MAX_RESPONSE: usize = 4 << 20;

/// Address of the API server and our credentials.
#[derive(Clone, Debug)]
pub struct Api {
    host: String,
    port: u16,
    account: PathBuf,
}

/// A connection to the API server.
pub struct ApiSession {
    send: SendRequest<Full<Bytes>>,
    /// This end's address: the pod's.
    pub local: IpAddr,
    host: String,
    token: String,
}

/// A response.
#[derive(Debug)]
pub struct ApiReply {
    /// Status code.
    pub status: StatusCode,
    /// The object, or a Status that describes the error.
    pub body: Value,
}

impl ApiReply {
    /// Returns the object.
    ///
    /// # Errors
    /// The API server's description of the error.
    pub fn object(self) -> Result<Value, String> {
        if self.status.is_success() {
            return Ok(self.body);
        }
        Err(format!("{}: {}", self.status, self.body["message"].as_str().unwrap_or("no reason given")))
    }
}

/// Opens a connection for HTTP/1.1 over TLS to a server whose certificate is for `name`. Returns it with this end's
/// address.
///
/// # Errors
/// Says which step failed.
pub async fn dial(
    host: &str,
    port: u16,
    name: &str,
    trusted: impl Iterator<Item = CertificateDer<'static>>,
) -> Result<(SendRequest<Full<Bytes>>, IpAddr), String> {
    let config = client_config(trusted).map_err(|why| format!("ca.crt: {why}"))?;
    let name = ServerName::try_from(name.to_owned()).map_err(|why| why.to_string())?;
    let stream = TcpStream::connect((host, port)).await.map_err(|why| why.to_string())?;
    let local = stream.local_addr().map_err(|why| why.to_string())?.ip();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
    let stream = TokioIo::new(stream.map_err(|why| why.to_string())?);
    let (send, connection) = http1::handshake(stream).await.map_err(|why| why.to_string())?;
    // The task ends when `send` is dropped.
    tokio::spawn(connection);
    Ok((send, local))
}

impl Api {
    /// The API server of the pod's own cluster.
    pub fn new(cluster: &Cluster) -> Self {
        Self { host: cluster.host.clone(), port: cluster.port, account: cluster.account.clone() }
    }

    /// Connects. The account's token is read each time, since the kubelet renews it.
    ///
    /// # Errors
    /// Says which step failed.
    pub async fn session(&self) -> Result<ApiSession, String> {
        let connected = tokio::time::timeout(REQUEST_TIMEOUT, self.connect()).await;
        connected.map_err(|_| "no connection in time".to_owned()).flatten().map_err(|why| {
            let Self { host, port, .. } = self;
            format!("the API server at {host}:{port}: {why}")
        })
    }

    async fn connect(&self) -> Result<ApiSession, String> {
        let file = |name: &str| {
            let path = self.account.join(name);
            fs::read_to_string(&path).map_err(|why| format!("{}: {why}", path.display()))
        };
        let trusted = roots(file("ca.crt")?.as_bytes()).into_iter().map(|root| root.der);
        let (send, local) = dial(&self.host, self.port, &self.host, trusted).await?;
        let token = file("token")?.trim().to_owned();
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        Ok(ApiSession { send, local, host: format!("{host}:{}", self.port), token })
    }
}

impl ApiSession {
    /// Reads an object.
    ///
    /// # Errors
    /// There was no response.
    pub async fn get(&mut self, path: &str) -> Result<ApiReply, String> {
        self.call(Method::GET, path, "application/json", Bytes::new()).await
    }

    /// Sends an object or a patch; `kind` is its content type.
    ///
    /// # Errors
    /// There was no response.
    pub async fn send(
        &mut self,
        method: Method,
        path: &str,
        kind: &str,
        body: &Value,
    ) -> Result<ApiReply, String> {
        self.call(method, path, kind, body.to_string().into()).await
    }

    async fn call(
        &mut self,
        method: Method,
        path: &str,
        kind: &str,
        body: Bytes,
    ) -> Result<ApiReply, String> {
        let what = format!("{method} {path}");
        let answer = tokio::time::timeout(REQUEST_TIMEOUT, self.ask(method, path, kind, body)).await;
        answer.map_err(|_| "no answer in time".to_owned()).flatten().map_err(|why| format!("{what}: {why}"))
    }

    async fn ask(&mut self, method: Method, path: &str, kind: &str, body: Bytes) -> Result<ApiReply, String> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.host)
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, kind)
            .header(header::USER_AGENT, concat!("lameduck-webhook/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(body))
            .map_err(|why| why.to_string())?;
        self.send.ready().await.map_err(|why| why.to_string())?;
        let answer = self.send.send_request(request).await.map_err(|why| why.to_string())?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_RESPONSE).collect().await;
        let body = body.map_err(|why| why.to_string())?.to_bytes();
        Ok(ApiReply { status, body: serde_json::from_slice(&body).unwrap_or(Value::Null) })
    }
}
