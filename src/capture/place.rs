//! Where the app's sockets have moved to, and what they had asked for. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::APP_IP;

/// Numbers of runs: their addresses are 127.80.0.0 to 127.250.63.255, clear of the pod's and of what others use.
const RUNS: std::ops::Range<u16> = 320..1001;
/// Bits of a run's address that say what was asked for (`shim/src/bind.rs`).
const ASKED_BITS: u32 = 14;
const ALL_V4: u32 = 1;
const ALL: u32 = 2;
const LOOPBACK_V4: u32 = 3;
const LOOPBACK_V6: u32 = 4;
const OTHERS: u32 = 16;

/// The loopback addresses of one app.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A pod has a network of its own, and so one address.
    Pod,
    /// A `lameduck run` shares it with others, and has addresses by its number.
    Run(u16),
}

/// Where a moved socket had asked to be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach(u32);

impl Place {
    /// The place of a run, for any number.
    pub fn of_run(number: u16) -> Self {
        Self::Run(RUNS.start + number % (RUNS.end - RUNS.start))
    }

    /// Returns the name of the abstract unix socket to which the shim sends its words.
    pub fn socket_name(self) -> String {
        match self {
            Self::Pod => "lameduck-capture".to_owned(),
            Self::Run(number) => format!("lameduck-run-{number:05}"),
        }
    }

    /// Returns what a socket that listens on this address had asked for; `None` if it hasn't moved here.
    pub fn asked(self, ip: IpAddr) -> Option<Reach> {
        let IpAddr::V4(ip) = ip.to_canonical() else { return None };
        match self {
            Self::Pod => (ip == APP_IP).then_some(Reach(ALL)),
            Self::Run(number) => {
                let here = ip.to_bits() >> ASKED_BITS == 127 << 10 | u32::from(number);
                here.then_some(Reach(ip.to_bits() & ((1 << ASKED_BITS) - 1)))
            }
        }
    }
}

impl Reach {
    /// Returns those of this machine's addresses on which clients are to be served. Two that can't be told apart are
    /// both left out: an app must not become reachable where it did not ask for it.
    pub fn of(self, addresses: &[IpAddr]) -> Vec<IpAddr> {
        let mut found: Vec<_> = addresses.iter().copied().filter(|ip| self.is_for(*ip)).collect();
        if self.0 >= OTHERS && found.len() > 1 {
            found.clear();
        }
        found
    }

    fn is_for(self, ip: IpAddr) -> bool {
        match self.0 {
            ALL => true,
            ALL_V4 => ip.is_ipv4(),
            LOOPBACK_V4 => ip == Ipv4Addr::LOCALHOST,
            LOOPBACK_V6 => ip == Ipv6Addr::LOCALHOST,
            _ => !ip.is_loopback() && hash(ip) == self.0,
        }
    }

    /// Whether only this machine's own programs can reach it.
    pub fn is_loopback(self) -> bool {
        matches!(self.0, LOOPBACK_V4 | LOOPBACK_V6)
    }
}

/// The same as in `shim/src/bind.rs`.
fn hash(ip: IpAddr) -> u32 {
    let of = |bytes: &[u8]| {
        bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(*byte)))
    };
    let sum = match ip {
        IpAddr::V4(ip) => of(&ip.octets()),
        IpAddr::V6(ip) => of(&ip.octets()),
    };
    OTHERS + sum % ((1 << ASKED_BITS) - OTHERS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn an_app_is_served_where_it_asked_for_it_and_nowhere_else() {
        let all = ips(&["10.0.0.7", "10.0.0.8", "127.0.0.1", "::1", "2001:db8::7"]);
        let run = Place::Run(320);
        let served = |ip: &str| run.asked(ip.parse().unwrap()).map(|asked| asked.of(&all));
        assert_eq!(served("127.80.0.1"), Some(ips(&["10.0.0.7", "10.0.0.8", "127.0.0.1"])));
        assert_eq!(served("::ffff:127.80.0.2"), Some(all.clone()));
        assert_eq!(served("127.80.0.3"), Some(ips(&["127.0.0.1"])));
        assert_eq!(served("127.80.0.4"), Some(ips(&["::1"])));
        assert_eq!(served("127.80.64.1"), None, "of another run");
        assert_eq!(served("127.77.0.1"), None);
        assert_eq!(Place::Pod.asked(APP_IP.into()).map(|asked| asked.of(&all)), Some(all.clone()));
        let one = Reach(hash(all[0]));
        assert_eq!(one.of(&all), ips(&["10.0.0.7"]));
        assert_eq!(one.of(&[all[0], all[0]]), ips(&[]), "these can't be told apart");
    }

    #[test]
    fn no_run_has_the_address_of_a_pod_or_of_other_programs() {
        for number in [0, 1, 680, 681, u16::MAX] {
            let run = Place::of_run(number);
            for ip in ["127.0.0.1", "127.0.0.53", "127.77.0.1", "127.255.255.255"] {
                assert_eq!(run.asked(ip.parse().unwrap()), None, "{run:?} {ip}");
            }
        }
    }
}
