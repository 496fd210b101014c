//! Asks the kernel for TCP sockets in one state, as `ss` does (sock_diag(7)). Needs no privileges; the kernel walks all
//! sockets but returns only these.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// Connections whose handshake has not ended (RFC 9293 §3.3.2).
pub const SYN_RECV: u8 = 3;
/// Listening sockets.
pub const LISTEN: u8 = 10;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Size of a `struct nlmsghdr`.
const HEADER: usize = 16;

/// A socket's local address and the number of its inode, as `/proc/PID/fd` shows it.
pub type Socket = (SocketAddr, u64);

/// Whether there is a socket in this state with this address's port and family. A connection has the family of its
/// listening socket, whatever the client's is.
///
/// # Errors
/// The kernel doesn't say.
pub fn any(addr: SocketAddr, state: u8) -> io::Result<bool> {
    let family = if addr.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let asked = ask(family, state, addr.port())?;
    let mut answer = [0; 16 << 10];
    let (_, len) = recv(&asked, &mut answer, RecvFlags::empty())?;
    // The first message decides: a connection, the end of an empty list, or an error.
    let (kind, ..) = message(&answer[..len]).ok_or(io::ErrorKind::InvalidData)?;
    if kind == NLMSG_ERROR { Err(io::ErrorKind::Unsupported.into()) } else { Ok(kind == SOCK_DIAG_BY_FAMILY) }
}

/// All sockets in this state, of IPv4 and IPv6, in this network namespace.
///
/// # Errors
/// The kernel doesn't say.
pub fn all(state: u8) -> io::Result<Vec<Socket>> {
    let mut found = Vec::new();
    for family in [AddressFamily::INET, AddressFamily::INET6] {
        let asked = ask(family, state, 0)?;
        let mut answer = [0; 16 << 10];
        loop {
            let (_, len) = recv(&asked, &mut answer, RecvFlags::empty())?;
            if read(&answer[..len], &mut found)? {
                break;
            }
        }
    }
    Ok(found)
}

/// Sends the question; each read of the returned socket is a part of the answer.
fn ask(family: AddressFamily, state: u8, port: u16) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(netlink::SOCK_DIAG))?;
    send(&socket, &question(family, state, port), SendFlags::empty())?;
    Ok(socket)
}

/// Builds a `struct nlmsghdr` and a `struct inet_diag_req_v2`. Port 0 is any.
fn question(family: AddressFamily, state: u8, port: u16) -> [u8; 72] {
    const NLM_F_REQUEST_DUMP: u16 = 0x301;
    let mut message = [0; 72];
    message[..4].copy_from_slice(&72_u32.to_ne_bytes());
    message[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message[6..8].copy_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    message[16] = family.as_raw() as u8;
    message[17] = 6; // TCP
    message[20..24].copy_from_slice(&(1_u32 << state).to_ne_bytes());
    message[24..26].copy_from_slice(&port.to_be_bytes());
    message
}

/// The first message: its type, its content, and what follows it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let content = bytes.get(HEADER..len)?;
    Some((kind, content, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// Reads a part of an answer; true if it is the last one.
fn read(mut bytes: &[u8], found: &mut Vec<Socket>) -> io::Result<bool> {
    while let Some((kind, content, rest)) = message(bytes) {
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => return Err(io::ErrorKind::Unsupported.into()),
            SOCK_DIAG_BY_FAMILY => found.extend(socket(content)),
            _ => {}
        }
        bytes = rest;
    }
    Ok(false)
}

/// Reads a `struct inet_diag_msg`.
fn socket(message: &[u8]) -> Option<Socket> {
    let port = u16::from_be_bytes(*message.get(4..)?.first_chunk()?);
    let ip = message.get(8..)?;
    let ip = match AddressFamily::from_raw((*message.first()?).into()) {
        AddressFamily::INET => IpAddr::from(Ipv4Addr::from(*ip.first_chunk::<4>()?)),
        _ => IpAddr::from(Ipv6Addr::from(*ip.first_chunk::<16>()?)),
    };
    let inode = u32::from_ne_bytes(*message.get(68..)?.first_chunk()?);
    Some((SocketAddr::new(ip, port), inode.into()))
}

#[cfg(test)]
mod tests {
    use std::fs::read_link;
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn listening_sockets_are_found_with_address_and_inode() {
        for addr in ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
            let listener = TcpListener::bind(addr).unwrap();
            let link = read_link(format!("/proc/self/fd/{}", listener.as_raw_fd())).unwrap();
            let addr = listener.local_addr().unwrap();
            let found = all(LISTEN).unwrap();
            let (_, inode) = found.iter().find(|(found, _)| *found == addr).unwrap();
            assert_eq!(link.to_str().unwrap(), format!("socket:[{inode}]"));
        }
    }

    /// More than one read of the answer.
    #[test]
    fn none_of_many_is_missed() {
        let all_of = |sockets: &[Socket]| sockets.iter().map(|(addr, _)| *addr).collect::<Vec<_>>();
        let listeners: Vec<_> = (0..600).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let found = all_of(&all(LISTEN).unwrap());
        assert!(listeners.iter().all(|listener| found.contains(&listener.local_addr().unwrap())));
    }

    #[test]
    fn broken_messages_are_no_sockets() {
        let mut found = Vec::new();
        let mut bytes = [0; 88];
        for len in [0_u32, 15, 16, 40, 89, u32::MAX] {
            bytes[..4].copy_from_slice(&len.to_ne_bytes());
            bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
            for end in 0..bytes.len() {
                assert!(matches!(read(&bytes[..end], &mut found), Ok(false)), "{len}, {end}");
            }
        }
        assert!(found.is_empty(), "{found:?}");
    }
}
