//! TLS for clients: which certificate serves a name, which clients are admitted, and the files that define both,
//! which are reread regularly.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::crypto::ring::Ticketer;
use rustls::server::{
    ClientHello, NoServerSessionStorage, ResolvesServerCert, UnbufferedServerConnection, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::certificate::{Served, roots};
use super::stream::{Side, Tls};
use super::{PROTOCOLS, provider};
use crate::config::{ClientAuth, TlsSettings};

/// Time between two checks of the files.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Maximum number of concurrent handshakes. Further clients wait, in the accept queue if they have not been accepted.
const MAX_HANDSHAKES: usize = 1000;

/// TLS termination for clients.
#[derive(Debug)]
pub struct Termination {
    settings: TlsSettings,
    /// Used by the watcher only.
    state: Mutex<Certificates>,
    /// For the next handshake. Locked only to read or replace it, because data threads wait for it.
    config: Mutex<Arc<ServerConfig>>,
    names: Arc<Names>,
    handshakes: Semaphore,
}

#[derive(Debug)]
struct Certificates {
    /// By folder.
    pairs: BTreeMap<PathBuf, Pair>,
    /// The contents of the file of `--tls-client-ca`.
    client_ca: Vec<u8>,
}

/// What was read from a folder.
#[derive(Debug)]
struct Pair {
    files: Files,
    served: Served,
    /// The folder, or both its files, were missing at the last check.
    gone: bool,
}

/// The contents of `tls.crt` and `tls.key`.
type Files = (Vec<u8>, Vec<u8>);

/// Which certificate is for which name.
#[derive(Debug, Default)]
struct Names(Mutex<Arc<Table>>);

#[derive(Debug, Default)]
struct Table {
    by_name: HashMap<String, Arc<CertifiedKey>>,
    /// For all other names, and for clients that send none.
    default: Option<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for Names {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let table = lock(&self.0).clone();
        let by_name = hello.server_name().and_then(|name| table.find(&name.to_ascii_lowercase()));
        by_name.or(table.default.as_ref()).cloned()
    }
}

impl Table {
    /// Finds the certificate for exactly this name, else one whose `*` stands for its first label (RFC 9525 §6.3).
    fn find(&self, name: &str) -> Option<&Arc<CertifiedKey>> {
        let wildcard = || self.by_name.get(&format!("*.{}", name.split_once('.')?.1));
        self.by_name.get(name).or_else(wildcard)
    }
}

impl Termination {
    /// Reads all files for the first time.
    ///
    /// # Errors
    /// What is wrong with a file, with its name.
    pub fn new(settings: TlsSettings) -> Result<Self, String> {
        let mut pairs = BTreeMap::new();
        for dir in folders(&settings.dir)? {
            let files = read_pair(&dir)?;
            let served = read(&dir, &files)?;
            tell(&dir, &served);
            pairs.insert(dir, Pair { files, served, gone: false });
        }
        let names = Arc::new(Names::default());
        let client_ca = read_client_ca(&settings)?;
        let config = Arc::new(configuration(&settings, &client_ca, names.clone())?);
        *lock(&names.0) = Arc::new(table(&settings.dir, &pairs));
        let state = Mutex::new(Certificates { pairs, client_ca });
        let config = Mutex::new(config);
        Ok(Self { settings, state, config, names, handshakes: Semaphore::new(MAX_HANDSHAKES) })
    }

    /// A client's connection before its handshake.
    ///
    /// # Errors
    /// If the session can't be created.
    pub fn accept(&self, tcp: TcpStream) -> io::Result<Tls> {
        let config = lock(&self.config).clone();
        let session = UnbufferedServerConnection::new(config).map_err(io::Error::other)?;
        Ok(Tls::new(tcp, Side::Server(session)))
    }

    /// Waits for the right to do one handshake, in order of arrival.
    ///
    /// # Errors
    /// Never: the semaphore is not closed.
    pub async fn place(&self) -> io::Result<SemaphorePermit<'_>> {
        self.handshakes.acquire().await.map_err(io::Error::other)
    }

    /// Returns the time limit for a handshake.
    pub fn timeout(&self) -> Duration {
        self.settings.handshake_timeout
    }

    /// Whether a new client would have to wait.
    pub fn is_busy(&self) -> bool {
        self.handshakes.available_permits() == 0
    }

    /// Checks the files as long as the process lives. A problem is logged, once, if two checks in a row find it: the
    /// files of a pair may be replaced one by one.
    pub async fn watch(self: Arc<Self>) {
        let (mut last, mut said) = (Vec::new(), Vec::new());
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            let looking = self.clone();
            // File access may hang.
            let Ok(wrong) = tokio::task::spawn_blocking(move || looking.reload()).await else { continue };
            for why in wrong.iter().filter(|why| last.contains(*why) && !said.contains(*why)) {
                tracing::warn!("keeping the current certificates: {why}");
            }
            said = wrong.iter().filter(|why| last.contains(*why)).cloned().collect();
            last = wrong;
        }
    }

    /// Applies what is new and valid. Returns the problems; the affected files keep their old version.
    fn reload(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut state = lock(&self.state);
        if let Err(why) = self.reload_pairs(&mut state, &mut wrong) {
            wrong.push(why);
        }
        let client_ca = read_client_ca(&self.settings).and_then(|client_ca| {
            if client_ca != state.client_ca {
                let config = Arc::new(configuration(&self.settings, &client_ca, self.names.clone())?);
                *lock(&self.config) = config;
                state.client_ca = client_ca;
                tracing::info!("loaded new CAs for client certificates");
            }
            Ok(())
        });
        wrong.extend(client_ca.err());
        wrong
    }

    fn reload_pairs(&self, state: &mut Certificates, wrong: &mut Vec<String>) -> Result<(), String> {
        let dirs = folders(&self.settings.dir)?;
        let before = state.pairs.len();
        // New files may be on their way: a pair is forgotten when two checks in a row miss it.
        state.pairs.retain(|dir, pair| {
            let was_gone = std::mem::replace(&mut pair.gone, !dirs.contains(dir));
            !(was_gone && pair.gone)
        });
        let mut changed = state.pairs.len() != before;
        for dir in dirs {
            let new = read_pair(&dir).and_then(|files| {
                if state.pairs.get(&dir).is_some_and(|pair| pair.files == files) {
                    return Ok(None);
                }
                let served = read(&dir, &files)?;
                Ok(Some(Pair { files, served, gone: false }))
            });
            match new {
                Ok(None) => {}
                Ok(Some(pair)) => {
                    tell(&dir, &pair.served);
                    state.pairs.insert(dir, pair);
                    changed = true;
                }
                Err(why) => wrong.push(why),
            }
        }
        if changed {
            *lock(&self.names.0) = Arc::new(table(&self.settings.dir, &state.pairs));
        }
        Ok(())
    }
}

