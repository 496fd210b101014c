//! Words of the shim: an app's socket listens, and waits for the proxy to take the port (`shim/src/word.rs`).
//!
//! A word is a datagram `listen PORT` to an abstract unix socket, which is scoped to the network namespace: of a pod, or of
//! a machine where each `lameduck run` has a socket of its own. A datagram back lets the app go on, or makes its listen(2)
//! fail; without one it goes on after a second. Every process there can send words, so one proves nothing: it is a reason
//! to ask the kernel ([`super::listeners`]).

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net;

use rustix::net::{SendFlags, SocketAddrUnix, sendto};
use tokio::net::UnixDatagram;
use tokio::net::unix::SocketAddr;

use super::place::Place;

/// Most words that are returned at once: the kernel queues about as many (net.unix.max_dgram_qlen).
const MOST: usize = 16;

/// The port that a datagram says listens now; none if it is no word.
pub fn parse(datagram: &[u8]) -> Option<u16> {
    let digits = datagram.strip_prefix(b"listen ")?;
    let plain = (1..=5).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    let port = if plain { str::from_utf8(digits).ok()?.parse().ok()? } else { 0 };
    (port != 0).then_some(port)
}

/// A word and who waits for its answer.
#[derive(Debug)]
pub struct Word {
    /// Port of the app's socket.
    pub port: u16,
    from: SocketAddrUnix,
}

impl Word {
    /// None for what is no word, or comes from where no answer can be sent.
    fn read(datagram: &[u8], from: SocketAddr) -> Option<Self> {
        let from = net::SocketAddr::from(from);
        let from = SocketAddrUnix::new_abstract_name(from.as_abstract_name()?).ok()?;
        Some(Self { port: parse(datagram)?, from })
    }
}

/// The socket to which the shim sends its words.
#[derive(Debug)]
pub struct Words {
    socket: UnixDatagram,
}

impl Words {
    /// Binds the socket of this place. Needs a tokio runtime.
    ///
    /// # Errors
    /// Another process of this network namespace has it.
    pub fn bind(place: Place) -> io::Result<Self> {
        let name = net::SocketAddr::from_abstract_name(place.socket_name())?;
        let socket = net::UnixDatagram::bind_addr(&name)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket: UnixDatagram::from_std(socket)? })
    }

    /// Waits for a word; returns it with the others that have come, so that one look at the kernel serves them all.
    /// What is no word is dropped. Cancel safe.
    ///
    /// # Errors
    /// The socket can't be read.
    pub async fn next(&self) -> io::Result<Vec<Word>> {
        // A longer datagram is cut, and no word.
        let (mut buffer, mut words) = ([0; 16], Vec::new());
        while words.is_empty() {
            let (len, from) = self.socket.recv_from(&mut buffer).await?;
            words.extend(Word::read(&buffer[..len], from));
            for _ in 1..MOST {
                let Ok((len, from)) = self.socket.try_recv_from(&mut buffer) else { break };
                words.extend(Word::read(&buffer[..len], from));
            }
        }
        Ok(words)
    }

    /// Lets the app go on that sent the word; if the port is `in_use` by another program, its listen(2) fails. One that
    /// doesn't wait any more has lost nothing.
    pub fn answer(&self, word: &Word, in_use: bool) {
        let answer: &[u8] = if in_use { b"in use" } else { b"go on" };
        if let Err(error) = sendto(&self.socket, answer, SendFlags::DONTWAIT, &word.from) {
            tracing::debug!(%error, port = word.port, "an app that listens doesn't wait for the answer");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_word_has_a_port() {
        for (word, port) in [("listen 03000", 3000), ("listen 80", 80), ("listen 65535", 65535)] {
            assert_eq!(parse(word.as_bytes()), Some(port));
        }
        for none in
            ["", "listen", "listen ", "listen 0", "listen 65536", "listen 000080", "listen +80", "Listen 80"]
        {
            assert_eq!(parse(none.as_bytes()), None, "{none}");
        }
        assert_eq!(parse(b"listen 80\n"), None);
        assert_eq!(parse(b"listen \xff0"), None);
    }
}
