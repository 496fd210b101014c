//! Certificates, and a TLS client that reports exactly which bytes came and how the connection ended.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lameduck::tls::provider;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
    SupportedProtocolVersion,
};

use super::LIMIT;
use super::process::{Lameduck, Process, lameduck, temporary_directory};

/// A CA, and a folder with its certificate (`ca.crt`) and the certificates that it signs.
pub struct Authority {
    /// Removed on drop.
    pub dir: PathBuf,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, as PEM.
pub struct Made {
    /// `tls.crt`.
    pub crt: String,
    /// `tls.key`.
    pub key: String,
}

impl Made {
    /// Writes both into this folder.
    pub fn write(&self, dir: &Path) {
        fs::create_dir_all(dir).expect("a folder");
        fs::write(dir.join("tls.crt"), &self.crt).expect("written");
        fs::write(dir.join("tls.key"), &self.key).expect("written");
    }
}

impl Default for Authority {
    fn default() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "a test's authority");
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("signed").pem();
        let dir = temporary_directory();
        fs::write(dir.join("ca.crt"), &pem).expect("written");
        Self { dir, pem, issuer: Issuer::new(params, key) }
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Authority {
    /// A certificate for these names.
    pub fn sign(&self, names: &[&str]) -> Made {
        self.sign_subject(names, &[])
    }

    /// A certificate with a subject.
    pub fn sign_subject(&self, names: &[&str], subject: &[(DnType, &str)]) -> Made {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in subject {
            params.distinguished_name.push(kind.clone(), *value);
        }
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let crt = params.signed_by(&key, &self.issuer).expect("signed").pem();
        Made { crt, key: key.serialize_pem() }
    }

    /// Path of `ca.crt`.
    pub fn file(&self) -> String {
        self.dir.join("ca.crt").display().to_string()
    }

    /// A folder for `--tls-dir` with a certificate for `localhost`.
    pub fn tls_dir(&self) -> PathBuf {
        let dir = self.dir.join("server");
        self.sign(&["localhost", "127.0.0.1"]).write(&dir);
        dir
    }

    /// Starts `lameduck proxy` with a plain and a TLS listener; also returns the latter's address.
    pub fn proxy(&self, upstream: &str, args: &[&str]) -> (Lameduck, SocketAddr) {
        let dir = self.tls_dir();
        let dir = dir.to_str().expect("a path in ASCII");
        let args = [&["--tls-listen", "127.0.0.1:0", "--tls-dir", dir], args].concat();
        let proxy = Lameduck::proxy_to(upstream, &args);
        let addr = tls_listen(&proxy);
        (proxy, addr)
    }

    fn trusted(&self) -> Arc<RootCertStore> {
        let mut store = RootCertStore::empty();
        store.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).expect("PEM")).expect("an authority");
        Arc::new(store)
    }

    /// Configuration for a client that trusts this CA; `own` is its client certificate.
    pub fn client_config(
        &self,
        versions: &[&'static SupportedProtocolVersion],
        own: Option<&Made>,
    ) -> ClientConfig {
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(versions);
        let builder = builder.expect("versions").with_root_certificates(self.trusted());
        match own {
            None => builder.with_no_client_auth(),
            Some(own) => builder.with_client_auth_cert(chain(own), key(own)).expect("a pair"),
        }
    }

    /// Connects by TLS 1.3 to `localhost`.
    pub fn client(&self, addr: SocketAddr) -> Secure {
        Secure::connect(addr, "localhost", self.client_config(&[&rustls::version::TLS13], None))
    }

    /// The same, before the handshake.
    pub fn begun(&self, addr: SocketAddr) -> Secure {
        Secure::begun(addr, "localhost", self.client_config(&[&rustls::version::TLS13], None))
    }

    /// Configuration for a server with a certificate for these names.
    pub fn server_config(&self, names: &[&str]) -> Arc<ServerConfig> {
        let made = self.sign(names);
        let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let config = builder.expect("versions").with_no_client_auth();
        Arc::new(config.with_single_cert(chain(&made), key(&made)).expect("a pair"))
    }
}

fn chain(made: &Made) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(made.crt.as_bytes()).map(|der| der.expect("PEM")).collect()
}

fn key(made: &Made) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_slice(made.key.as_bytes()).expect("PEM")
}

/// Address of the TLS listener, the first if there are several.
pub fn tls_listen(proxy: &Lameduck) -> SocketAddr {
    let listening = proxy.wait_log("listening");
    let text = listening["tls_listen"].as_str().unwrap_or_else(|| panic!("no tls_listen in {listening}"));
    text.split(',').next().and_then(|addr| addr.parse().ok()).expect("an address")
}

