//! TLS to the app: whom it has to be, and the handshake with it.

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

/// A handshake may take so long: the app is near, and one that begins it goes on with it.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same trouble is logged again after so long.
const AGAIN: Duration = Duration::from_secs(10);
/// Where systems keep the authorities that they trust, each as one file: Debian and Alpine, Red Hat, SUSE, others.
const SYSTEM: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Whom the app has to be. One for the process: data threads, readiness checks and hooks ask for the same app.
static TRUST: OnceLock<Result<Trust, String>> = OnceLock::new();

#[derive(Debug)]
struct Trust {
    config: Arc<ClientConfig>,
    /// The same for HTTP/2 inside.
    http2: Arc<ClientConfig>,
}

/// Sets for good whose certificates the app may have, the system's authorities if `ca` is none.
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
            None => SYSTEM.iter().map(Path::new).find(|path| path.exists()).ok_or_else(|| {
                format!("no list of trusted authorities ({}): give one by --upstream-ca", SYSTEM.join(", "))
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

/// A client's configuration that trusts these authorities.
///
/// # Errors
/// When there is none that can be used.
pub fn client_config(
    roots: impl IntoIterator<Item = CertificateDer<'static>>,
) -> Result<ClientConfig, String> {
    let mut store = RootCertStore::empty();
    // A system's list may have one that isn't understood; the others are as good as before.
    store.add_parsable_certificates(roots);
    if store.is_empty() {
        return Err("no certificate of an authority in it".to_owned());
    }
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|why| why.to_string())?;
    let mut config = builder.with_root_certificates(store).with_no_client_auth();
    config.alpn_protocols = vec![HTTP1.to_vec()];
    Ok(config)
}

/// Shakes hands with the app, which has to be `name`, to speak this protocol (its name of ALPN) inside.
///
/// # Errors
/// `ConnectionRefused` for an app that went away meanwhile: it may be tried again, nothing was sent. `Other` for one
/// that isn't trusted, is silent or speaks no TLS, which is logged.
pub async fn handshake(tcp: TcpStream, name: &str, protocol: &[u8]) -> io::Result<Tls> {
    let trust = TRUST.get_or_init(|| Trust::new(None)).as_ref().map_err(|why| refused(name, why))?;
    let asked = ServerName::try_from(name.to_owned()).map_err(|why| refused(name, &why))?;
    let config = if protocol == HTTP2 { &trust.http2 } else { &trust.config };
    let session =
        UnbufferedClientConnection::new(config.clone(), asked).map_err(|why| refused(name, &why))?;
    let mut tls = Tls::new(tcp, Side::Client(session));
    let shaken = tokio::time::timeout(PATIENCE, std::future::poll_fn(|cx| tls.poll_handshake(cx))).await;
    match shaken {
        Ok(Ok(())) => Ok(tls),
        Ok(Err(why)) if why.kind() == io::ErrorKind::InvalidData => Err(refused(name, &why)),
        Ok(Err(why)) => Err(io::Error::new(io::ErrorKind::ConnectionRefused, why)),
        Err(_) => Err(refused(name, &"it is silent")),
    }
}

/// Says what is wrong, but not at each of many requests.
fn refused(name: &str, why: &dyn std::fmt::Display) -> io::Error {
    static LAST: Mutex<Option<(Instant, String)>> = Mutex::new(None);
    let why = why.to_string();
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if !last.as_ref().is_some_and(|(at, said)| *said == why && at.elapsed() < AGAIN) {
        tracing::warn!(name, "no TLS with the app: {why}");
        *last = Some((Instant::now(), why.clone()));
    }
    io::Error::other(why)
}
