//! Who listens in this network namespace, from the kernel's tables of TCP sockets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// State of a listening socket in these tables (`TCP_LISTEN`, include/net/tcp_states.h).
const LISTEN: &str = "0A";

/// Returns the addresses on which somebody listens. A dual-stack socket has an IPv6 address.
pub fn listening() -> Vec<SocketAddr> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    [read("/proc/net/tcp"), read("/proc/net/tcp6")].iter().flat_map(|table| parse(table)).collect()
}

/// Lines such as `0: 0100007F:0BB8 00000000:0000 0A …`: number, local address, remote address, state.
fn parse(table: &str) -> Vec<SocketAddr> {
    let line = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, state) = (fields.next()?, fields.nth(1)?);
        (state == LISTEN).then(|| address(local)).flatten()
    };
    table.lines().skip(1).filter_map(line).collect()
}

/// An address as 32-bit words in the machine's byte order, and a port.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut bytes = [0; 16];
            for at in 0..4 {
                bytes[at * 4..at * 4 + 4].copy_from_slice(&word(at * 8)?);
            }
            Ipv6Addr::from(bytes).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_socket_is_found_by_its_address() {
        let v4 = std::net::TcpListener::bind("127.77.0.1:0").unwrap();
        let v6 = std::net::TcpListener::bind("[::1]:0").unwrap();
        let found = listening();
        assert!(found.contains(&v4.local_addr().unwrap()) && found.contains(&v6.local_addr().unwrap()));
        let client = std::net::TcpStream::connect(v4.local_addr().unwrap()).unwrap();
        assert!(!listening().contains(&client.local_addr().unwrap()), "a connection does not listen");
    }

    #[test]
    fn broken_lines_are_skipped() {
        assert!(parse("head\n 0: x\n 1: 0100007F 0:0 0A\n 2: 01:00 0:0 0A\n").is_empty());
    }
}