/// Runs a `lameduck proxy` that is expected to exit without ever serving; returns its exit code and output.
pub fn proxy_to_its_end(args: &[&str]) -> (i32, String) {
    let dir = temporary_directory();
    let mut command = lameduck();
    command.args(["proxy", "--probe-listen", "127.0.0.1:0", "--control"]).arg(dir.join("control.sock"));
    let mut process = Process::start("lameduck", command.args(args));
    let code = process.wait_exit();
    let _ = fs::remove_dir_all(dir);
    (code, process.output())
}

/// How a TLS connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsEnd {
    /// By close_notify.
    Notified,
    /// By the end of the TCP connection alone.
    Truncated,
    /// By a reset.
    Reset,
}

/// One side of a TLS connection, over a blocking socket.
pub struct Secure {
    tls: Connection,
    tcp: TcpStream,
    /// Bytes read but not consumed yet.
    buffer: Vec<u8>,
}

impl Secure {
    /// Connects and completes the handshake.
    pub fn connect(addr: SocketAddr, name: &str, config: ClientConfig) -> Self {
        Self::try_connect(addr, name, config).unwrap_or_else(|why| panic!("no TLS with {addr}: {why}"))
    }

    /// Connects and completes the handshake, or returns the error.
    pub fn try_connect(addr: SocketAddr, name: &str, config: ClientConfig) -> Result<Self, String> {
        let Self { tls, tcp, .. } = Self::begun(addr, name, config);
        Self::shake(tls, tcp)
    }

    /// The same, sending byte by byte.
    pub fn connect_by_bytes(addr: SocketAddr, name: &str, config: ClientConfig) -> Self {
        let mut secure = Self::begun(addr, name, config);
        while secure.tls.is_handshaking() {
            let own = secure.take_words();
            secure.send_bytes(&own);
            if secure.tls.is_handshaking() {
                secure.tls.read_tls(&mut secure.tcp).expect("an answer");
                secure.tls.process_new_packets().expect("records");
            }
        }
        let own = secure.take_words();
        secure.send_bytes(&own);
        secure
    }

    /// A connection before the handshake.
    pub fn begun(addr: SocketAddr, name: &str, config: ClientConfig) -> Self {
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let tls = ClientConnection::new(Arc::new(config), name).expect("a session").into();
        let tcp = TcpStream::connect_timeout(&addr, LIMIT).expect("connected");
        tcp.set_nodelay(true).expect("no delay");
        tcp.set_read_timeout(Some(LIMIT)).expect("a timeout");
        tcp.set_write_timeout(Some(LIMIT)).expect("a timeout");
        Self { tls, tcp, buffer: Vec::new() }
    }

    /// Completes the handshake as the server.
    pub fn accept(tcp: TcpStream, config: Arc<ServerConfig>) -> Result<Self, String> {
        Self::shake(ServerConnection::new(config).expect("a session").into(), tcp)
    }

    fn shake(mut tls: Connection, mut tcp: TcpStream) -> Result<Self, String> {
        tcp.set_read_timeout(Some(LIMIT)).expect("a timeout");
        tcp.set_write_timeout(Some(LIMIT)).expect("a timeout");
        while tls.is_handshaking() {
            tls.complete_io(&mut tcp).map_err(|why| why.to_string())?;
        }
        Ok(Self { tls, tcp, buffer: Vec::new() })
    }

