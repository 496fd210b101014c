//! Asks the kernel for TCP sockets in one state, as `ss` does (sock_diag(7)), and for the addresses of this network
//! namespace, as `ip` does (rtnetlink(7)). Needs no privileges.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// Connections whose handshake has not ended (RFC 9293 §3.3.2).
pub const SYN_RECV: u8 = 3;
/// Listening sockets.
pub const LISTEN: u8 = 10;

/// How often to ask for a list that changes while the kernel tells it.
const MAX_TRIES: usize = 10;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
/// `NETLINK_ROUTE`, the protocol number 0.
const ROUTE: Option<Protocol> = None;
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
    let asked = ask(Some(netlink::SOCK_DIAG), &sockets(family, state, addr.port()))?;
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
    whole(|| {
        let mut found = Vec::new();
        for family in [AddressFamily::INET, AddressFamily::INET6] {
            let answer = ask(Some(netlink::SOCK_DIAG), &sockets(family, state, 0))?;
            read_all(&answer, SOCK_DIAG_BY_FAMILY, |message| found.extend(socket(message)))?;
        }
        Ok(found)
    })
}

/// The addresses of this network namespace, without IPv6's link-local ones, which no Service uses.
///
/// # Errors
/// The kernel doesn't say.
pub fn addresses() -> io::Result<Vec<IpAddr>> {
    whole(|| {
        let mut found = Vec::new();
        // A `struct ifaddrmsg` of zeros asks for both families.
        let answer = ask(ROUTE, &question::<24>(RTM_GETADDR))?;
        read_all(&answer, RTM_NEWADDR, |message| found.extend(address(message)))?;
        Ok(found)
    })
}

/// Reads a list again that has changed meanwhile: something may be missing.
fn whole<T>(mut list: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let changed = |listed: &io::Result<T>| {
        listed.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Interrupted)
    };
    (1..MAX_TRIES).map(|_| list()).find(|listed| !changed(listed)).unwrap_or_else(list)
}

/// Sends the question; each read of the returned socket is a part of the answer.
fn ask(protocol: Option<Protocol>, question: &[u8]) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
    send(&socket, question, SendFlags::empty())?;
    Ok(socket)
}

/// Builds a `struct nlmsghdr`, with zeros after it: a request for a list.
fn question<const N: usize>(kind: u16) -> [u8; N] {
    const NLM_F_REQUEST_DUMP: u16 = 0x301;
    let mut message = [0; N];
    message[..4].copy_from_slice(&(N as u32).to_ne_bytes());
    message[4..6].copy_from_slice(&kind.to_ne_bytes());
    message[6..8].copy_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    message
}

