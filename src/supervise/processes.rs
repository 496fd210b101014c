//! Reads the app's processes from `/proc`: which there are, which would not forward a signal, and where they listen. If
//! `/proc` is not readable, only the main process is known.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::SocketAddr;

use rustix::process::{Pid, Signal, getpid};

use crate::capture::listeners::{self, socket_inode};

/// Shells, which wait for their child and don't forward signals.
const SHELLS: [&str; 7] = ["sh", "dash", "bash", "ash", "busybox", "zsh", "ksh"];

/// Package managers, which run a script by a shell. Some versions forward SIGTERM, to that shell or to the script,
/// others don't: `tests/other_makes/package_managers.rs` tests them.
const PACKAGE_MANAGERS: [&str; 9] =
    ["npm", "npx", "npm-cli", "npx-cli", "yarn", "yarnpkg", "pnpm", "pnpx", "corepack"];

#[derive(Clone, Copy, Debug)]
struct Process {
    pid: Pid,
    parent: Option<Pid>,
    group: Option<Pid>,
}

/// Our live descendants. As a subreaper we adopt the orphans among them.
fn descendants() -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| pid(entry.file_name().to_str()?));
    let mut others: Vec<_> = pids.filter_map(read).collect();
    let (mut found, mut parents) = (Vec::new(), vec![getpid()]);
    while !parents.is_empty() {
        let children: Vec<_>;
        (children, others) =
            others.into_iter().partition(|process| process.parent.is_some_and(|pid| parents.contains(&pid)));
        parents = children.iter().map(|child| child.pid).collect();
        found.extend(children);
    }
    found
}

fn pid(text: &str) -> Option<Pid> {
    Pid::from_raw(text.parse().ok()?)
}

/// Parses `/proc/<pid>/stat`: state, parent and group follow the name. None for a process that has ended.
fn read(pid: Pid) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may contain spaces and brackets: search its end from the right.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().take(3).collect();
    let [state, parent, group] = fields[..] else { return None };
    let pid_of = |text| self::pid(text);
    (!["Z", "X"].contains(&state)).then(|| Process { pid, parent: pid_of(parent), group: pid_of(group) })
}

/// Live processes in the process group of `main`.
pub fn members(main: Pid) -> Vec<Pid> {
    group(main).into_iter().map(|process| process.pid).collect()
}

fn group(main: Pid) -> Vec<Process> {
    descendants().into_iter().filter(|process| process.group == Some(main)).collect()
}

/// Processes that should get a signal for the app: its main process, as without us. If that is a wrapper that does not
/// forward the signal: the processes that it wraps, or, if some of them listen on the app's port, only those.
pub fn recipients(main: Pid, port: u16, signal: Signal) -> Vec<Pid> {
    let group = group(main);
    let (mut found, mut open) = (Vec::new(), vec![main]);
    while let Some(pid) = open.pop() {
        let children = group.iter().filter(|process| process.parent == Some(pid)).map(|child| child.pid);
        let children: Vec<_> = children.collect();
        match children.is_empty() || !keeps_to_itself(pid, signal) {
            true => found.push(pid),
            false => open.extend(children),
        }
    }
    let serving: Vec<_> =
        listeners().into_iter().filter(|(_, addr)| addr.port() == port).map(|(pid, _)| pid).collect();
    match found.iter().any(|pid| serving.contains(pid)) {
        true => found.into_iter().filter(|pid| serving.contains(pid)).collect(),
        false => found,
    }
}

/// Whether the process is a wrapper that does not forward the signal. A shell that handles the signal does.
fn keeps_to_itself(pid: Pid, signal: Signal) -> bool {
    let program = program(pid).unwrap_or_default();
    PACKAGE_MANAGERS.contains(&program.as_str())
        || SHELLS.contains(&program.as_str()) && !catches(pid, signal)
}

/// Name of the program, or of Node's script, without suffix and version.
fn program(pid: Pid) -> Option<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let line = String::from_utf8_lossy(&line);
    let mut words = line.split('\0');
    // npm and others overwrite their command line, as in `npm start`.
    let name = base(words.next()?.split(' ').next()?);
    let name = match name {
        "node" | "nodejs" => base(words.find(|word| !word.starts_with('-'))?),
        name => name.trim_start_matches('-'),
    };
    let stem = name.split('.').next()?;
    let unversioned =
        stem.split_once('-').filter(|(_, version)| version.starts_with(|c: char| c.is_ascii_digit()));
    Some(unversioned.map_or(stem, |(stem, _)| stem).to_owned())
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Whether the process handles the signal.
pub fn catches(pid: Pid, signal: Signal) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask =
        status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigCgt:")?.trim(), 16).ok());
    mask.unwrap_or(0) >> (signal.as_raw() - 1) & 1 == 1
}

/// Addresses on which our descendants listen, as far as `/proc` is readable.
pub fn listening() -> Vec<SocketAddr> {
    let mut found: Vec<_> = listeners().into_iter().map(|(_, addr)| addr).collect();
    found.sort_unstable_by_key(|addr| (addr.port(), addr.ip()));
    found.dedup();
    found
}

/// Whether a foreign process listens on this port; false if that can't be determined for all descendants.
pub fn is_strangers(port: u16) -> bool {
    let apps = sockets();
    let on_port =
        listeners::listeners().unwrap_or_default().into_iter().filter(|(addr, _)| addr.port() == port);
    let mut inodes = on_port.map(|(_, inode)| inode).peekable();
    apps.complete && inodes.peek().is_some() && !inodes.any(|inode| apps.inodes.contains(&inode))
}

/// Inodes of our descendants' sockets.
#[derive(Debug)]
pub struct Sockets {
    /// Those that are known.
    pub inodes: HashSet<u64>,
    /// Whether these are all: `/proc` shows the files of every descendant.
    pub complete: bool,
}

/// Returns the sockets of our descendants.
pub fn sockets() -> Sockets {
    let mut sockets = Sockets { inodes: HashSet::new(), complete: true };
    for Process { pid, .. } in descendants() {
        match inodes(pid) {
            Some(inodes) => sockets.inodes.extend(inodes),
            None => sockets.complete = false,
        }
    }
    sockets
}

/// Inodes of a process's sockets; none if they can't be read.
fn inodes(pid: Pid) -> Option<impl Iterator<Item = u64>> {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    Some(files.filter_map(|file| socket_inode(&fs::read_link(file.path()).ok()?)))
}

fn listeners() -> Vec<(Pid, SocketAddr)> {
    let sockets = listeners::listeners().unwrap_or_default();
    let sockets: HashMap<_, _> = sockets.into_iter().map(|(addr, inode)| (inode, addr)).collect();
    let mut found = Vec::new();
    for Process { pid, .. } in descendants() {
        let addrs = inodes(pid).into_iter().flatten().filter_map(|inode| sockets.get(&inode).copied());
        found.extend(addrs.map(|addr| (pid, addr)));
    }
    found
}
