//! The measured proxies, started on an equal footing. Their configurations are in `peers.rs`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::app::App;
use crate::peers::{self, Also};
use crate::quota::Quota;
use crate::server::{Result, Scratch, Server, free_address, lameduck, route};

/// A proxy between the load and the app.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proxy {
    /// The subject.
    Lameduck,
    /// The subject, connected to the app by a unix socket.
    LameduckUnix,
    /// Base of the ratios.
    Nginx,
    /// HAProxy in HTTP mode.
    Haproxy,
    /// HAProxy in TCP mode, which does not parse HTTP: the lower bound.
    HaproxyTcp,
    /// Envoy.
    Envoy,
    /// No proxy: the latency of the app itself.
    Direct,
}

impl Proxy {
    /// In the order of the table's columns and of each round.
    pub const ALL: [Self; 7] = [
        Self::Lameduck,
        Self::LameduckUnix,
        Self::Nginx,
        Self::Haproxy,
        Self::HaproxyTcp,
        Self::Envoy,
        Self::Direct,
    ];

    /// Name for `--only` and the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lameduck => "lameduck",
            Self::LameduckUnix => "lameduck-unix",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::HaproxyTcp => "haproxy-tcp",
            Self::Envoy => "envoy",
            Self::Direct => "direct",
        }
    }

    /// How to install it.
    pub fn how_to_get(self) -> &'static str {
        match self {
            Self::Envoy => peers::GET_ENVOY,
            _ => "get it with: apt-get install nginx-light haproxy",
        }
    }
}

/// Environment of every proxy.
pub struct Bench {
    /// The lameduck binary to measure.
    pub binary: PathBuf,
    /// Directory for configurations, logs and sockets.
    pub scratch: Scratch,
    /// The app behind each proxy.
    pub app: App,
}

impl Bench {
    /// Writes a proxy's configuration and returns its foreground command with this number of threads or workers (for
    /// lameduck, none means its default); nothing for `Direct`.
    fn command(
        &self,
        proxy: Proxy,
        dir: &Path,
        listen: SocketAddr,
        probe: SocketAddr,
        threads: Option<u32>,
        also: Also<'_>,
    ) -> Result<Option<Command>> {
        let app = self.app.tcp;
        let workers = threads.unwrap_or(1);
        let ours = |upstream: &str| {
            let mut command = lameduck(&self.binary, dir, &route(listen, upstream), probe, "60s");
            if let Some(threads) = threads {
                command.args(["--threads", &threads.to_string()]);
            }
            if let Also::Tls(address, certificate, _) = also {
                command.args(["--tls-listen", &address.to_string()]);
                command.arg("--tls-dir").arg(certificate.parent().unwrap_or(Path::new(".")));
            }
            Ok(Some(command))
        };
        match proxy {
            Proxy::Lameduck => ours(&if let Also::Grpc(_, grpc) = also { grpc } else { app }.to_string()),
            Proxy::LameduckUnix => ours(&format!("unix:{}", self.app.unix.display())),
            Proxy::Nginx => peers::nginx(dir, workers, listen, app, also).map(Some),
            Proxy::Haproxy => peers::haproxy(dir, workers, &peers::haproxy_http(listen, app)).map(Some),
            Proxy::HaproxyTcp => peers::haproxy(dir, workers, &peers::haproxy_tcp(listen, app)).map(Some),
            Proxy::Envoy => peers::envoy(dir, workers, listen, app, also).map(Some),
            Proxy::Direct => Ok(None),
        }
    }

    /// Starts a proxy with two threads or workers and waits for the first response from the app.
    pub fn start(&self, proxy: Proxy) -> Result<Instance> {
        self.start_with(proxy, Some(2), None, Also::Nothing)
    }

    /// Starts a proxy in a control group: nginx with one worker, lameduck with its default number of threads.
    pub fn start_confined(&self, proxy: Proxy, quota: &Quota) -> Result<Instance> {
        self.start_with(proxy, None, Some(quota), Also::Nothing)
    }

    /// Starts a proxy with two threads or workers that also serves `also`.
    pub fn start_also(&self, proxy: Proxy, also: Also<'_>) -> Result<Instance> {
        self.start_with(proxy, Some(2), None, also)
    }

    fn start_with(
        &self,
        proxy: Proxy,
        threads: Option<u32>,
        quota: Option<&Quota>,
        also: Also<'_>,
    ) -> Result<Instance> {
        let (listen, probe) = (free_address()?, free_address()?);
        let dir = self.scratch.dir(&format!("{}-{}", proxy.name(), listen.port()))?;
        let Some(mut command) = self.command(proxy, &dir, listen, probe, threads, also)? else {
            let address = self.app.tcp;
            return Ok(Instance { proxy, address, probe, start_up: Duration::ZERO, server: None });
        };
        if let Some(quota) = quota {
            command = quota.confine(&command);
        }
        let mut server = Server::start(command, &dir)?;
        // An app that speaks only HTTP/2 can't be asked in HTTP/1.1.
        let start_up = match (proxy, also) {
            (Proxy::Lameduck, Also::Grpc(..)) => server.wait_for_answer(probe, "/readyz")?,
            _ => server.wait_for_answer(listen, "/")?,
        };
        Ok(Instance { proxy, address: listen, probe, start_up, server: Some(server) })
    }
}

/// A running proxy.
pub struct Instance {
    /// Which one.
    pub proxy: Proxy,
    /// Address on which it listens.
    pub address: SocketAddr,
    /// Probe address of lameduck.
    pub probe: SocketAddr,
    /// Time from the start of its process to the first response.
    pub start_up: Duration,
    server: Option<Server>,
}

impl Instance {
    /// Pids of all its processes; none for `Direct`.
    pub fn pids(&self) -> Vec<u32> {
        self.server.as_ref().map(Server::pids).unwrap_or_default()
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        self.server.as_ref().map(Server::log).unwrap_or_default()
    }
}
