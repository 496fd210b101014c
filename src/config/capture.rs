//! `--capture`: which of the app's ports are captured, and as what.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;

use super::values;

/// The loopback address to which the shim moves what an app binds (`shim/src/bind.rs`).
pub const APP_IP: Ipv4Addr = Ipv4Addr::new(127, 77, 0, 1);

/// Capture of the app's ports.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Capture")]
pub struct CaptureSettings {
    /// Serve every port that the app opens, under its own number, instead of --upstream and --listen. The app itself
    /// listens on 127.77.0.1 then, if LD_PRELOAD of its container names the shim of --share-dir. A port that did not move
    /// is left alone
    #[arg(long)]
    pub capture: bool,
    /// How to serve a captured port, as in 8080=http, 9000=tcp or 7000=skip. Repeat the flag or separate by commas. The
    /// default is to tell by the first bytes of each connection
    #[arg(long, value_name = "PORT=PROTOCOL", value_delimiter = ',', requires = "capture")]
    pub capture_as: Vec<CaptureRule>,
    /// In a drain, how long a connection to a captured port that isn't HTTP must have been silent before it is closed. One
    /// on which the client spoke last is not closed, as the app may be working for it. A pause of the app in the middle of
    /// a response can't be told from its end: make this longer than such pauses
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = values::time)]
    pub tcp_quiet: Duration,
}

/// `--capture-as`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureRule {
    /// The port.
    pub port: u16,
    /// What it is served as.
    pub protocol: CaptureProtocol,
}

/// What a captured port is served as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaptureProtocol {
    /// HTTP: the client speaks first.
    Http,
    /// Byte for byte.
    Tcp,
    /// Not at all.
    Skip,
}

impl fmt::Display for CaptureRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            CaptureProtocol::Http => "http",
            CaptureProtocol::Tcp => "tcp",
            CaptureProtocol::Skip => "skip",
        };
        write!(f, "{}={protocol}", self.port)
    }
}

impl FromStr for CaptureRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is not PORT=PROTOCOL: write 8080=http, 9000=tcp or 7000=skip");
        let (port, protocol) = text.split_once('=').ok_or_else(bad)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?;
        let protocol = match protocol {
            "http" => CaptureProtocol::Http,
            "tcp" => CaptureProtocol::Tcp,
            "skip" => CaptureProtocol::Skip,
            _ => return Err(bad()),
        };
        Ok(Self { port, protocol })
    }
}
