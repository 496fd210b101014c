//! Bounds on what may come from outside, in bytes, number and time: the flags are the settings.

use std::time::Duration;

use clap::{Args, value_parser};

use super::values;

/// Bounds on what may come from outside.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Limits")]
pub struct Limits {
    /// Bytes of a request's or an answer's head, 8KiB to 16MiB; past it 431, or 502 for the app's
    #[arg(long, value_name = "BYTES", default_value = "64KiB",
          value_parser = values::head_bytes)]
    pub max_head: usize,
    /// Fields of a request's or an answer's head, 1 to 16384; past it 431, or 502 for the app's. Node takes 2000
    #[arg(long, value_name = "N", default_value = "2000",
          value_parser = values::fields)]
    pub max_fields: usize,
    /// Bytes of a request's target (its path and query); past it 414
    #[arg(long, value_name = "BYTES", default_value = "16KiB",
          value_parser = values::uri_bytes)]
    pub max_uri: usize,
    /// From a request's first byte to its head's last; past it 408. Also for a PROXY protocol header, then a close
    #[arg(long, value_name = "TIME", default_value = "30s",
          value_parser = values::time_over_zero)]
    pub head_timeout: Duration,
    /// How long nothing may move either way while the client has to send of its body or to take of its answer; past it
    /// 408, or a visible cut
    #[arg(long, value_name = "TIME", default_value = "5m",
          value_parser = values::time_over_zero)]
    pub body_timeout: Duration,
    /// How long the app may take to begin its answer, and to go on taking the request; past it 504. 0 is for ever: what
    /// bounds the app then is the drain
    #[arg(long, value_name = "TIME", default_value = "0",
          value_parser = values::time)]
    pub answer_timeout: Duration,
    /// How long nothing may move over a WebSocket (then Close 1001), another tunnel or a --tcp connection (then a reset);
    /// 0 is for ever
    #[arg(long, value_name = "TIME", default_value = "0",
          value_parser = values::time)]
    pub tunnel_timeout: Duration,
    /// An idle kept connection is closed after this time, or after a sixtieth of it while --max-connections are open. It
    /// must be longer than a load balancer in front keeps its own idle ones (AWS 60s, Azure 4m, Google 10m): what that
    /// sends over one which is just being closed fails. An idle one costs next to nothing
    #[arg(long, value_name = "TIME", default_value = "1h",
          value_parser = values::time_over_zero)]
    pub idle_timeout: Duration,
    /// Open client connections; past it new ones wait in the kernel's queue. Cut to what `ulimit -n` has room for, with a
    /// line in the log
    #[arg(long, value_name = "N", default_value = "50000",
          value_parser = value_parser!(u64).range(1..=u64::from(u32::MAX)))]
    pub max_connections: u64,
    /// Requests, tunnels and --tcp connections in flight, held ones included; past it 503 with Retry-After, or a reset.
    /// 0 is any number. As many health checks, but 64 at most, have places of their own
    #[arg(long, value_name = "N", default_value = "0")]
    pub max_in_flight: u64,
    /// Requests at once over one HTTP/2 connection; its client is told, and more are refused
    #[arg(long, value_name = "N", default_value = "100",
          value_parser = value_parser!(u32).range(1..=10_000))]
    pub max_streams: u32,
    /// Requests and --tcp connections held while the app restarts or is replaced; past it 503, or a reset
    #[arg(long, value_name = "N", default_value = "1000")]
    pub max_held: u64,
    /// Bytes of held requests; past it 503
    #[arg(long, value_name = "BYTES", default_value = "64MiB",
          value_parser = values::bytes)]
    pub max_held_bytes: usize,
    /// Files that the data plane may open, clients and connections to the app together: found at start-up.
    #[arg(skip = u64::MAX)]
    pub max_files: u64,
}
