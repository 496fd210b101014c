//! HTTP/2 without TLS and gRPC: cost of a request when many share a connection, measured with h2load.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::server::SendResponse;
use http::{HeaderMap, Response};

use crate::measure::cpu;
use crate::peers::{Also, GRPC, find};
use crate::proxy::{Bench, Instance, Proxy};
use crate::report::Report;
use crate::server::{Result, Server, free_address};

/// Proxies that are compared. HAProxy speaks HTTP/2 but has no gRPC support of its own.
pub const PROXIES: [Proxy; 3] = [Proxy::Lameduck, Proxy::Nginx, Proxy::Envoy];

/// One gRPC message: 5 bytes, not compressed.
const MESSAGE: &[u8] = b"\0\0\0\0\x05hello";

/// A gRPC app as a child process.
struct GrpcApp {
    /// Address on which it listens.
    address: SocketAddr,
    _server: Server,
}

impl GrpcApp {
    /// Starts this program again, as that app.
    fn start(bench: &Bench) -> Result<Self> {
        let (dir, address) = (bench.scratch.dir("grpc-app")?, free_address()?);
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("grpc-app").arg(address.to_string());
        let server = Server::start(command, &dir)?;
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            if began.elapsed() > Duration::from_secs(10) {
                return Err("the gRPC app does not listen".into());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(Self { address, _server: server })
    }
}

/// The app: responds to every call at once with one message. Serves for the lifetime of the process.
pub fn serve(address: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                while let Some(Ok((request, respond))) = connection.accept().await {
                    tokio::spawn(answer(request.into_body(), respond));
                }
            });
        }
    })
}

async fn answer(
    mut body: h2::RecvStream,
    mut respond: SendResponse<Bytes>,
) -> std::result::Result<(), h2::Error> {
    while let Some(part) = body.data().await {
        body.flow_control().release_capacity(part?.len())?;
    }
    let head = Response::builder().header("content-type", "application/grpc").body(()).unwrap_or_default();
    let mut sending = respond.send_response(head, false)?;
    sending.send_data(Bytes::from_static(MESSAGE), false)?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    sending.send_trailers(trailers)
}

/// Both loads on each proxy in turn.
pub fn all(bench: &Bench, report: &mut Report, proxies: &[Proxy], rounds: usize, seconds: u64) -> Result<()> {
    let app = GrpcApp::start(bench)?;
    let plain = start(bench, proxies, None)?;
    let grpc = start(bench, proxies, Some(&app))?;
    for _ in 0..rounds {
        load(bench, report, &plain, false, seconds)?;
        load(bench, report, &grpc, true, seconds)?;
    }
    Ok(())
}

/// Proxies, each with its HTTP/2 address.
type Serving = Vec<(Instance, SocketAddr)>;

/// Starts the proxies in front of the app, or of a gRPC app.
fn start(bench: &Bench, proxies: &[Proxy], grpc: Option<&GrpcApp>) -> Result<Serving> {
    let start = |proxy: &Proxy| {
        let second = free_address()?;
        let instance = bench
            .start_also(*proxy, grpc.map_or(Also::Http2(second), |app| Also::Grpc(second, app.address)))?;
        // nginx serves HTTP/2 on a separate address, the others on that of HTTP/1.1.
        let at = if *proxy == Proxy::Nginx { second } else { instance.address };
        Ok((instance, at))
    };
    proxies.iter().map(start).collect()
}

/// One load on each proxy in turn.
fn load(bench: &Bench, report: &mut Report, serving: &Serving, grpc: bool, seconds: u64) -> Result<()> {
    for (instance, at) in serving {
        let mut command = h2load()?;
        command.args(["-c", "16", "-m", "10", "-D", &seconds.to_string()]);
        let figure = if grpc { "gRPC call" } else { "h2c request" };
        if grpc {
            let body = bench.scratch.dir("h2load")?.join("message");
            fs::write(&body, MESSAGE)?;
            command.arg("-d").arg(body).args(["-H", "content-type: application/grpc", "-H", "te: trailers"]);
        }
        command.arg(format!("http://{at}{}", if grpc { GRPC } else { "/" }));
        let Loaded { done, failed, cpu_each, .. } = run(command, instance)?;
        if failed > 0.0 {
            report.notes.push(format!("{}, {figure}: {failed} failed", instance.proxy.name()));
        }
        report.add(&format!("CPU per {figure}, 16 × 10 streams"), "µs", instance.proxy, cpu_each);
        let rate = done / seconds as f64;
        report.add(&format!("throughput, {figure}, 16 × 10 streams"), "requests/s", instance.proxy, rate);
    }
    Ok(())
}

/// Result of h2load.
pub struct Loaded {
    /// Number of requests that succeeded.
    pub done: f64,
    /// Number of requests that completed without success.
    pub failed: f64,
    /// CPU time of the proxy per request, in µs.
    pub cpu_each: f64,
    /// Output of h2load.
    pub text: String,
}

/// h2load with one thread, still without its load.
pub fn h2load() -> Result<Command> {
    let mut command = Command::new(find("h2load").ok_or("h2load is not installed: nghttp2-client")?);
    command.args(["-t", "1"]);
    Ok(command)
}

/// Runs the load against a proxy.
pub fn run(mut command: Command, instance: &Instance) -> Result<Loaded> {
    let pids = instance.pids();
    let before = cpu(&pids)?;
    let output = command.output()?;
    let spent = cpu(&pids)? - before;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (done, failed) = requests(&text).ok_or_else(|| format!("h2load said: {text}"))?;
    Ok(Loaded { done, failed, cpu_each: spent / done * 1e6, text })
}

/// Numbers of requests that succeeded, and that completed without success.
fn requests(text: &str) -> Option<(f64, f64)> {
    let line = text.lines().find(|line| line.starts_with("requests:"))?;
    let count = |label| {
        let part = line.split([',', ':']).find(|part| part.ends_with(label))?;
        part.trim().split(' ').next()?.parse::<f64>().ok()
    };
    let (done, succeeded) = (count(" done")?, count(" succeeded")?);
    (succeeded > 0.0).then_some((succeeded, done - succeeded))
}
