//! The lingering close: our end first, then read until the peer's, so that nothing of the last answer is lost.
//!
//! Closing over unread bytes makes the kernel send a reset, which takes from the peer what it hasn't read yet; and
//! when the pod's network goes with the process, so does what the kernel has not delivered (RFC 9112 §9.6).

use std::cell::RefCell;
use std::collections::HashSet;
use std::time::{Duration, Instant};

use rustix::fs::fstat;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::plane::Worker;

/// A peer that has everything and doesn't close is waited for so long.
const DELIVERED: Duration = Duration::from_secs(1);
/// Nobody is waited for longer than this, however slowly it reads; a drain's end may be sooner.
const MOST: Duration = Duration::from_secs(300);
/// How often it is asked whether everything has been delivered.
const LOOK: Duration = Duration::from_millis(250);

/// Reads and discards until the peer closes, has had everything for a while, or the bound is over.
pub async fn linger(mut stream: TcpStream, worker: &Worker) {
    let inode = fstat(&stream).map_or(0, |stat| stat.st_ino);
    let (began, mut delivered) = (Instant::now(), None);
    let mut discarded = [0; 4096];
    while began.elapsed() < MOST {
        match tokio::time::timeout(LOOK, stream.read(&mut discarded)).await {
            Ok(Ok(0) | Err(_)) => return,
            // Its unread request bytes: a peer that never stops sending is not waited for.
            Ok(Ok(_)) if began.elapsed() < 5 * DELIVERED => continue,
            Ok(Ok(_)) => return,
            Err(_) if worker.undelivered.has(inode) => delivered = None,
            Err(_) => {
                let since = *delivered.get_or_insert_with(Instant::now);
                if since.elapsed() >= DELIVERED {
                    return;
                }
            }
        }
    }
}

/// Sockets of this network namespace whose peer has not acknowledged everything, looked up at most every [`LOOK`].
#[derive(Debug, Default)]
pub struct Undelivered {
    seen: RefCell<(Option<Instant>, HashSet<u64>)>,
}

impl Undelivered {
    fn has(&self, inode: u64) -> bool {
        let (looked, inodes) = &mut *self.seen.borrow_mut();
        if looked.is_none_or(|at| at.elapsed() >= LOOK) {
            inodes.clear();
            for table in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
                inodes.extend(
                    std::fs::read_to_string(table).unwrap_or_default().lines().filter_map(unacknowledged),
                );
            }
            *looked = Some(Instant::now());
        }
        inodes.contains(&inode)
    }
}

/// The inode of a socket with a send queue, from a line of `/proc/net/tcp` (proc_pid_net(5)).
fn unacknowledged(line: &str) -> Option<u64> {
    let mut columns = line.split_ascii_whitespace();
    let (unsent, _) = columns.nth(4)?.split_once(':')?;
    let inode = columns.nth(4)?.parse().ok()?;
    unsent.bytes().any(|digit| digit != b'0').then_some(inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_send_queue_names_its_socket() {
        let line = |queue: &str| {
            format!(
                "  0: 0100007F:1F90 0100007F:D2A4 01 {queue}:00000000 01:00000014 00000000     0        0 81234 2 0"
            )
        };
        assert_eq!(unacknowledged(&line("0000002A")), Some(81234));
        assert_eq!(unacknowledged(&line("00000000")), None);
        assert_eq!(
            unacknowledged("  sl  local_address rem_address   st tx_queue rx_queue tr tm->when"),
            None
        );
    }
}
