//! Limits on what clients and the app may send, in bytes, number and time. The flags are the settings.

use std::time::Duration;

use clap::{Args, value_parser};

use super::values;

/// Limits on what clients and the app may send.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Limits")]
pub struct Limits {
    /// Maximum size of the head of a request or response, 8KiB to 16MiB. Beyond it: 431, or 502 for the app's response
    #[arg(long, value_name = "BYTES", default_value = "64KiB",
          value_parser = values::head_bytes)]
    pub max_head: usize,
    /// Maximum number of header fields in a request or response, 1 to 16384. Beyond it: 431, or 502 for the app's
    /// response. Node accepts 2000
    #[arg(long, value_name = "N", default_value = "2000",
          value_parser = values::fields)]
    pub max_fields: usize,
    /// Maximum size of a request target (path and query). Beyond it: 414
    #[arg(long, value_name = "BYTES", default_value = "16KiB",
          value_parser = values::uri_bytes)]
    pub max_uri: usize,
    /// Time limit from the first byte of a request to the end of its head. Beyond it: 408. Also the time limit for a
    /// PROXY protocol header; beyond it the connection is closed
    #[arg(long, value_name = "TIME", default_value = "30s",
          value_parser = values::time_over_zero)]
    pub head_timeout: Duration,
    /// Maximum time without progress in either direction while the client still has to send its body or read its
    /// response. Beyond it: 408, or a visibly incomplete response
    #[arg(long, value_name = "TIME", default_value = "5m",
          value_parser = values::time_over_zero)]
    pub body_timeout: Duration,
    /// Time limit for the app to begin its response, and to continue reading the request. Beyond it: 504. With 0 there
    /// is no limit except a drain
    #[arg(long, value_name = "TIME", default_value = "0",
          value_parser = values::time)]
    pub answer_timeout: Duration,
    /// Maximum time without traffic on a WebSocket, another tunnel or a --tcp connection. Beyond it: Close 1001 for a
    /// WebSocket, a reset for the others. With 0 there is no limit
    #[arg(long, value_name = "TIME", default_value = "0",
          value_parser = values::time)]
    pub tunnel_timeout: Duration,
    /// Time after which an idle client connection is closed; a sixtieth of it while --max-connections are open. It must
    /// be longer than the idle timeout of a load balancer in front (AWS 60s, Azure 4m, Google 10m), because a request
    /// sent on a connection that is just being closed fails. An idle connection costs next to nothing
    #[arg(long, value_name = "TIME", default_value = "1h",
          value_parser = values::time_over_zero)]
    pub idle_timeout: Duration,
    /// Maximum number of open client connections. Beyond it, new ones wait in the kernel's queue. Lowered to what
    /// `ulimit -n` allows, with a line in the log
    #[arg(long, value_name = "N", default_value = "50000",
          value_parser = value_parser!(u64).range(1..=u64::from(u32::MAX)))]
    pub max_connections: u64,
    /// Maximum number of requests, tunnels and --tcp connections in flight, including held ones. Beyond it: 503 with
    /// Retry-After, or a reset for --tcp. With 0 there is no limit. Health checks are counted separately, with the same
    /// limit but at most 64
    #[arg(long, value_name = "N", default_value = "0")]
    pub max_in_flight: u64,
    /// Maximum number of concurrent requests on one HTTP/2 connection. It is announced to the client; more are refused
    #[arg(long, value_name = "N", default_value = "100",
          value_parser = value_parser!(u32).range(1..=10_000))]
    pub max_streams: u32,
    /// Maximum number of requests and --tcp connections held while the app restarts or is replaced. Beyond it: 503, or
    /// a reset for --tcp
    #[arg(long, value_name = "N", default_value = "1000")]
    pub max_held: u64,
    /// Maximum total size of held requests. Beyond it: 503
    #[arg(long, value_name = "BYTES", default_value = "64MiB",
          value_parser = values::bytes)]
    pub max_held_bytes: usize,
    /// Number of files that the data plane may open, for clients and connections to the app together. Determined at
    /// start-up.
    #[arg(skip = u64::MAX)]
    pub max_files: u64,
}
