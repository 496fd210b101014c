//! Addresses as users write them: where to listen, where the app is, which load balancers to trust.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// The app's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpstreamAddr {
    /// `host:port`. A name is resolved every second.
    Tcp {
        /// A name or an address.
        host: String,
        /// The app's port.
        port: u16,
    },
    /// `https://host:port`.
    Tls {
        /// A name or an address.
        host: String,
        /// The app's port.
        port: u16,
        /// The name that the app's certificate must be valid for.
        name: String,
    },
    /// `unix:/path`.
    Unix(PathBuf),
}

impl UpstreamAddr {
    /// The name or address, and the port; `None` for a unix socket.
    pub fn host_and_port(&self) -> Option<(&str, u16)> {
        match self {
            Self::Tcp { host, port } | Self::Tls { host, port, .. } => Some((host, *port)),
            Self::Unix(_) => None,
        }
    }

    /// Whether it is an address yet: port 0 stands for one that has to be found.
    pub fn is_known(&self) -> bool {
        self.host_and_port().is_none_or(|(_, port)| port != 0)
    }

    /// The address and port, if it is no name; `None` for a unix socket too.
    pub fn ip(&self) -> Option<SocketAddr> {
        let (host, port) = self.host_and_port()?;
        Some(SocketAddr::new(host.parse().ok()?, port))
    }

    /// The `Host` of requests that the proxy itself makes.
    pub fn http_host(&self) -> String {
        match self {
            Self::Unix(_) => "localhost".to_owned(),
            other => other.to_string().trim_start_matches("https://").to_owned(),
        }
    }
}

impl From<SocketAddr> for UpstreamAddr {
    fn from(addr: SocketAddr) -> Self {
        Self::Tcp { host: addr.ip().to_string(), port: addr.port() }
    }
}

impl FromStr for UpstreamAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            if !path.starts_with('/') {
                return Err(format!(
                    "'{text}': a unix socket needs an absolute path, as in unix:/run/app.sock"
                ));
            }
            return Ok(Self::Unix(path.into()));
        }
        let bad =
            || format!("'{text}' is none of host:port, http://host:port, https://host:port, unix:/path");
        let (scheme, place) = match text.split_once("://") {
            Some((scheme @ ("http" | "https"), place)) => {
                (Some(scheme), place.strip_suffix('/').unwrap_or(place))
            }
            Some(_) => return Err(bad()),
            None => (None, text),
        };
        let tls = scheme == Some("https");
        // A scheme implies a default port.
        let bare = scheme.is_some() && place.strip_suffix(']').map_or(!place.contains(':'), |_| true);
        let whole = if bare { format!("{place}:{}", if tls { 443 } else { 80 }) } else { place.to_owned() };
        let (host, port) = whole.rsplit_once(':').filter(|(host, _)| !host.contains('/')).ok_or_else(bad)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(v6) => v6,
            None if host.contains(':') => {
                return Err(format!("'{text}': write an IPv6 address in brackets, as in [::1]:3000"));
            }
            None => host,
        };
        if host.is_empty() && scheme.is_some() {
            return Err(bad());
        }
        let host = if host.is_empty() { "127.0.0.1" } else { host }.to_owned();
        Ok(if tls { Self::Tls { name: host.clone(), host, port } } else { Self::Tcp { host, port } })
    }
}

impl fmt::Display for UpstreamAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Self::Tls { .. } = self {
            f.write_str("https://")?;
        }
        match self {
            Self::Tcp { host, port } | Self::Tls { host, port, .. } if host.contains(':') => {
                write!(f, "[{host}]:{port}")
            }
            Self::Tcp { host, port } | Self::Tls { host, port, .. } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// `--tcp`: an address to listen on, and the destination to which its connections are forwarded byte for byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpRoute {
    /// Address on which clients connect.
    pub listen: SocketAddr,
    /// Destination of the connections.
    pub upstream: UpstreamAddr,
}

impl FromStr for TcpRoute {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (listen, upstream) = text.split_once('=').ok_or_else(|| {
            format!("'{text}' is not ADDR=UPSTREAM: write :6379=redis:6379 or :3306=unix:/run/db.sock")
        })?;
        Ok(Self { listen: parse_listen(listen)?, upstream: upstream.parse()? })
    }
}

/// One of `--proxy-protocol-from`: an address, or a network as `address/bits` (RFC 4632 §3.1, RFC 4291 §2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    ip: IpAddr,
    bits: u8,
}

impl Cidr {
    /// Whether this address is in the network. An IPv4-mapped IPv6 address counts as the IPv4 address.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.ip, ip.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(ip)) => {
                (own.to_bits() ^ ip.to_bits()).leading_zeros() >= u32::from(self.bits)
            }
            (IpAddr::V6(own), IpAddr::V6(ip)) => {
                (own.to_bits() ^ ip.to_bits()).leading_zeros() >= u32::from(self.bits)
            }
            _ => false,
        }
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is not a network: write 10.0.0.0/8, fd00::/8 or 192.0.2.7");
        let (ip, bits) = text.split_once('/').map_or((text, None), |(ip, bits)| (ip, Some(bits)));
        let ip: IpAddr = ip.parse().map_err(|_| bad())?;
        let max = if ip.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => max,
            Some(bits) => bits.parse().ok().filter(|bits| *bits <= max).ok_or_else(bad)?,
        };
        // An IPv4-mapped IPv6 network has its IPv4 prefix in the last 32 bits.
        match ip.to_canonical() {
            IpAddr::V4(own) if ip.is_ipv6() && bits >= 96 => Ok(Self { ip: own.into(), bits: bits - 96 }),
            _ => Ok(Self { ip, bits }),
        }
    }
}

/// Parses `:4880`, `4880`, `127.0.0.1:4880` or `[::1]:4880`. A bare port listens on IPv6 and IPv4.
pub fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let any = |port: &str| {
        port.parse().ok().map(|port: u16| SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port))
    };
    let parsed = match text.strip_prefix(':') {
        Some(port) => any(port),
        None => text.parse().ok().or_else(|| any(text)),
    };
    parsed.ok_or_else(|| {
        format!("'{text}' is not an address to listen on: write :4880, 127.0.0.1:4880 or [::1]:4880")
    })
}
