//! Who listens in this network namespace: sockets that the shim has moved, and those that it has not.

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::{fs, io};

use super::place::Place;
use crate::netlink::{self, LISTEN, Socket};

/// The app's ports, by what became of them. A port can be in both: an IPv6-only socket doesn't move.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// Addresses of sockets that have moved to the app's place.
    pub moved: BTreeSet<SocketAddr>,
    /// Addresses that others can reach and that aren't ours: the proxy can't take these ports there.
    pub bypassed: BTreeSet<SocketAddr>,
    /// Other addresses of this pod alone that aren't ours.
    pub loopback: BTreeSet<SocketAddr>,
}

/// Ports of Linkerd's and Istio's proxies (<https://istio.io/latest/docs/ops/deployment/requirements/>).
const MESH: [u16; 13] =
    [4140, 4143, 4190, 4191, 15000, 15001, 15004, 15006, 15008, 15020, 15021, 15053, 15090];

/// Whether a port is a mesh's, which is no app's and nobody's to protect. It is known by its number: in ambient mode ztunnel
/// listens in the pod without being a container of it, so that `inject` would see nothing.
pub fn is_mesh(port: u16) -> bool {
    MESH.contains(&port)
}

/// Asks the kernel for all listening TCP sockets.
///
/// # Errors
/// Neither sock_diag(7) nor `/proc/net/tcp` can be read.
pub fn listeners() -> io::Result<Vec<Socket>> {
    netlink::all(LISTEN).or_else(|_| from_proc())
}

/// The ports of this pod as they are now.
///
/// # Errors
/// As [`listeners`]; or our own descriptors can't be listed.
pub fn ports() -> io::Result<Ports> {
    let own = own_sockets()?;
    Ok(sort(&listeners()?, Place::Pod, |inode| !own.contains(&inode)))
}

/// Sorts the listeners that are the app's, by the inode.
pub fn sort(listeners: &[Socket], place: Place, is_apps: impl Fn(u64) -> bool) -> Ports {
    let mut ports = Ports::default();
    for &(addr, _) in listeners.iter().filter(|(_, inode)| is_apps(*inode)) {
        let ip = addr.ip().to_canonical();
        if place.asked(ip).is_some() {
            ports.moved.insert(SocketAddr::new(ip, addr.port()));
        } else {
            let others = if ip.is_loopback() { &mut ports.loopback } else { &mut ports.bypassed };
            others.insert(SocketAddr::new(ip, addr.port()));
        }
    }
    ports
}

/// Inodes of this process's sockets.
fn own_sockets() -> io::Result<HashSet<u64>> {
    let links = fs::read_dir("/proc/self/fd")?.flatten().filter_map(|file| fs::read_link(file.path()).ok());
    Ok(links.filter_map(|link| socket_inode(&link)).collect())
}

/// The inode that a link in `/proc/PID/fd` names; none if it isn't a socket's.
pub fn socket_inode(link: &Path) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Reads `/proc/net/tcp` and `tcp6`, which list connections too. There is no `tcp6` without IPv6.
fn from_proc() -> io::Result<Vec<Socket>> {
    let text =
        fs::read_to_string("/proc/net/tcp")? + &fs::read_to_string("/proc/net/tcp6").unwrap_or_default();
    Ok(text.lines().filter_map(parse_line).collect())
}

/// Parses the line of a listening socket:
/// `0: 0100007F:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4711 …`.
fn parse_line(line: &str) -> Option<Socket> {
    const LISTEN: &str = "0A";
    let mut fields = line.split_whitespace();
    let (local, state, inode) = (fields.nth(1)?, fields.nth(1)?, fields.nth(5)?);
    if state != LISTEN {
        return None;
    }
    Some((parse_kernel_addr(local)?, inode.parse().ok()?))
}

/// The kernel prints an address as hexadecimal 32-bit words in native byte order.
fn parse_kernel_addr(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(ip.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    let ip = if ip.len() == 8 {
        IpAddr::from(word(0)?)
    } else {
        let words = [word(0)?, word(1)?, word(2)?, word(3)?];
        IpAddr::from(<[u8; 16]>::try_from(words.as_flattened()).ok()?)
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn sock_diag_and_proc_agree() {
        let listeners =
            ["127.0.0.1:0", "[::1]:0", "127.77.0.1:0"].map(|addr| TcpListener::bind(addr).unwrap());
        for listener in &listeners {
            let addr = listener.local_addr().unwrap();
            let of = |sockets: &[Socket]| sockets.iter().find(|(found, _)| *found == addr).copied();
            let found = of(&netlink::all(LISTEN).unwrap());
            assert!(found.is_some() && found == of(&from_proc().unwrap()), "{addr}");
            assert!(own_sockets().unwrap().contains(&found.unwrap().1));
        }
    }

    #[test]
    fn ports_are_moved_bypassed_loopback_or_ours() {
        let listeners: Vec<Socket> = [
            "127.77.0.1:1",
            "[::ffff:127.77.0.1]:2",
            "0.0.0.0:3",
            "[::]:4",
            "10.0.0.7:5",
            "[2001:db8::7]:6",
            "[::ffff:10.0.0.7]:7",
            "127.0.0.1:8",
            "[::1]:9",
            "0.0.0.0:10",
            "[::]:1",
        ]
        .iter()
        .zip(1..)
        .map(|(addr, inode)| (addr.parse().unwrap(), inode))
        .collect();
        let bypassed = ["0.0.0.0:3", "[::]:4", "10.0.0.7:5", "[2001:db8::7]:6", "10.0.0.7:7", "[::]:1"];
        let expected = Ports {
            moved: ["127.77.0.1:1", "127.77.0.1:2"].map(|addr| addr.parse().unwrap()).into(),
            bypassed: bypassed.iter().map(|addr| addr.parse().unwrap()).collect(),
            loopback: ["127.0.0.1:8", "[::1]:9"].iter().map(|addr| addr.parse().unwrap()).collect(),
        };
        assert_eq!(sort(&listeners, Place::Pod, |inode| inode != 10), expected);
    }

    #[test]
    fn lines_of_proc_are_parsed() {
        let v4 =
            "   0: 0100007F:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 4711 1 0 100 0";
        let v6 = "   1: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A \
                  00000000:00000000 00:00000000 00000000     0        0 4712 1 0 100 0 0 10 0";
        // As a little-endian kernel prints them.
        if cfg!(target_endian = "little") {
            assert_eq!(parse_line(v4), Some(("127.0.0.1:3000".parse().unwrap(), 4711)));
        }
        assert_eq!(parse_line(v6), Some(("[::]:8080".parse().unwrap(), 4712)));
        assert_eq!(parse_line(&v4.replace(" 0A ", " 01 ")), None, "a connection");
        for cut in 0..78 {
            assert_eq!(parse_line(&v4[..cut]), None, "{cut}");
        }
    }
}