/// Adds a `struct inet_diag_req_v2`. Port 0 is any.
fn sockets(family: AddressFamily, state: u8, port: u16) -> [u8; 72] {
    let mut message = question(SOCK_DIAG_BY_FAMILY);
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

/// Reads an answer to its end; `found` gets the content of each message of this kind.
fn read_all(answer: &OwnedFd, kind: u16, mut found: impl FnMut(&[u8])) -> io::Result<()> {
    let mut part = [0; 16 << 10];
    loop {
        let (_, len) = recv(answer, &mut part, RecvFlags::empty())?;
        if read(&part[..len], kind, &mut found)? {
            return Ok(());
        }
    }
}

/// Reads a part of an answer; true if it is the last one.
///
/// # Errors
/// `Interrupted` if the list has changed since its first part; others if the kernel doesn't say.
fn read(mut bytes: &[u8], wanted: u16, found: &mut impl FnMut(&[u8])) -> io::Result<bool> {
    while let Some((kind, content, rest)) = message(bytes) {
        let flags =
            bytes.get(6..8).and_then(<[u8]>::first_chunk).map_or(0, |flags| u16::from_ne_bytes(*flags));
        match kind {
            _ if flags & NLM_F_DUMP_INTR != 0 => return Err(io::ErrorKind::Interrupted.into()),
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => return Err(io::ErrorKind::Unsupported.into()),
            kind if kind == wanted => found(content),
            _ => {}
        }
        bytes = rest;
    }
    Ok(false)
}

/// Reads a `struct inet_diag_msg`.
fn socket(message: &[u8]) -> Option<Socket> {
    let port = u16::from_be_bytes(*message.get(4..)?.first_chunk()?);
    let ip = ip(*message.first()?, message.get(8..)?)?;
    let inode = u32::from_ne_bytes(*message.get(68..)?.first_chunk()?);
    Some((SocketAddr::new(ip, port), inode.into()))
}

/// Reads a `struct ifaddrmsg` and its attributes. Of a point-to-point interface `IFA_ADDRESS` is the peer's address.
fn address(message: &[u8]) -> Option<IpAddr> {
    const LINK_LOCAL: u8 = 253;
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    let (family, scope) = (*message.first()?, *message.get(3)?);
    if scope == LINK_LOCAL {
        return None;
    }
    let (mut attributes, mut found) = (message.get(8..)?, None);
    while let Some(len) = attributes.first_chunk().map(|len| usize::from(u16::from_ne_bytes(*len))) {
        let kind = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?);
        let content = attributes.get(4..len)?;
        match kind {
            IFA_LOCAL => return ip(family, content),
            IFA_ADDRESS => found = ip(family, content),
            _ => {}
        }
        attributes = attributes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// Reads an address of this family from the beginning of `bytes`.
fn ip(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    Some(match AddressFamily::from_raw(family.into()) {
        AddressFamily::INET => Ipv4Addr::from(*bytes.first_chunk()?).into(),
        _ => Ipv6Addr::from(*bytes.first_chunk()?).into(),
    })
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
                let part =
                    read(&bytes[..end], SOCK_DIAG_BY_FAMILY, &mut |message| found.extend(socket(message)));
                assert!(matches!(part, Ok(false)), "{len}, {end}");
            }
        }
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn an_answer_during_which_the_list_has_changed_is_not_whole() {
        let mut message = question::<24>(RTM_NEWADDR);
        for (flags, whole) in [(2_u16, true), (2 | 0x10, false)] {
            message[6..8].copy_from_slice(&flags.to_ne_bytes());
            let error = read(&message, RTM_NEWADDR, &mut |_| ()).err().map(|error| error.kind());
            assert_eq!(error.is_none(), whole, "{flags}: {error:?}");
        }
    }

    /// As the kernel sends them: the family, the scope, and attributes of a type and an address.
    fn of(family: AddressFamily, scope: u8, attributes: &[(u16, &str)]) -> Vec<u8> {
        let mut message = vec![family.as_raw() as u8, 24, 0, scope, 1, 0, 0, 0];
        for (kind, ip) in attributes {
            let ip = match ip.parse().unwrap() {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            message.extend((4 + ip.len() as u16).to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(ip);
        }
        message
    }

    #[test]
    fn addresses_are_ours_and_not_the_peers_nor_link_local() {
        let v4 = |attributes: &[_]| address(&of(AddressFamily::INET, 0, attributes)).map(|ip| ip.to_string());
        assert_eq!(v4(&[(1, "10.0.0.9"), (2, "10.0.0.7")]).as_deref(), Some("10.0.0.7"), "the peer's first");
        assert_eq!(v4(&[(2, "10.0.0.7"), (4, "10.0.0.255")]).as_deref(), Some("10.0.0.7"), "broadcast");
        let v6 = |scope, ip| address(&of(AddressFamily::INET6, scope, &[(1, ip)])).map(|ip| ip.to_string());
        assert_eq!(v6(0, "fd00::7").as_deref(), Some("fd00::7"));
        assert_eq!(v6(253, "fe80::7"), None);
        let whole = of(AddressFamily::INET6, 0, &[(1, "fd00::7")]);
        for cut in 0..whole.len() {
            assert_eq!(address(&whole[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn this_machine_has_a_loopback_address() {
        assert!(addresses().unwrap().contains(&Ipv4Addr::LOCALHOST.into()));
    }
}
