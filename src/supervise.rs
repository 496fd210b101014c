//! The child side of `lameduck run`: start the app, wait until it listens, forward signals, reap zombies, stop it.
//!
//! The app runs in a process group of its own, so that Ctrl-C reaches only the proxy, which drains first. The
//! proxy becomes a child subreaper: what a wrapper (`npm start`, `sh -c …`) leaves behind becomes its child,
//! as everything does for PID 1. [`App`] reaps every child there is, so a process may have only one, and
//! nothing else in it may wait for children (`Child::wait`, `tokio::process`).

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, IsTerminal};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{self, Pid, Signal, WaitOptions, WaitStatus};
use tokio::net::TcpStream;
use tokio::signal::unix::{self, SignalKind};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// Passed on to the app as they come. SIGTERM and SIGINT are not: they start the drain.
const FORWARDED: [Signal; 5] = [Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2, Signal::WINCH];

/// A connect to loopback is answered at once, unless the app's accept queue is full.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(250);

/// SIGKILL works at once, except on a process stuck in the kernel. Nothing more can be done about that one.
const AFTER_KILL: Duration = Duration::from_secs(1);

/// A running app. A clone is another handle on the same app.
#[derive(Clone, Debug)]
pub struct App {
    /// The process that was started, and the process group that it leads.
    main: Pid,
    port: u16,
    exit: watch::Receiver<Option<u8>>,
}

/// How the app ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit code of the process that was started, or 128 + the signal that ended it.
    pub code: u8,
    /// Something of the app outlived its SIGTERM and was sent SIGKILL.
    pub killed: bool,
}

impl App {
    /// Starts `argv` with `PORT=port` and without the `LAMEDUCK_*` of the environment, and from then on forwards signals to it and reaps.
    ///
    /// Output is inherited. Input is too, except from a terminal: the app then reads end of file, as in
    /// a container, because the kernel would stop a background process group that reads its terminal.
    ///
    /// # Errors
    ///
    /// When the port is taken or the command can't be run. Nothing has been started then.
    pub async fn start(argv: &[impl AsRef<OsStr>], port: u16) -> Result<Self, StartError> {
        if let Some(addr) = answering(port).await {
            return Err(StartError::PortTaken(addr));
        }
        // Before the app starts, so that no signal falls between.
        let child_exits = unix::signal(SignalKind::child()).map_err(StartError::Signals)?;
        let forwarded: Vec<_> = FORWARDED
            .into_iter()
            .map(|signal| Ok((signal, unix::signal(SignalKind::from_raw(signal.as_raw()))?)))
            .collect::<io::Result<_>>()
            .map_err(StartError::Signals)?;
        // Where this is forbidden, init reaps what a wrapper leaves behind.
        let _ = process::set_child_subreaper(Some(process::getpid()));

        let main = spawn(argv, port)?;
        let (sender, exit) = watch::channel(None);
        tokio::spawn(reap(main, child_exits, sender));
        let app = Self { main, port, exit };
        for (signal, mut arrivals) in forwarded {
            let app = app.clone();
            tokio::spawn(async move {
                while arrivals.recv().await.is_some() {
                    app.signal(signal);
                }
            });
        }
        Ok(app)
    }

    /// The id of the process that was started, which is also the id of its process group.
    pub fn pid(&self) -> u32 {
        self.main.as_raw_nonzero().get().unsigned_abs()
    }

