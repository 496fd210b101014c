//! Who is measured: each peer's command and configuration, on an equal footing.
//!
//! Two workers or threads, HTTP/1.1 kept alive on both sides, no access log, `X-Forwarded-For`, `-Proto` and `-Host`
//! set, `Host` passed on, and no limit on the requests of a connection.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::server::{Result, Scratch, Server, free_address, lameduck};

/// What stands between the load and the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proxy {
    /// The subject.
    Lameduck,
    /// What the ratios are to.
    Nginx,
    /// HAProxy in HTTP mode.
    Haproxy,
    /// HAProxy in TCP mode, which reads no HTTP: the floor.
    HaproxyTcp,
    /// Nothing: what the upstream itself costs in latency.
    Direct,
}

impl Proxy {
    /// In the order of the table's columns and of each round.
    pub const ALL: [Self; 5] = [Self::Lameduck, Self::Nginx, Self::Haproxy, Self::HaproxyTcp, Self::Direct];

    /// As `--only` and the table name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lameduck => "lameduck",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::HaproxyTcp => "haproxy-tcp",
            Self::Direct => "direct",
        }
    }

    /// Writes the configuration into `dir` and returns the command that runs in the foreground; none for `Direct`.
    fn command(self, dir: &Path, listen: SocketAddr, upstream: SocketAddr) -> Result<Option<Command>> {
        match self {
            Self::Lameduck => Ok(Some(lameduck(dir, listen, upstream, free_address()?, "30s"))),
            Self::Nginx => nginx(dir, 2, &nginx_proxy(listen, upstream)).map(Some),
            Self::Haproxy => haproxy(dir, &haproxy_http(listen, upstream)).map(Some),
            Self::HaproxyTcp => haproxy(dir, &haproxy_tcp(listen, upstream)).map(Some),
            Self::Direct => Ok(None),
        }
    }
}

/// A proxy that runs.
pub struct Instance {
    /// Which one.
    pub proxy: Proxy,
    /// Where it listens.
    pub address: SocketAddr,
    /// From the start of its process to its first answer.
    pub start_up: Duration,
    server: Option<Server>,
}

impl Instance {
    /// Starts one before the upstream and waits for its first answer from there.
    pub fn start(proxy: Proxy, scratch: &Scratch, upstream: SocketAddr) -> Result<Self> {
        let listen = free_address()?;
        let dir = scratch.dir(&format!("{}-{}", proxy.name(), listen.port()))?;
        let Some(command) = proxy.command(&dir, listen, upstream)? else {
            return Ok(Self { proxy, address: upstream, start_up: Duration::ZERO, server: None });
        };
        let mut server = Server::start(command, &dir)?;
        let start_up = server.wait_for_answer(listen, "/")?;
        Ok(Self { proxy, address: listen, start_up, server: Some(server) })
    }

    /// The pids of all its processes; none for `Direct`.
    pub fn pids(&self) -> Vec<u32> {
        self.server.as_ref().map(Server::pids).unwrap_or_default()
    }
}

/// Starts the fast upstream: nginx with one worker and a 13-byte answer from memory.
pub fn start_upstream(scratch: &Scratch) -> Result<(Server, SocketAddr)> {
    let address = free_address()?;
    let dir = scratch.dir("upstream")?;
    let site = format!(
        "server {{
            listen {address} backlog=8192;
            default_type text/plain;
            return 200 \"Hello, world!\";
        }}"
    );
    let mut server = Server::start(nginx(&dir, 1, &site)?, &dir)?;
    server.wait_for_answer(address, "/").map_err(|error| format!("the upstream (nginx): {error}"))?;
    Ok((server, address))
}

/// Where a program is: in `PATH`, or in `/usr/sbin`, where Debian puts servers and a user's `PATH` may not lead.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// nginx with its files in `dir`. `worker_connections` makes room for the idle connections: their slots are part of
/// what it holds at start.
fn nginx(dir: &Path, workers: u32, site: &str) -> Result<Command> {
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}/{kind};\n", dir.display()))
        .concat();
    let config = format!(
        "daemon off;
        master_process on;
        worker_processes {workers};
        pid {}/nginx.pid;
        error_log stderr error;
        events {{ worker_connections 10240; }}
        http {{
            access_log off;
            keepalive_requests 1000000000;
            {temp}
            {site}
        }}",
        dir.display()
    );
    let file = dir.join("nginx.conf");
    fs::write(&file, config)?;
    let mut command = Command::new(find("nginx").ok_or("nginx is not installed")?);
    command.arg("-p").arg(dir).arg("-c").arg(file).args(["-e", "stderr"]);
    Ok(command)
}

fn nginx_proxy(listen: SocketAddr, upstream: SocketAddr) -> String {
    format!(
        "upstream app {{
            server {upstream};
            keepalive 64;
            keepalive_requests 1000000000;
        }}
        server {{
            listen {listen} backlog=8192;
            location / {{
                proxy_pass http://app;
                proxy_http_version 1.1;
                proxy_set_header Connection \"\";
                proxy_set_header Host $http_host;
                proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                proxy_set_header X-Forwarded-Proto $scheme;
                proxy_set_header X-Forwarded-Host $http_host;
            }}
        }}"
    )
}

/// HAProxy; its `maxconn` follows from the limit on open files.
fn haproxy(dir: &Path, site: &str) -> Result<Command> {
    let config = format!(
        "global
            nbthread 2
        defaults
            timeout connect 5s
            timeout client 75s
            timeout server 75s
            timeout http-keep-alive 75s
            backlog 8192
        {site}\n"
    );
    let file = dir.join("haproxy.cfg");
    fs::write(&file, config)?;
    let mut command = Command::new(find("haproxy").ok_or("haproxy is not installed")?);
    command.args(["-db", "-f"]).arg(file);
    Ok(command)
}

fn haproxy_http(listen: SocketAddr, upstream: SocketAddr) -> String {
    format!(
        "
        listen app
            mode http
            bind {listen}
            option http-keep-alive
            option forwardfor
            http-request set-header X-Forwarded-Proto http
            http-request set-header X-Forwarded-Host %[req.hdr(host)]
            http-reuse always
            server app {upstream}"
    )
}

fn haproxy_tcp(listen: SocketAddr, upstream: SocketAddr) -> String {
    format!(
        "
        listen app
            mode tcp
            bind {listen}
            server app {upstream}"
    )
}
