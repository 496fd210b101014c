//! Limits on open files: how many this process may have, and how they are divided. Clients that use up their share
//! leave enough for the probes, the control socket and the checks of the app.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors reserved for the admin side: its clients, checks of the app, name look-ups, certificates.
const RESERVE: u64 = 512;
/// Maximum that a data-plane thread opens for itself: its epoll sets and wakers.
const PER_THREAD: u64 = 6;

/// Limits on open files by use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Connections of clients and to the app, together.
    pub data: u64,
    /// Connections to the probe listener.
    pub probe: u32,
    /// Connections to each control listener.
    pub control: u32,
}

/// Raises the soft limit on open files, usually 1024, to the hard limit. Returns the new limit.
pub fn raise() -> u64 {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Number of open files (proc_pid_fd(5)); an estimate if /proc is not readable.
pub fn open() -> u64 {
    fs::read_dir("/proc/self/fd").map_or(32, |files| files.count() as u64)
}

/// Divides `limit`, of which `open` are in use, with `threads` still to be started.
pub fn divide(limit: u64, open: u64, threads: u64) -> Shares {
    let reserve = (limit / 4).min(RESERVE);
    let rest = limit.saturating_sub(reserve + open + threads * PER_THREAD);
    let part = |parts: u64, least: u64| (reserve / parts).max(least) as u32;
    Shares { data: rest.max(2), probe: part(2, 2), control: part(8, 1) }
}

/// Maximum of `data` for client connections, and for connections to the app. Idle clients need no connection to the
/// app, and an HTTP/2 client may need many; each side always keeps some.
pub fn most_of_one_side(data: u64) -> u64 {
    (data - data.div_ceil(4)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_few_there_are_the_shares_fit_and_nobody_goes_without() {
        for limit in 0..5_000 {
            let Shares { data, probe, control } = divide(limit, 16, 2);
            let one = most_of_one_side(data);
            assert!(one > 0 && one < data && probe > 0 && control > 0, "{limit}");
            let all = data + u64::from(probe + 2 * control) + 16 + 2 * PER_THREAD;
            assert!(all <= limit.max(48), "{limit}: {all}");
        }
        let Shares { data, probe, control } = divide(1 << 20, 20, 8);
        assert_eq!((probe, control), (256, 64));
        assert!(most_of_one_side(data) > 750_000 && data - most_of_one_side(data) > 250_000);
    }
}
