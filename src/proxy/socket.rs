//! Kernel state of a client's socket: unacknowledged and unread bytes. No crate of ours offers the first one safely;
//! the alternative, `/proc/net/tcp`, has a line for every socket, and took 117 ms with 8,000 of them, on a data-plane
//! thread.

use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::ioctl::{Getter, ioctl};
use socket2::{SockRef, TcpKeepalive};

/// Returns the bytes in the socket's send queue, sent or not, that its peer has not acknowledged (tcp(7),
/// `SIOCOUTQ`); 0 if the kernel doesn't say.
pub fn unacknowledged(socket: &impl AsFd) -> u32 {
    const SIOCOUTQ: u32 = 0x5411;
    #[expect(unsafe_code, reason = "see above")]
    // SAFETY: the request writes one C int (tcp(7)), which is what the getter provides.
    let queued = unsafe { ioctl(socket, Getter::<SIOCOUTQ, std::ffi::c_int>::new()) };
    queued.ok().and_then(|queued| queued.try_into().ok()).unwrap_or(0)
}

/// Whether unread bytes have arrived. Asks the kernel, because the runtime may not have reported them yet.
pub fn has_unread(client: &impl AsFd) -> bool {
    let mut byte = [MaybeUninit::uninit()];
    matches!(SockRef::from(client).peek(&mut byte), Ok(n) if n > 0)
}

/// Enables keep-alive probes: without them a vanished peer would hold its tunnel, and a drain, for ever.
pub fn keep_alive(client: &impl AsFd) {
    let probes =
        TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(20));
    let _ = SockRef::from(client).set_tcp_keepalive(&probes.with_retries(3));
}
