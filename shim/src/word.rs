//! The word: tells lameduck that a socket listens, and waits until the proxy listens too, so that "listening" means
//! reachable.
//!
//! A word is one datagram, `listen PORT`, to an abstract unix socket of the network namespace: `lameduck-capture` in a pod,
//! `lameduck-run-NUMBER` under `lameduck run`. It comes from a socket that the kernel has named (unix(7), autobind).
//! lameduck answers there with one datagram once it has done what it will do about that port: `in use` if it can't have it
//! because another program does, which is what the app then hears, else anything. Nobody needs to trust a word: it only
//! makes lameduck ask the kernel who listens where.

use crate::bind::Address;
use crate::run::Run;
use crate::sys;

/// Name of lameduck's socket in a pod, and under `run`, after the zero.
const POD: &[u8; 16] = b"lameduck-capture";
const RUN: &[u8; 13] = b"lameduck-run-";
/// Length of the longest `sockaddr_un` here.
const NAME_LEN: usize = 21;
/// Seconds and nanoseconds that a word may take in all. Then the app goes on, as it would without lameduck.
const LIMIT: [i64; 2] = [1, 0];

/// Tells lameduck about this listening socket if clients could reach it where it was bound; under `run`, in any case.
/// Waits only for one that was moved. If nobody is there to be told, returns at once. Returns 0 or an error for the
/// app, and then the socket doesn't listen any more.
pub fn tell(listening: i32) -> isize {
    let Some(addr) = sys::getsockname(listening).and_then(|bytes| Address::read(&bytes, 28)) else {
        return 0;
    };
    let run = Run::read();
    let here = addr.is_here(&run);
    if run.is_pod() && addr.is_loopback() && !here {
        return 0;
    }
    let mut refused = false;
    let socket = sys::socket(sys::AF_UNIX, sys::SOCK_DGRAM | sys::SOCK_NONBLOCK);
    if let Ok(fd @ 0..) = i32::try_from(socket) {
        refused = ask(fd, addr.port(), here, &run);
        sys::close(fd);
    }
    if refused {
        sys::shutdown(listening);
        return sys::EADDRINUSE;
    }
    0
}

/// Whether lameduck answers that the port is in use.
fn ask(fd: i32, port: u16, waits: bool, run: &Run) -> bool {
    const POLLIN: i16 = 1;
    const POLLOUT: i16 = 4;
    let (name, len) = name(run);
    let name = name.get(..len).unwrap_or_default();
    // From here on only lameduck's socket can send to ours.
    if sys::bind(fd, name.as_ptr(), 2) < 0 || sys::connect(fd, name) < 0 {
        return false;
    }
    let mut left = LIMIT;
    let sent = wait(fd, POLLOUT, &mut left) && sys::send(fd, &word(port)) > 0;
    sent && waits && wait(fd, POLLIN, &mut left) && sys::receive(fd) == Some(b'i')
}

/// `sockaddr_un` of lameduck's socket: the family, a zero and the name; and its length.
fn name(run: &Run) -> ([u8; NAME_LEN], usize) {
    let (text, number): (&[u8], &[u8]) = match run.is_pod() {
        true => (POD, &[]),
        false => (RUN, &digits(run.number)),
    };
    let (mut name, mut len) = ([0; NAME_LEN], 3);
    let [f0, f1, ..] = &mut name;
    [*f0, *f1] = sys::AF_UNIX.to_ne_bytes();
    for (to, from) in name.iter_mut().skip(3).zip(text.iter().chain(number)) {
        *to = *from;
        len += 1;
    }
    (name, len)
}

fn digits(number: u16) -> [u8; 5] {
    let digit = |unit: u16| b'0' + (number / unit % 10) as u8;
    [digit(10_000), digit(1_000), digit(100), digit(10), digit(1)]
}

/// `listen PORT`, with leading zeros.
fn word(port: u16) -> [u8; 12] {
    let mut word = *b"listen 00000";
    word.iter_mut().skip(7).zip(digits(port)).for_each(|(to, from)| *to = from);
    word
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

    #[test]
    fn each_run_has_a_socket_of_its_own() {
        let text = |run: &Run| {
            let (name, len) = name(run);
            String::from_utf8(name[2..len].to_vec()).unwrap()
        };
        assert_eq!(text(&Run::read()), "\0lameduck-capture");
        assert_eq!(text(&Run::test(320, 0, 0)), "\0lameduck-run-00320");
    }
}