/// Returns the folder itself and its subfolders if they have at least one file of a pair. Names that begin with a dot
/// are used by Kubernetes to swap a Secret's files.
fn folders(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let wrong = |why: io::Error| format!("{}: {why}", dir.display());
    let mut dirs = vec![dir.to_owned()];
    for entry in fs::read_dir(dir).map_err(wrong)? {
        let entry = entry.map_err(wrong)?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") && entry.path().is_dir() {
            dirs.push(entry.path());
        }
    }
    dirs.retain(|dir| ["tls.crt", "tls.key"].iter().any(|name| dir.join(name).exists()));
    if dirs.is_empty() {
        return Err(format!("{}: there is no tls.crt, and no subfolder has one", dir.display()));
    }
    dirs.sort();
    Ok(dirs)
}

fn read_pair(dir: &Path) -> Result<Files, String> {
    let file = |name: &str| {
        let path = dir.join(name);
        fs::read(&path).map_err(|why| format!("{}: {why}", path.display()))
    };
    Ok((file("tls.crt")?, file("tls.key")?))
}

fn read(dir: &Path, files: &Files) -> Result<Served, String> {
    Served::read(&files.0, &files.1).map_err(|why| format!("{}: {why}", dir.display()))
}

fn tell(dir: &Path, served: &Served) {
    let end = UNIX_EPOCH + Duration::from_secs(served.valid.end);
    let expires = humantime::format_rfc3339_seconds(end);
    let names = served.names().join(" ");
    let dir = dir.display();
    match SystemTime::now() > end {
        true => tracing::warn!(%dir, names, %expires, "serving a certificate that has expired"),
        false => tracing::info!(%dir, names, %expires, "serving a new certificate"),
    }
}

/// If several certificates have the same name, a subfolder's wins, and among those the first one's.
fn table(dir: &Path, pairs: &BTreeMap<PathBuf, Pair>) -> Table {
    let mut table = Table::default();
    let default = pairs.get(dir);
    let others = pairs.iter().filter(|(path, _)| *path != dir).map(|(_, pair)| pair);
    for pair in others.chain(default) {
        for name in pair.served.names() {
            table.by_name.entry(name).or_insert_with(|| pair.served.key.clone());
        }
    }
    table.default = default.map(|pair| pair.served.key.clone());
    table
}

/// Reads the authorities for clients; empty without `--tls-client-ca`.
fn read_client_ca(settings: &TlsSettings) -> Result<Vec<u8>, String> {
    let Some(path) = &settings.client_ca else { return Ok(Vec::new()) };
    fs::read(path).map_err(|why| format!("{}: {why}", path.display()))
}

fn configuration(
    settings: &TlsSettings,
    client_ca: &[u8],
    names: Arc<Names>,
) -> Result<ServerConfig, String> {
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|why| why.to_string())?;
    let builder = match &settings.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let wrong = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
            let mut store = RootCertStore::empty();
            for root in roots(client_ca) {
                store.add(root.der).map_err(|why| wrong(&why))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider());
            let verifier = match settings.client_auth {
                ClientAuth::Require => verifier,
                ClientAuth::Request => verifier.allow_unauthenticated(),
            };
            builder.with_client_cert_verifier(verifier.build().map_err(|why| wrong(&why))?)
        }
    };
    let mut config = builder.with_cert_resolver(names);
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    // Clients resume by ticket, so nothing is stored here. A client that must have a certificate presents it each
    // time, so that one that is no longer trusted is refused at once.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    if settings.client_ca.is_none() {
        config.ticketer = Ticketer::new().map_err(|why| why.to_string())?;
        config.send_tls13_tickets = 1;
    }
    Ok(config)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