    /// The port that the app was given in `PORT`.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Waits until the app accepts a connection, and returns the loopback address on which it did.
    ///
    /// # Errors
    ///
    /// When the app exits first, or doesn't listen `within` this time; it then still runs: `terminate` it.
    pub async fn wait_listening(&self, within: Duration) -> Result<SocketAddr, StartError> {
        let answer = async {
            let mut pause = Duration::from_millis(5);
            loop {
                if let Some(addr) = answering(self.port).await {
                    return addr;
                }
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(50));
            }
        };
        tokio::select! {
            biased;
            code = self.exited() => Err(StartError::Exited { code, port: self.port }),
            addr = timeout(within, answer) => addr.map_err(|_| StartError::NotListening {
                port: self.port,
                within,
                listens: listening(self.main),
            }),
        }
    }

    /// Waits until the process that was started has exited, for whatever reason, and returns its code as
    /// [`Exit`] does. Others of its group may still run: `terminate` ends them.
    pub async fn exited(&self) -> u8 {
        let code = self.exit.clone().wait_for(Option::is_some).await.ok().and_then(|code| *code);
        match code {
            Some(code) => code,
            // The reaper ends only with its runtime, and the process with that.
            None => std::future::pending().await,
        }
    }

    /// Sends a signal to every process of the app's group; to nobody when all of them have gone.
    pub fn signal(&self, signal: Signal) {
        let _ = process::kill_process_group(self.main, signal);
    }

    /// Sends SIGTERM to the app's whole group and waits until all of it has gone; what still runs after
    /// `reserve` is sent SIGKILL. May be dropped and called again with less time.
    pub async fn terminate(&self, reserve: Duration) -> Exit {
        self.signal(Signal::TERM);
        // A stopped process would handle its SIGTERM only when continued.
        self.signal(Signal::CONT);
        let killed = timeout(reserve, self.gone()).await.is_err();
        if killed {
            self.signal(Signal::KILL);
            let _ = timeout(AFTER_KILL, self.gone()).await;
        }
        let code = self.exit.borrow().unwrap_or(code_of_signal(Signal::KILL.as_raw()));
        Exit { code, killed }
    }

    /// Waits for the whole group: a wrapper may be gone long before the server that it started.
    async fn gone(&self) {
        self.exited().await;
        while process::test_kill_process_group(self.main) != Err(Errno::SRCH) {
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A port that nothing uses now. Taken on all addresses for a moment, because that is where most apps listen.
///
/// # Errors
///
/// When no port is free or no socket can be made.
pub fn free_port() -> io::Result<u16> {
    let any = [SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)), SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))];
    Ok(TcpListener::bind(&any[..])?.local_addr()?.port())
}

fn spawn(argv: &[impl AsRef<OsStr>], port: u16) -> Result<Pid, StartError> {
    let (program, args) = argv.split_first().ok_or(StartError::NotFound(OsString::new()))?;
    let mut command = Command::new(program);
    command.args(args).env("PORT", port.to_string()).process_group(0);
    // Settings of the proxy are none of the app's business, least of all the token.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"LAMEDUCK_"))
    {
        command.env_remove(name);
    }
    if io::stdin().is_terminal() {
        command.stdin(Stdio::null());
    }
    let child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => StartError::NotFound(program.into()),
        _ => StartError::NotExecutable(program.into(), error),
    })?;
    Ok(Pid::from_child(&child))
}

/// The only reaper of this process: the app's own exit is published, orphans are just taken away.
async fn reap(main: Pid, mut child_exits: unix::Signal, exit: watch::Sender<Option<u8>>) {
    loop {
        while let Ok(Some((pid, status))) = process::wait(WaitOptions::NOHANG) {
            // Only the first: an orphan may get the same pid later.
            if pid == main && exit.borrow().is_none() {
                exit.send_replace(Some(code_of(status)));
            }
        }
        if child_exits.recv().await.is_none() {
            return;
        }
    }
}

/// As a shell has it: the exit status, or 128 + the signal.
fn code_of(status: WaitStatus) -> u8 {
    match status.exit_status() {
        Some(code) => code.to_le_bytes()[0],
        None => code_of_signal(status.terminating_signal().unwrap_or_default()),
    }
}

fn code_of_signal(signal: i32) -> u8 {
    128 + signal.to_le_bytes()[0]
}

/// The loopback address on which something accepts connections. Node may have taken `localhost` as ::1.
async fn answering(port: u16) -> Option<SocketAddr> {
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        let addr = SocketAddr::new(ip, port);
        // A connect whose own port happens to be the wanted one reaches itself, with nobody listening.
        if let Ok(Ok(stream)) = timeout(CONNECT_TIMEOUT, TcpStream::connect(addr)).await
            && stream.local_addr().is_ok_and(|own| own != addr)
        {
            return Some(addr);
        }
    }
    None
}

/// Where the processes of a group listen, as far as `/proc` may be read.
fn listening(group: Pid) -> Vec<SocketAddr> {
    let sockets = listening_sockets();
    let mut found: Vec<_> = group_members(group)
        .filter_map(|pid| std::fs::read_dir(format!("/proc/{pid}/fd")).ok())
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|link| sockets.get(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?).copied())
        .collect();
    found.sort_unstable_by_key(|addr| (addr.port(), addr.ip()));
    found.dedup();
    found
}

/// Process ids, out of the fifth field of `/proc/<pid>/stat`.
fn group_members(group: Pid) -> impl Iterator<Item = u32> {
    let group = group.as_raw_nonzero().to_string();
    let processes = std::fs::read_dir("/proc").into_iter().flatten();
    processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter(move |pid| {
        // The second field, the name, may hold spaces and brackets: count from its end.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| rest.split_whitespace().nth(2) == Some(&group))
    })
}

