//! Who is measured: each peer as it is started, on an equal footing. Their configurations are in `peers.rs`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::app::App;
use crate::peers::{self, Also};
use crate::quota::Quota;
use crate::server::{Result, Scratch, Server, free_address, lameduck};

/// What stands between the load and the app.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proxy {
    /// The subject.
    Lameduck,
    /// The subject, which reaches the app by unix socket.
    LameduckUnix,
    /// What the ratios are to.
    Nginx,
    /// HAProxy in HTTP mode.
    Haproxy,
    /// HAProxy in TCP mode, which reads no HTTP: the floor.
    HaproxyTcp,
    /// Envoy.
    Envoy,
    /// Nothing: what the app itself costs in latency.
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

    /// As `--only` and the table name it.
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

    /// How to get it, if it is missing.
    pub fn how_to_get(self) -> &'static str {
        match self {
            Self::Envoy => peers::GET_ENVOY,
            _ => "get it with: apt-get install nginx-light haproxy",
        }
    }
}

/// What every proxy is started with.
pub struct Bench {
    /// The lameduck that is measured.
    pub binary: PathBuf,
    /// Where configurations, logs and sockets go.
    pub scratch: Scratch,
    /// What stands behind each proxy.
    pub app: App,
}

impl Bench {
    /// Writes a proxy's configuration and returns the command that runs in the foreground, with that many threads or
    /// workers (lameduck: none leaves it to itself); nothing for `Direct`.
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
            let mut command = lameduck(&self.binary, dir, listen, upstream, probe, "60s");
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

    /// Starts one with two threads or workers and waits for its first answer from the app.
    pub fn start(&self, proxy: Proxy) -> Result<Instance> {
        self.start_with(proxy, Some(2), None, Also::Nothing)
    }

    /// Starts one in a control group: nginx with one worker, lameduck with as many threads as it sees fit.
    pub fn start_confined(&self, proxy: Proxy, quota: &Quota) -> Result<Instance> {
        self.start_with(proxy, None, Some(quota), Also::Nothing)
    }

    /// Starts one with two threads or workers that serves this besides.
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

/// A proxy that runs.
pub struct Instance {
    /// Which one.
    pub proxy: Proxy,
    /// Where it listens.
    pub address: SocketAddr,
    /// lameduck's probe listener.
    pub probe: SocketAddr,
    /// From the start of its process to its first answer.
    pub start_up: Duration,
    server: Option<Server>,
}

impl Instance {
    /// The pids of all its processes; none for `Direct`.
    pub fn pids(&self) -> Vec<u32> {
        self.server.as_ref().map(Server::pids).unwrap_or_default()
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        self.server.as_ref().map(Server::log).unwrap_or_default()
    }
}
