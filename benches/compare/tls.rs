//! TLS: the cost of a handshake and of an idle connection.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::app::HELLO;
use crate::http2::{Loaded, h2load, run};
use crate::measure::memory;
use crate::peers::Also;
use crate::proxy::{Bench, Instance, Proxy};
use crate::report::Report;
use crate::rows::SETTLE;
use crate::server::{Result, free_address};

/// Proxies to compare.
pub const PROXIES: [Proxy; 2] = [Proxy::Lameduck, Proxy::Nginx];

/// Number of handshakes in one load.
const HANDSHAKES: usize = 1000;

/// Handshakes with each proxy in turn, then `count` silent connections to each.
pub fn all(bench: &Bench, report: &mut Report, proxies: &[Proxy], rounds: usize, count: usize) -> Result<()> {
    let certificate = Certificate::make(bench)?;
    let started = proxies.iter().map(|proxy| certificate.start(bench, *proxy));
    let started = started.collect::<Result<Vec<_>>>()?;
    for _ in 0..rounds {
        for (instance, at) in &started {
            handshakes(report, instance, *at)?;
        }
    }
    drop(started);
    proxies.iter().try_for_each(|proxy| idle(bench, report, *proxy, count, &certificate))
}

/// A self-signed certificate (ECDSA, P-256), as files.
struct Certificate {
    chain: PathBuf,
    key: PathBuf,
    der: CertificateDer<'static>,
}

impl Certificate {
    /// Creates it.
    fn make(bench: &Bench) -> Result<Self> {
        let dir = bench.scratch.dir("certificate")?;
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])?;
        let (chain, key) = (dir.join("tls.crt"), dir.join("tls.key"));
        fs::write(&chain, made.cert.pem())?;
        fs::write(&key, made.signing_key.serialize_pem())?;
        Ok(Self { chain, key, der: made.cert.der().clone() })
    }

    /// Starts a proxy with the certificate; also returns its TLS address.
    fn start(&self, bench: &Bench, proxy: Proxy) -> Result<(Instance, SocketAddr)> {
        let at = free_address()?;
        Ok((bench.start_also(proxy, Also::Tls(at, &self.chain, &self.key))?, at))
    }

    fn client(&self) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone())?;
        Ok(Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()))
    }
}

/// Connections that each complete a handshake (TLS 1.3) and send one request, all at once.
fn handshakes(report: &mut Report, instance: &Instance, at: SocketAddr) -> Result<()> {
    let (mut command, count) = (h2load()?, HANDSHAKES.to_string());
    command.args(["--h1", "-c", &count, "-n", &count]).arg(format!("https://{at}/"));
    let Loaded { done, failed, cpu_each, text } = run(command, instance)?;
    if done as usize != HANDSHAKES {
        report
            .notes
            .push(format!("{}: {done} of {count} TLS requests, {failed} failed", instance.proxy.name()));
    }
    let seconds = text.lines().find_map(|line| line.strip_prefix("finished in ")?.split_once("s,"));
    let seconds: f64 = seconds.and_then(|(seconds, _)| seconds.parse().ok()).unwrap_or(f64::NAN);
    report.add("CPU per TLS handshake and request", "µs", instance.proxy, cpu_each);
    report.add("TLS handshakes", "1/s", instance.proxy, done / seconds);
    Ok(())
}

/// Memory of each of `count` silent TLS connections.
fn idle(
    bench: &Bench,
    report: &mut Report,
    proxy: Proxy,
    count: usize,
    certificate: &Certificate,
) -> Result<()> {
    let (instance, at) = certificate.start(bench, proxy)?;
    let client = certificate.client()?;
    drop(gather(at, 100, &client)?);
    thread::sleep(SETTLE / 2);
    let before = memory(&instance)?;
    let crowd = gather(at, count, &client)?;
    thread::sleep(SETTLE);
    let each = (memory(&instance)?.pss - before.pss) / count as f64;
    report.add("per idle TLS connection", "bytes", proxy, each);
    drop(crowd);
    Ok(())
}

type Secure = StreamOwned<ClientConnection, TcpStream>;

/// Opens connections one after the other, each with one request.
fn gather(at: SocketAddr, count: usize, client: &Arc<ClientConfig>) -> Result<Vec<Secure>> {
    let name = ServerName::from(at.ip());
    let open = || {
        let tcp = TcpStream::connect(at)?;
        tcp.set_nodelay(true)?;
        let mut stream = StreamOwned::new(ClientConnection::new(client.clone(), name.clone())?, tcp);
        stream.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")?;
        let mut answer = Vec::new();
        while !answer.ends_with(HELLO.as_bytes()) {
            let mut room = [0; 1024];
            let n = stream.read(&mut room)?;
            answer.extend_from_slice(&room[..n]);
            if n == 0 || answer.len() > 4096 {
                return Err("no answer over TLS".into());
            }
        }
        Ok(stream)
    };
    (0..count).map(|_| open()).collect()
}
