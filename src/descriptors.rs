//! Open files: how many this process may have, and which of them are whose. Clients may take all that they are given
//! and the probes, the control socket and the looks at the app still find some.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Kept for the admin side where there are plenty: its callers, the looks at the app, look-ups of names, certificates.
const RESERVE: u64 = 512;
/// What a thread of the data plane opens for itself at most: its epoll sets, and what wakes it.
const PER_THREAD: u64 = 6;

/// Who may have how many open at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Connections of clients and to the app together.
    pub data: u64,
    /// Connections to the probe listener.
    pub probe: u32,
    /// Connections to each listener of control.
    pub control: u32,
}

/// Raises the soft limit, usually 1024, to the hard one. Returns what the limit is then.
pub fn raise() -> u64 {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// How many are open now (proc_pid_fd(5)); a guess where /proc is hidden.
pub fn open() -> u64 {
    fs::read_dir("/proc/self/fd").map_or(32, |files| files.count() as u64)
}

/// Divides a `limit`, of which so many are `open` and `threads` are still to be started.
pub fn divide(limit: u64, open: u64, threads: u64) -> Shares {
    let reserve = (limit / 4).min(RESERVE);
    let rest = limit.saturating_sub(reserve + open + threads * PER_THREAD);
    let part = |parts: u64, least: u64| (reserve / parts).max(least) as u32;
    Shares { data: rest.max(2), probe: part(2, 2), control: part(8, 1) }
}

/// Of `data` the most that either side may have: clients that are idle need no connection to the app, and one client may
/// need many, but the other side always finds some.
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
