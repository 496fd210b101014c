//! The rule for bind(2): which address becomes which.
//!
//! In a pod every address that clients from outside can reach becomes 127.77.0.1. Under `lameduck run` several runs share
//! a network with other programs, so each has addresses of its own, 2^14 of them, and an app keeps to the address that it
//! asks for: the last 14 bits say which that was. lameduck reads it there (`src/capture/place.rs`), as the kernel knows it.

use core::ffi::c_void;

use crate::run::Run;
use crate::sys;

/// Where a moved socket of a pod listens. All of 127.0.0.0/8 is loopback (RFC 1122 §3.2.1.3), so no route and no
/// permission is needed; a program that means loopback says 127.0.0.1.
const POD: [u8; 4] = [127, 77, 0, 1];
/// Where an IPv6-only socket of a pod listens whose IPv4 twin has moved. Nobody connects to it.
const BESIDE: [u8; 4] = [127, 77, 0, 2];
/// Where a socket listens that asked for a port of lameduck's own.
const LOCALHOST: [u8; 4] = [127, 0, 0, 1];
/// Bits of a run's address that say what was asked for.
const ASKED_BITS: u32 = 14;
/// What was asked for: 0.0.0.0, ::, 127.0.0.1, ::1, or from `OTHERS` on another address by its hash.
const ALL_V4: u32 = 1;
const ALL: u32 = 2;
const LOOPBACK_V4: u32 = 3;
const LOOPBACK_V6: u32 = 4;
const OTHERS: u32 = 16;
/// Prefix of an IPv4-mapped address (RFC 4291 §2.5.5.2).
const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// ::1.
const ONE: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// Sizes of `sockaddr_in` and of the shortest `sockaddr_in6` that the kernel takes: without a scope (RFC 2133).
const V4_LEN: usize = 16;
const V6_LEN: usize = 24;

/// An address and port of IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    V4([u8; 4], u16),
    V6([u8; 16], u16),
}

impl Address {
    /// Reads a socket address of this length (ip(7), ipv6(7)); none for other families, and for one that is too short.
    pub fn read(bytes: &[u8; 28], len: usize) -> Option<Self> {
        let [f0, f1, p0, p1, a0, a1, a2, a3, ..] = *bytes;
        let port = u16::from_be_bytes([p0, p1]);
        match u16::from_ne_bytes([f0, f1]) {
            sys::AF_INET if len >= V4_LEN => Some(Self::V4([a0, a1, a2, a3], port)),
            sys::AF_INET6 if len >= V6_LEN => {
                let (_, ip) = bytes.split_at(8);
                Some(Self::V6(*ip.first_chunk()?, port))
            }
            _ => None,
        }
    }

    pub fn port(self) -> u16 {
        let (Self::V4(_, port) | Self::V6(_, port)) = self;
        port
    }

    /// The IPv4 address, also if it is mapped.
    fn v4(self) -> Option<[u8; 4]> {
        match self {
            Self::V4(ip, _) => Some(ip),
            Self::V6(ip, _) => {
                let (prefix, rest) = ip.split_at(12);
                (*prefix == MAPPED).then_some(*rest.first_chunk()?)
            }
        }
    }

    pub fn is_loopback(self) -> bool {
        self.v4().is_some_and(|[first, ..]| first == 127) || matches!(self, Self::V6(ONE, _))
    }

    /// Whether this is where we move sockets to.
    pub fn is_here(self, run: &Run) -> bool {
        let Some(ip) = self.v4() else { return false };
        if run.is_pod() { ip == POD } else { u32::from_be_bytes(ip) >> ASKED_BITS == network(run) }
    }

    fn is_wildcard(self) -> bool {
        self.v4() == Some([0; 4]) || matches!(self, Self::V6(ip, _) if ip == [0; 16])
    }

    /// What this address is in one of a run; none for loopback addresses other than the usual two, which are for
    /// whoever knows them.
    fn asked(self) -> Option<u32> {
        match self {
            Self::V6(ip, _) if ip == [0; 16] => Some(ALL),
            Self::V6(ip, _) if ip == ONE => Some(LOOPBACK_V6),
            _ if self.is_wildcard() => Some(ALL_V4),
            _ if self.v4() == Some(LOCALHOST) => Some(LOOPBACK_V4),
            _ if self.is_loopback() => None,
            Self::V4(ip, _) => Some(hash(&ip)),
            Self::V6(ip, _) => Some(self.v4().map_or_else(|| hash(&ip), |ip| hash(&ip))),
        }
    }

