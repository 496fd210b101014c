//! The addresses of this network namespace, from the kernel's tables. Pure but for reading two files.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Returns the addresses that clients can reach, and the loopback ones, without 127.0.0.0/8 beyond 127.0.0.1 and without
/// IPv6's link-local ones, which no Service uses.
pub fn addresses() -> Vec<IpAddr> {
    let v4 = std::fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let v6 = std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    let mut found: Vec<IpAddr> = ipv4(&v4).into_iter().map(IpAddr::from).collect();
    found.push(Ipv4Addr::LOCALHOST.into());
    found.extend(ipv6(&v6).into_iter().map(IpAddr::from));
    found.sort();
    found.dedup();
    found
}

/// The local addresses of `/proc/net/fib_trie`: a leaf `|-- ADDRESS` is followed by `/32 host LOCAL`.
fn ipv4(trie: &str) -> Vec<Ipv4Addr> {
    let (mut leaf, mut found) = (None, Vec::new());
    for line in trie.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse().ok();
        } else if line.starts_with("/32 host LOCAL") {
            found.extend(leaf.filter(|address: &Ipv4Addr| !address.is_loopback()));
        }
    }
    found
}

/// The addresses of `/proc/net/if_inet6`: 32 digits, then the interface, the prefix length, and the scope (0x20:
/// link-local).
fn ipv6(table: &str) -> Vec<Ipv6Addr> {
    let address = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let bits = u128::from_str_radix(fields.next()?, 16).ok()?;
        (fields.nth(2)? != "20").then(|| Ipv6Addr::from_bits(bits))
    };
    table.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_addresses_are_found_in_the_routing_tables() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     |-- 10.244.1.0\n        /24 link UNICAST\nLocal:\n     |-- 10.244.1.7\n        /32 host LOCAL\n     |-- 10.244.1.255\n        /32 link BROADCAST\n     |-- 127.0.0.1\n        /32 host LOCAL\n";
        assert_eq!(ipv4(trie), ["10.244.1.7".parse::<Ipv4Addr>().unwrap()]);
        let table = "00000000000000000000000000000001 01 80 10 80       lo\n\
                     fd000010024400010000000000000007 02 40 00 00     eth0\n\
                     fe80000000000000042a13fffe8c0001 02 40 20 80     eth0\n";
        let expected = ["::1", "fd00:10:244:1::7"].map(|ip| ip.parse::<Ipv6Addr>().unwrap());
        assert_eq!(ipv6(table), expected);
    }

    #[test]
    fn this_machine_has_a_loopback_address() {
        assert!(addresses().contains(&Ipv4Addr::LOCALHOST.into()));
    }
}
