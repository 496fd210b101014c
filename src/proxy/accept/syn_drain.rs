//! Finishes the handshakes of a listening socket before it closes. A client whose handshake is under way considers
//! itself connected just before the kernel offers the connection to accept(2); closing the socket in between would
//! reset it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use socket2::{SockFilter, SockRef};
use tokio::sync::oneshot;

use crate::netlink::{self, SYN_RECV};

/// Time limit for handshakes: longer than any takes on a busy machine, and the most that a client vanishing during
/// one can delay a drain.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_millis(300);
/// Delay before the first check; it doubles for each further one.
const FIRST_CHECK_DELAY: Duration = Duration::from_millis(2);
/// Delay if the kernel can't say whether handshakes are under way.
const UNKNOWN_DELAY: Duration = Duration::from_millis(20);

/// Returns when no further connection will reach a listening socket. From here on new SYNs are ignored and handshakes
/// under way may finish. A client whose SYN was ignored sends it again, and is refused once the socket has closed.
pub async fn handshakes_end(listener: &impl AsFd) {
    let socket = SockRef::from(listener);
    if let Err(error) = socket.attach_filter(&IGNORE_SYN) {
        tracing::debug!(%error, "could not attach a filter to the listening socket");
    }
    let addr = socket.local_addr().ok().and_then(|addr| addr.as_socket());
    let (tell, told) = oneshot::channel();
    // With 20,000 sockets a check takes 3 ms: too long for a thread that serves connections.
    let check = move || tell.send(addr.is_some_and(|addr| wait(addr).is_ok()));
    let checking = std::thread::Builder::new().name("handshakes".to_owned()).spawn(check).is_ok();
    if !(checking && told.await.unwrap_or(false)) {
        tokio::time::sleep(UNKNOWN_DELAY).await;
    }
}

/// Blocks until no handshake with this address is under way, or their time limit has passed.
fn wait(addr: SocketAddr) -> io::Result<()> {
    let (began, mut pause) = (Instant::now(), FIRST_CHECK_DELAY);
    loop {
        std::thread::sleep(pause);
        if !netlink::any(addr, SYN_RECV)? {
            return Ok(());
        }
        if began.elapsed() >= HANDSHAKE_TIMEOUT {
            tracing::debug!(%addr, "a handshake did not finish in time");
            return Ok(());
        }
        pause = (pause * 2).min(HANDSHAKE_TIMEOUT.saturating_sub(began.elapsed())).max(FIRST_CHECK_DELAY);
    }
}

/// Classic BPF on the TCP header: drop the packet if SYN is set and ACK is not (RFC 9293 §3.1), else keep it.
const IGNORE_SYN: [SockFilter; 5] = [
    SockFilter::new(0x30, 0, 0, 13),          // load the flags' byte
    SockFilter::new(0x54, 0, 0, 0x12),        // mask all but SYN and ACK
    SockFilter::new(0x15, 0, 1, 0x02),        // only SYN?
    SockFilter::new(0x06, 0, 0, 0),           // drop
    SockFilter::new(0x06, 0, 0, 0xffff_ffff), // keep
];

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// Drops every segment with an ACK, like a network that is slow to deliver a handshake's last one.
    const IGNORE_ACK: [SockFilter; 5] = [
        SockFilter::new(0x30, 0, 0, 13),
        SockFilter::new(0x54, 0, 0, 0x10),
        SockFilter::new(0x15, 0, 1, 0x10),
        SockFilter::new(0x06, 0, 0, 0),
        SockFilter::new(0x06, 0, 0, 0xffff_ffff),
    ];

    /// A listening socket, and a client that considers itself connected to it.
    fn half_way(listen: &str) -> (TcpListener, TcpStream) {
        let listener = TcpListener::bind(listen).unwrap();
        SockRef::from(&listener).attach_filter(&IGNORE_ACK).unwrap();
        let client = TcpStream::connect(("127.0.0.1", listener.local_addr().unwrap().port())).unwrap();
        assert!(netlink::any(listener.local_addr().unwrap(), SYN_RECV).unwrap());
        (listener, client)
    }

    #[tokio::test]
    async fn a_handshake_under_way_is_waited_for() {
        for listen in ["127.0.0.1:0", "[::]:0"] {
            let (listener, mut client) = half_way(listen);
            let mut ends = std::pin::pin!(handshakes_end(&listener));
            let early = tokio::time::timeout(UNKNOWN_DELAY * 3, &mut ends).await;
            assert!(early.is_err(), "the socket would close over it");
            client.write_all(b"here").unwrap();
            ends.await;
            listener.set_nonblocking(true).unwrap();
            let (_, peer) = listener.accept().unwrap();
            assert_eq!(peer.port(), client.local_addr().unwrap().port());
        }
    }

    #[tokio::test]
    async fn one_that_never_ends_is_waited_for_a_bounded_time() {
        let (listener, _client) = half_way("127.0.0.1:0");
        let began = Instant::now();
        handshakes_end(&listener).await;
        assert!(
            (HANDSHAKE_TIMEOUT..HANDSHAKE_TIMEOUT * 4).contains(&began.elapsed()),
            "{:?}",
            began.elapsed()
        );
    }

    #[tokio::test]
    async fn one_that_is_over_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        handshakes_end(&listener).await;
        assert!(!netlink::any(listener.local_addr().unwrap(), SYN_RECV).unwrap());
    }
}