    /// Certificate of the peer.
    pub fn peer(&self) -> CertificateDer<'static> {
        self.tls.peer_certificates().expect("certificates")[0].clone()
    }

    /// The rustls connection, with what was negotiated.
    pub fn session(&self) -> &Connection {
        &self.tls
    }

    /// Sends these bytes.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        assert!(self.try_send(bytes.as_ref()), "the peer takes no more");
    }

    /// Sends these bytes; false if the peer no longer accepts them.
    pub fn try_send(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let n = self.tls.writer().write(bytes).expect("room");
            bytes = &bytes[n..];
            while self.tls.wants_write() {
                if self.tls.write_tls(&mut self.tcp).is_err() {
                    return false;
                }
            }
        }
        true
    }

    /// Encrypts these bytes as records, without sending them.
    pub fn seal(&mut self, bytes: impl AsRef<[u8]>) -> Vec<u8> {
        self.tls.writer().write_all(bytes.as_ref()).expect("room");
        self.take_words()
    }

    /// Pending output of the session, without sending it.
    pub fn take_words(&mut self) -> Vec<u8> {
        let mut records = Vec::new();
        while self.tls.wants_write() {
            self.tls.write_tls(&mut records).expect("a vector takes all");
        }
        records
    }

    /// Sends raw records, or parts of them.
    pub fn send_sealed(&mut self, records: &[u8]) {
        self.tcp.write_all(records).expect("sent");
    }

    /// The same byte by byte, with a pause after each so that it is read alone.
    pub fn send_bytes(&mut self, records: &[u8]) {
        for byte in records {
            self.send_sealed(&[*byte]);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends a GET on the kept-alive connection.
    pub fn get(&mut self, target: &str) {
        self.send(format!("GET {target} HTTP/1.1\r\nHost: app.test\r\n\r\n"));
    }

    /// Sends close_notify.
    pub fn notify(&mut self) {
        self.tls.send_close_notify();
        let _ = self.tls.write_tls(&mut self.tcp);
    }

    /// Shuts down the sending side without close_notify.
    pub fn truncate(&mut self) {
        let _ = self.tcp.shutdown(Shutdown::Write);
    }

    /// Resets the connection.
    pub fn reset(self) {
        socket2::SockRef::from(&self.tcp).set_linger(Some(Duration::ZERO)).expect("a linger time");
    }

    /// Reads once; the end if there is one. None if nothing came within this time.
    pub fn fill(&mut self, time: Duration) -> Option<Result<(), TlsEnd>> {
        self.tcp.set_read_timeout(Some(time)).expect("a timeout");
        loop {
            let mut bytes = [0; 16 * 1024];
            match self.tls.reader().read(&mut bytes) {
                Ok(0) => return Some(Err(TlsEnd::Notified)),
                Ok(n) => {
                    self.buffer.extend(&bytes[..n]);
                    return Some(Ok(()));
                }
                Err(why) if why.kind() == ErrorKind::UnexpectedEof => return Some(Err(TlsEnd::Truncated)),
                Err(_) => {}
            }
            match self.tls.read_tls(&mut self.tcp) {
                Ok(_) => drop(self.tls.process_new_packets().expect("records")),
                Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return None,
                Err(_) => return Some(Err(TlsEnd::Reset)),
            }
        }
    }

    /// Whether a byte comes within this time, without consuming it.
    pub fn hears_within(&self, time: Duration) -> bool {
        self.tcp.set_read_timeout(Some(time)).expect("a timeout");
        matches!(self.tcp.peek(&mut [0]), Ok(1))
    }

    /// Reads once.
    ///
    /// # Errors
    /// The peer's alert, or the end of the connection.
    pub fn try_fill(&mut self) -> Result<(), String> {
        loop {
            match self.tls.read_tls(&mut self.tcp) {
                Ok(0) => return Err("the end".to_owned()),
                Err(why) => return Err(why.to_string()),
                Ok(_) => {}
            }
            if self.tls.process_new_packets().map_err(|why| why.to_string())?.plaintext_bytes_to_read() > 0 {
                return Ok(());
            }
        }
    }

    /// Whether neither a byte nor an end came within this time.
    pub fn is_quiet_for(&mut self, time: Duration) -> bool {
        self.buffer.is_empty() && self.fill(time).is_none()
    }

    /// Reads up to and including this text.
    pub fn until(&mut self, text: &str) -> String {
        loop {
            let seen = String::from_utf8_lossy(&self.buffer).into_owned();
            if let Some(at) = self.buffer.windows(text.len()).position(|window| window == text.as_bytes()) {
                let rest = self.buffer.split_off(at + text.len());
                return String::from_utf8_lossy(&std::mem::replace(&mut self.buffer, rest)).into_owned();
            }
            match self.fill(LIMIT) {
                Some(Ok(())) => {}
                other => panic!("{other:?} instead of {text:?}, after {seen:?}"),
            }
        }
    }

    /// Bytes read but not consumed yet.
    pub fn read(&self) -> &[u8] {
        &self.buffer
    }

    /// Reads exactly this number of bytes.
    pub fn take(&mut self, length: usize) -> Vec<u8> {
        while self.buffer.len() < length {
            assert_eq!(self.fill(LIMIT), Some(Ok(())), "wanted {length} bytes, got {}", self.buffer.len());
        }
        let rest = self.buffer.split_off(length);
        std::mem::replace(&mut self.buffer, rest)
    }

    /// Reads until the connection ends: the remaining bytes, and how it ended.
    pub fn read_to_end(&mut self) -> (String, TlsEnd) {
        loop {
            match self.fill(LIMIT) {
                Some(Ok(())) => {}
                Some(Err(end)) => {
                    return (String::from_utf8_lossy(&std::mem::take(&mut self.buffer)).into_owned(), end);
                }
                None => panic!("no end within {LIMIT:?}"),
            }
        }
    }
}