/// Inode → address of every listening TCP socket, from lines like
/// `0: 0100007F:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4711 …`.
fn listening_sockets() -> HashMap<String, SocketAddr> {
    const LISTEN: &str = "0A";
    let mut sockets = HashMap::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let lines = std::fs::read_to_string(table).unwrap_or_default();
        for line in lines.lines() {
            let fields: Vec<_> = line.split_whitespace().collect();
            if let [_, local, _, LISTEN, _, _, _, _, _, inode, ..] = fields[..]
                && let Some(addr) = parse_kernel_addr(local)
            {
                sockets.insert(inode.to_owned(), addr);
            }
        }
    }
    sockets
}

/// The kernel prints an address as 32-bit words in the machine's byte order, in hex.
fn parse_kernel_addr(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(ip.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    let ip = if ip.len() == 8 {
        IpAddr::from(word(0)?)
    } else {
        let words = [word(0)?, word(1)?, word(2)?, word(3)?];
        IpAddr::from(<[u8; 16]>::try_from(words.as_flattened()).ok()?)
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// Why there is no app to proxy to. The text says what to do about it.
#[derive(Debug)]
pub enum StartError {
    /// No signal could be listened for.
    Signals(io::Error),
    /// Something answers on the app's port before the app was started.
    PortTaken(SocketAddr),
    /// There is no such command.
    NotFound(OsString),
    /// The command is there but can't be run.
    NotExecutable(OsString, io::Error),
    /// The app exited before it listened.
    Exited {
        /// As in [`Exit`].
        code: u8,
        /// What it was given in `PORT`.
        port: u16,
    },
    /// The app runs, but doesn't listen where it should.
    NotListening {
        /// What it was given in `PORT`.
        port: u16,
        /// `--start-timeout`.
        within: Duration,
        /// Where the processes of its group listen instead.
        listens: Vec<SocketAddr>,
    },
}

impl StartError {
    /// What `lameduck run` exits with: 127 and 126 as a shell does for a command not found and one that can't
    /// be run, the app's own code when it exited by itself, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound(_) => 127,
            Self::NotExecutable(..) => 126,
            Self::Exited { code, .. } => *code,
            Self::Signals(_) | Self::PortTaken(_) | Self::NotListening { .. } => 1,
        }
    }
}

impl std::error::Error for StartError {}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signals(error) => write!(f, "can't listen for signals: {error}"),
            Self::PortTaken(addr) => write!(
                f,
                "something listens on {addr}, the app's port, already: stop it, or give the app another port"
            ),
            Self::NotFound(program) if is_existing_path(program) => write!(
                f,
                "{} is there, but what should run it is not: check its first line (#!), or whether it was built \
                 for another libc",
                program.display()
            ),
            Self::NotFound(program) => {
                write!(f, "{}: command not found: check its spelling and PATH", program.display())
            }
            Self::NotExecutable(program, error) => write!(
                f,
                "{} can't be run: {error}; check its mode (chmod +x), its first line (#!) and that it was built \
                 for this machine",
                program.display()
            ),
            Self::Exited { code, port } => write!(
                f,
                "the app exited with code {code} before it listened on port {port}: its own output says why"
            ),
            Self::NotListening { port, within, listens } => {
                let within = humantime::format_duration(*within);
                write!(f, "the app does not listen on port {port}, its PORT, after {within}: ")?;
                write_advice(f, *port, listens)
            }
        }
    }
}

/// Whether it was named by its path, and is a file: then "not found" is not about the file itself.
fn is_existing_path(program: &OsStr) -> bool {
    program.as_encoded_bytes().contains(&b'/') && Path::new(program).is_file()
}

fn write_advice(f: &mut fmt::Formatter<'_>, port: u16, listens: &[SocketAddr]) -> fmt::Result {
    if let Some(addr) = listens.iter().find(|addr| addr.port() == port) {
        return write!(f, "it listens on {addr} only: make it listen on 127.0.0.1 or on all addresses");
    }
    let mut ports: Vec<_> = listens.iter().map(|addr| addr.port().to_string()).collect();
    ports.dedup();
    match &ports[..] {
        [] => write!(f, "it listens nowhere; if it is only slow to start, raise --start-timeout"),
        [one] => write!(f, "it listens on {one} instead: start lameduck with --app-port {one}"),
        [several @ .., last] => write!(
            f,
            "it listens on {} and {last} instead: start lameduck with --app-port and the one that serves",
            several.join(", ")
        ),
    }
}
