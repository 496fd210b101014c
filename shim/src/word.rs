//! The word: tells the sidecar that a socket listens, and waits until the proxy listens too, so that "listening" means
//! reachable.
//!
//! A word is one datagram, `listen PORT`, to the abstract unix socket `lameduck-capture` of the network namespace, which
//! is the pod's. It comes from a socket that the kernel has named (unix(7), autobind). The sidecar answers there with one datagram
//! of any content once it has done what it will do about that port. Nobody needs to trust a word: it only makes the
//! sidecar ask the kernel who listens where.

use crate::bind::Address;
use crate::sys;

/// `sockaddr_un` of the sidecar's socket: the family and, after a zero, the name.
const NAME: &[u8; 17] = b"\0lameduck-capture";
/// Seconds and nanoseconds that a word may take in all. Then the app goes on, as it would without a sidecar.
const LIMIT: [i64; 2] = [1, 0];

/// Tells the sidecar about this listening socket if clients from outside could reach it where it was bound. Waits
/// only for one that was moved. If nobody is there to be told, returns at once.
pub fn tell(listening: i32) {
    let Some(addr) = sys::getsockname(listening).and_then(|bytes| Address::read(&bytes, 28)) else { return };
    if addr.is_loopback() && !addr.is_here() {
        return;
    }
    let socket = sys::socket(sys::AF_UNIX, sys::SOCK_DGRAM | sys::SOCK_NONBLOCK);
    if let Ok(fd @ 0..) = i32::try_from(socket) {
        ask(fd, addr);
        sys::close(fd);
    }
}

fn ask(fd: i32, addr: Address) {
    const POLLIN: i16 = 1;
    const POLLOUT: i16 = 4;
    let [f0, f1] = sys::AF_UNIX.to_ne_bytes();
    let mut name = [f0, f1].into_iter().chain(*NAME);
    let name: [u8; 2 + NAME.len()] = core::array::from_fn(|_| name.next().unwrap_or(0));
    // From here on only the sidecar's socket can send to ours.
    if sys::bind(fd, [f0, f1].as_ptr(), 2) < 0 || sys::connect(fd, &name) < 0 {
        return;
    }
    let (word, mut left) = (word(addr.port()), LIMIT);
    if wait(fd, POLLOUT, &mut left) && sys::send(fd, &word) > 0 && addr.is_here() {
        wait(fd, POLLIN, &mut left);
    }
}

/// `listen PORT`, with leading zeros.
fn word(port: u16) -> [u8; 12] {
    let digit = |unit: u16| b'0' + (port / unit % 10) as u8;
    let [l, i, s, t, e, n, space] = *b"listen ";
    [l, i, s, t, e, n, space, digit(10_000), digit(1_000), digit(100), digit(10), digit(1)]
}

/// Waits for the event; false if the time is up. An interrupted wait goes on with what is left.
fn wait(fd: i32, event: i16, left: &mut [i64; 2]) -> bool {
    loop {
        match sys::poll(fd, event, left) {
            sys::EINTR => {}
            events => return events > 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_has_the_port_in_five_digits() {
        assert_eq!(&word(80), b"listen 00080");
        assert_eq!(&word(65535), b"listen 65535");
    }
}