    /// The socket address of the same family with this address and port, and its length.
    fn with(self, ip: [u8; 4], port: u16) -> ([u8; 28], u32) {
        let mut bytes = [0; 28];
        let [f0, f1, p0, p1, ..] = &mut bytes;
        [*p0, *p1] = port.to_be_bytes();
        let (family, at, len) = match self {
            Self::V4(..) => (sys::AF_INET, 4, V4_LEN as u32),
            Self::V6(..) => (sys::AF_INET6, 20, 28),
        };
        [*f0, *f1] = family.to_ne_bytes();
        let mapped = bytes.iter_mut().skip(8).zip(MAPPED);
        if family == sys::AF_INET6 {
            mapped.for_each(|(to, from)| *to = from);
        }
        bytes.iter_mut().skip(at).zip(ip).for_each(|(to, from)| *to = from);
        (bytes, len)
    }
}

/// The first 18 bits of a run's addresses.
fn network(run: &Run) -> u32 {
    127 << 10 | u32::from(run.number)
}

/// The same as in `src/capture/place.rs`.
fn hash(ip: &[u8]) -> u32 {
    let sum = ip.iter().fold(0_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(*byte)));
    OTHERS + sum % ((1 << ASKED_BITS) - OTHERS)
}

/// Where a socket that may be moved listens instead, by its address alone; none if it stays. In a pod those move that
/// clients from outside can reach on a port that they know. A port that lameduck has given to the app stays; one of
/// lameduck's own becomes that one.
fn moved(addr: Address, run: &Run) -> Option<([u8; 4], u16)> {
    let port = addr.port();
    if port == 0 {
        return None;
    }
    if run.is_pod() {
        return (!addr.is_loopback()).then_some((POD, port));
    }
    if port == run.given {
        return None;
    }
    let asked = addr.asked()?;
    if run.owns(port) && run.given != 0 {
        return Some((LOCALHOST, run.given));
    }
    Some(((network(run) << ASKED_BITS | asked).to_be_bytes(), port))
}

/// Whether connections to an IPv4 loopback address can reach this socket, and a proxy can take its place: TCP, or
/// Multipath TCP, which plain TCP can connect to (RFC 8684 §3.1).
///
/// What stays on its own device stays where it is.
fn can_move(fd: i32) -> bool {
    const SOL_SOCKET: usize = 1;
    const SO_TYPE: usize = 3;
    const SO_PROTOCOL: usize = 38;
    const SO_BINDTOIFINDEX: usize = 62;
    let (tcp, multipath) = (6, 262);
    let option = |name| sys::getsockopt(fd, SOL_SOCKET, name);
    let protocol = option(SO_PROTOCOL);
    option(SO_TYPE) == Some(sys::SOCK_STREAM)
        && (protocol == Some(tcp) || protocol == Some(multipath))
        && option(SO_BINDTOIFINDEX).is_none_or(|device| device == 0)
}

const IPPROTO_IPV6: usize = 41;
const IPV6_V6ONLY: usize = 26;

fn is_for_v6_only(fd: i32, addr: Address) -> bool {
    matches!(addr, Address::V6(..)) && sys::getsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY) != Some(0)
}

/// Binds an IPv6-only socket: where it was asked to, since IPv6 has one loopback address, and a socket that is bound
/// there can't be told from one that is meant for this pod alone.
///
/// But servers open a pair, first 0.0.0.0 and then `[::]` (nginx, Redis, Python's asyncio). Once the first has moved,
/// the proxy serves clients of both families from it, and has taken the second one's place on `::1`. So that one gets
/// another place, in which it is as good as bound.
fn bind_v6_only(fd: i32, asked: Address, as_asked: impl Fn() -> isize) -> isize {
    if !asked.is_wildcard() || !has_moved(asked.port()) {
        return as_asked();
    }
    if sys::setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0) < 0 {
        return as_asked();
    }
    let (beside, len) = asked.with(BESIDE, asked.port());
    let result = sys::bind(fd, beside.as_ptr(), len);
    if result < 0 {
        sys::setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
    }
    result
}

