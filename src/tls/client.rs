//! TLS to the app: which certificate it must have, and the handshake.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;

use super::certificate::roots;
use super::stream::{Side, Tls};
use super::{HTTP1, HTTP2, provider};

/// Time limit for a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// The same failure is logged again only after this time.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Files with the system's trusted authorities: Debian and Alpine, Red Hat, SUSE, others.
const SYSTEM_CA_FILES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The trusted authorities. One per process: data threads, readiness checks and hooks connect to the same app.
static TRUST: OnceLock<Result<Trust, String>> = OnceLock::new();

#[derive(Debug)]
struct Trust {
    config: Arc<ClientConfig>,
    /// The same configuration for HTTP/2.
    http2: Arc<ClientConfig>,
}

/// Sets, once, the authorities that may issue the app's certificate: the system's if `ca` is `None`.
///
/// # Errors
/// What is wrong with the file.
pub fn trust(ca: Option<&Path>) -> Result<(), String> {
    TRUST.get_or_init(|| Trust::new(ca)).as_ref().map(drop).map_err(Clone::clone)
}

impl Trust {
    fn new(ca: Option<&Path>) -> Result<Self, String> {
        let path = match ca {
            Some(path) => path,
            None => SYSTEM_CA_FILES.iter().map(Path::new).find(|path| path.exists()).ok_or_else(|| {
                format!(
                    "found no file of trusted CAs ({}): name one with --upstream-ca",
                    SYSTEM_CA_FILES.join(", ")
                )
            })?,
        };
        let wrong = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
        let pem = fs::read(path).map_err(|why| wrong(&why))?;
        let found = roots(&pem).into_iter().map(|root| root.der);
        let config = client_config(found).map_err(|why| wrong(&why))?;
        let mut http2 = config.clone();
        http2.alpn_protocols = vec![HTTP2.to_vec()];
        Ok(Self { config: Arc::new(config), http2: Arc::new(http2) })
    }
}

/// Returns a client configuration that trusts these authorities.
///
/// # Errors
/// If none of them is usable.
pub fn client_config(
    roots: impl IntoIterator<Item = CertificateDer<'static>>,
) -> Result<ClientConfig, String> {
    let mut store = RootCertStore::empty();
    // Skips certificates of a system's list that can't be parsed.
    store.add_parsable_certificates(roots);
    if store.is_empty() {
        return Err("contains no CA certificate".to_owned());
    }
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|why| why.to_string())?;
    let mut config = builder.with_root_certificates(store).with_no_client_auth();
    config.alpn_protocols = vec![HTTP1.to_vec()];
    Ok(config)
}

/// Does the handshake with the app, whose certificate must be for `name`, and offers `protocol` by ALPN.
///
/// # Errors
/// `ConnectionRefused` if the app disconnected: nothing was sent, so a retry is safe. `Other`, which is logged, if it
/// isn't trusted, doesn't answer or doesn't speak TLS.
pub async fn handshake(tcp: TcpStream, name: &str, protocol: &[u8]) -> io::Result<Tls> {
    let trust = TRUST.get_or_init(|| Trust::new(None)).as_ref().map_err(|why| refused(name, why))?;
    let asked = ServerName::try_from(name.to_owned()).map_err(|why| refused(name, &why))?;
    let config = if protocol == HTTP2 { &trust.http2 } else { &trust.config };
    let session =
        UnbufferedClientConnection::new(config.clone(), asked).map_err(|why| refused(name, &why))?;
    let mut tls = Tls::new(tcp, Side::Client(session));
    let shaken =
        tokio::time::timeout(HANDSHAKE_TIMEOUT, std::future::poll_fn(|cx| tls.poll_handshake(cx))).await;
    match shaken {
        Ok(Ok(())) => Ok(tls),
        Ok(Err(why)) if why.kind() == io::ErrorKind::InvalidData => Err(refused(name, &why)),
        Ok(Err(why)) => Err(io::Error::new(io::ErrorKind::ConnectionRefused, why)),
        Err(_) => Err(refused(name, &"it does not answer")),
    }
}

/// Logs the failure, but not for each of many requests.
fn refused(name: &str, why: &dyn std::fmt::Display) -> io::Error {
    static LAST: Mutex<Option<(Instant, String)>> = Mutex::new(None);
    let why = why.to_string();
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if !last.as_ref().is_some_and(|(at, said)| *said == why && at.elapsed() < LOG_INTERVAL) {
        tracing::warn!(name, "no TLS connection to the app: {why}");
        *last = Some((Instant::now(), why.clone()));
    }
    io::Error::other(why)
}
