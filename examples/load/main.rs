//! A load client that counts every lost request while servers come and go.
//!
//! ```text
//! cargo run --example load -- --addr 198.18.0.1:80 --kinds keep-alive:20,new:8,slow:10 --requests 3000 < /dev/tty
//! ```
//!
//! It uses the example apps (`slow`, `chat`, or `slow` through `front`) until its input ends and `--requests` have been
//! made, then finishes the running requests and prints one JSON object. It retries nothing, honours `Connection:
//! close`, and never sends on a connection whose end it has seen. It begins once every address accepts connections.

mod connection;
mod report;
mod work;

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;

use connection::Connection;
use report::Report;
use work::{Kind, Servers, Worker};

/// Makes requests until its input ends, and prints the losses as JSON.
#[derive(Debug, Parser)]
struct Arguments {
    /// Addresses of the servers; each new connection takes the next one
    #[arg(long, required_unless_present = "addr_file")]
    addr: Vec<SocketAddr>,
    /// File with the servers' addresses, one a line, read for each new connection, as clients of a headless Service
    /// look up its name
    #[arg(long, conflicts_with = "addr")]
    addr_file: Option<PathBuf>,
    /// Number of clients of each kind
    #[arg(
        long,
        value_delimiter = ',',
        value_parser = parse_kind,
        default_value = "keep-alive:20,new:8,slow:10,long:6,stream:6,upload:4,download:2,idle:6,events:4"
    )]
    kinds: Vec<(Kind, u32)>,
    /// Local address of the connections, instead of the one that the route selects
    #[arg(long)]
    from: Option<IpAddr>,
    /// Continue after the end of the input until this number of requests has been made
    #[arg(long, default_value_t = 0)]
    requests: u64,
}

fn parse_kind(text: &str) -> Result<(Kind, u32), String> {
    let (name, count) = text.split_once(':').ok_or("write KIND:CLIENTS, as in slow:10")?;
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
    let names = || Kind::ALL.map(Kind::name).join(", ");
    let kind = kind.ok_or_else(|| format!("no kind '{name}'; there are {}", names()))?;
    Ok((kind, count.parse().map_err(|_| format!("'{count}' is not a number of clients"))?))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let input_ended = Arc::new(AtomicBool::new(false));
    let ended = input_ended.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        ended.store(true, Ordering::Relaxed);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let report = runtime.block_on(run(arguments, input_ended));
    println!("{}", report.json());
    ExitCode::from(u8::from(report.lost() > 0))
}

async fn run(arguments: Arguments, input_ended: Arc<AtomicBool>) -> Arc<Report> {
    let report = Arc::new(Report::default());
    let servers =
        Arc::new(Servers { addrs: arguments.addr, file: arguments.addr_file, from: arguments.from });
    for addr in &*servers.addrs() {
        // A Service's address refuses connections until kube-proxy knows its first pod.
        while Connection::open(*addr, servers.from).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let clients = arguments.kinds.iter().flat_map(|(kind, count)| (0..*count).map(|_| *kind));
    let workers: Vec<_> = clients
        .enumerate()
        .map(|(n, kind)| {
            let worker = Worker::new(kind, n, servers.clone(), report.clone());
            let (ended, made) = (input_ended.clone(), report.clone());
            let over = move || ended.load(Ordering::Relaxed) && made.requests() >= arguments.requests;
            tokio::spawn(worker.run(over))
        })
        .collect();
    for worker in workers {
        worker.await.expect("no worker panics");
    }
    report
}