/// Whether a socket with this port has moved, asked with a socket that is nobody else's.
fn has_moved(port: u16) -> bool {
    let Ok(fd @ 0..) = i32::try_from(sys::socket(sys::AF_INET, sys::SOCK_STREAM)) else { return false };
    let (here, len) = Address::V4([0; 4], port).with(POD, port);
    let bound = sys::bind(fd, here.as_ptr(), len);
    sys::close(fd);
    bound == sys::EADDRINUSE
}

/// Whether this is one of the machine's addresses, asked with a socket that is nobody else's.
fn is_local(bytes: &[u8; 28], len: u32) -> bool {
    let [f0, f1, _, _, rest @ ..] = *bytes;
    let socket = sys::socket(u16::from_ne_bytes([f0, f1]), sys::SOCK_STREAM);
    let Ok(fd) = i32::try_from(socket) else { return true };
    if fd < 0 {
        return true;
    }
    let mut any_port = [f0, f1].into_iter().chain([0, 0]).chain(rest);
    let any_port: [u8; 28] = core::array::from_fn(|_| any_port.next().unwrap_or(0));
    let bound = sys::bind(fd, any_port.as_ptr(), len.min(28));
    sys::close(fd);
    bound != sys::EADDRNOTAVAIL
}

/// bind(2), elsewhere if the rule says so. Returns the kernel's result.
///
/// # Safety
/// As bind(3): no other thread unmaps the address meanwhile.
#[allow(unsafe_code, reason = "the caller's pointer")]
pub unsafe fn bind(fd: i32, addr: *const c_void, len: u32) -> isize {
    let as_asked = || sys::bind(fd, addr.cast(), len);
    // SAFETY: the caller's promise.
    let Some(bytes) = (unsafe { sys::copy(addr, len) }) else { return as_asked() };
    let Some(asked) = Address::read(&bytes, len as usize) else { return as_asked() };
    let run = Run::read();
    let Some((ip, port)) = moved(asked, &run) else { return as_asked() };
    if !can_move(fd) || !asked.is_wildcard() && !is_local(&bytes, len) {
        return as_asked();
    }
    if is_for_v6_only(fd, asked) {
        // A run serves the addresses of each socket by itself.
        return if run.is_pod() { bind_v6_only(fd, asked, as_asked) } else { as_asked() };
    }
    let (moved, len) = asked.with(ip, port);
    match sys::bind(fd, moved.as_ptr(), len) {
        // The loopback interface has a narrower network.
        sys::EADDRNOTAVAIL => as_asked(),
        // Two addresses of the pod with one port are no conflict: the second one stays where it is.
        sys::EADDRINUSE if run.is_pod() && !asked.is_wildcard() => as_asked(),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn v4(ip: [u8; 4], port: u16) -> Address {
        Address::V4(ip, port)
    }

    fn v6(text: &str, port: u16) -> Address {
        Address::V6(text.parse::<Ipv6Addr>().unwrap().octets(), port)
    }

    #[test]
    fn what_others_can_reach_moves_and_nothing_else() {
        for (addr, moves) in [
            (v4([0, 0, 0, 0], 3000), true),
            (v4([10, 0, 0, 7], 80), true),
            (v4([126, 0, 0, 1], 80), true),
            (v4([0, 0, 0, 0], 0), false),
            (v4([127, 0, 0, 1], 3000), false),
            (v4([127, 77, 0, 1], 3000), false),
            (v4([127, 255, 255, 255], 3000), false),
            (v6("::", 3000), true),
            (v6("2001:db8::7", 3000), true),
            (v6("::ffff:0.0.0.0", 3000), true),
            (v6("::ffff:10.0.0.7", 3000), true),
            (v6("::2", 3000), true),
            (v6("::", 0), false),
            (v6("::1", 3000), false),
            (v6("::ffff:127.0.0.1", 3000), false),
        ] {
            assert_eq!(moved(addr, &Run::read()), moves.then_some((POD, addr.port())), "{addr:?}");
        }
    }

    #[test]
    fn a_moved_address_keeps_family_and_port() {
        for asked in [v4([0, 0, 0, 0], 8080), v4([10, 0, 0, 7], 443)] {
            let (bytes, len) = asked.with(POD, asked.port());
            assert_eq!(Address::read(&bytes, len as usize), Some(v4([127, 77, 0, 1], asked.port())));
            assert_eq!(len, 16);
        }
        for asked in [v6("::", 8080), v6("2001:db8::7", 443)] {
            let (bytes, len) = asked.with(POD, asked.port());
            assert_eq!(Address::read(&bytes, len as usize), Some(v6("::ffff:127.77.0.1", asked.port())));
            assert_eq!(len, 28);
        }
    }

    #[test]
    fn a_socket_address_is_read_as_the_kernel_reads_it() {
        let mut bytes = [0xee; 28];
        bytes[..2].copy_from_slice(&sys::AF_INET.to_ne_bytes());
        bytes[2..8].copy_from_slice(&[0x0b, 0xb8, 10, 1, 2, 3]);
        assert_eq!(Address::read(&bytes, 16), Some(v4(Ipv4Addr::new(10, 1, 2, 3).octets(), 3000)));
        assert_eq!(Address::read(&bytes, 15), None);
        bytes[..2].copy_from_slice(&sys::AF_INET6.to_ne_bytes());
        assert_eq!(Address::read(&bytes, 24), Some(Address::V6([0xee; 16], 3000)));
        assert_eq!(Address::read(&bytes, 23), None);
        bytes[..2].copy_from_slice(&sys::AF_UNIX.to_ne_bytes());
        assert_eq!(Address::read(&bytes, 28), None);
    }

    #[test]
    fn only_its_own_address_is_here() {
        let (pod, run) = (Run::read(), Run::test(320, 0, 0));
        assert!(v4([127, 77, 0, 1], 1).is_here(&pod) && v6("::ffff:127.77.0.1", 1).is_here(&pod));
        assert!(!v4([127, 0, 0, 1], 1).is_here(&pod) && !v6("::1", 1).is_here(&pod));
        assert!(v4([127, 80, 0, 1], 1).is_here(&run) && v6("::ffff:127.80.63.255", 1).is_here(&run));
        assert!(!v4([127, 80, 64, 1], 1).is_here(&run) && !v4([127, 77, 0, 1], 1).is_here(&run));
    }

    #[test]
    fn a_run_knows_what_was_asked_for_by_the_address() {
        let run = Run::test(320, 0, 0);
        for (addr, ip) in [
            (v4([0, 0, 0, 0], 3000), [127, 80, 0, 1]),
            (v6("::ffff:0.0.0.0", 3000), [127, 80, 0, 1]),
            (v6("::", 3000), [127, 80, 0, 2]),
            (v4([127, 0, 0, 1], 3000), [127, 80, 0, 3]),
            (v6("::1", 3000), [127, 80, 0, 4]),
        ] {
            assert_eq!(moved(addr, &run), Some((ip, 3000)), "{addr:?}");
        }
        let (one, other) = (v4([10, 0, 0, 7], 80), v4([10, 0, 0, 8], 80));
        assert_eq!(moved(one, &run), moved(v6("::ffff:10.0.0.7", 80), &run));
        assert_ne!(moved(one, &run), moved(other, &run));
        for stays in [v4([0, 0, 0, 0], 0), v4([127, 0, 0, 2], 3000), v4([127, 80, 0, 1], 3000)] {
            assert_eq!(moved(stays, &run), None, "{stays:?}");
        }
    }

    #[test]
    fn under_run_the_given_port_stays_and_lameducks_own_becomes_that() {
        let run = Run::test(320, 40_000, 8080);
        assert_eq!(moved(v4([0, 0, 0, 0], 40_000), &run), None);
        assert_eq!(moved(v6("::", 8080), &run), Some((LOCALHOST, 40_000)));
        assert_eq!(moved(v4([0, 0, 0, 0], 3000), &run), Some(([127, 80, 0, 1], 3000)));
    }
}
