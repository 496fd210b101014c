//! The child side of `lameduck run`: start the app, wait until it listens, pass signals on, reap zombies, stop it.
//!
//! The app runs in a process group of its own, so that Ctrl-C reaches only the proxy, which drains first; it gets the
//! terminal once it wants it (`terminal.rs`). The proxy becomes a child subreaper: what a wrapper (`npm start`,
//! `sh -c …`) leaves behind becomes its child, as everything does for PID 1. [`App`] reaps every child there is, so a
//! process may have only one, and nothing else in it may wait for children (`Child::wait`, `tokio::process`).

mod error;
mod processes;
mod spawn;
mod terminal;

use std::ffi::{OsStr, OsString};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{self, Pid, Signal, WaitOptions, WaitStatus};
use tokio::net::TcpStream;
use tokio::signal::unix::{self, SignalKind};
use tokio::sync::watch;
use tokio::time::{Instant, interval_at, sleep, timeout};

pub use self::error::StartError;
use self::terminal::Terminal;

/// A connect to loopback is answered at once, unless the app's accept queue is full.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(250);

/// An app that boots may open another port first. After this time it is told of one.
const LISTENS_ELSEWHERE: Duration = Duration::from_secs(3);

/// What a wrapper may do once the app that it wraps has ended on its SIGTERM.
const WRAPPER_ENDS: Duration = Duration::from_secs(2);

/// SIGKILL works at once, except on a process stuck in the kernel. Nothing more can be done about that one.
const AFTER_KILL: Duration = Duration::from_secs(1);

/// A running app. A clone is another handle on the same app.
#[derive(Clone, Debug)]
pub struct App {
    shared: Arc<Shared>,
    exit: watch::Receiver<Option<u8>>,
}

#[derive(Debug)]
struct Shared {
    started: Mutex<Started>,
    exit: watch::Sender<Option<u8>>,
    terminal: Option<Terminal>,
}

#[derive(Clone, Copy, Debug)]
struct Started {
    /// The process that was started, and the process group that it leads.
    main: Pid,
    port: u16,
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
    /// Starts `argv` with `PORT=port` and without the `LAMEDUCK_*` of the environment, and from then on reaps. The app
    /// is killed when this thread ends: it must be one that lasts as long as the process.
    ///
    /// # Errors
    ///
    /// When the port is taken or the command can't be run. Nothing has been started then.
    pub async fn start(argv: &[impl AsRef<OsStr>], port: u16) -> Result<Self, StartError> {
        if let Some(addr) = answering(port).await {
            return Err(StartError::PortTaken(addr));
        }
        // Before the app starts, so that no signal falls between.
        let signals = [SignalKind::child(), SignalKind::from_raw(Signal::CONT.as_raw())].map(unix::signal);
        let [child_exits, continued] = signals.map(|signal| signal.map_err(StartError::Signals));
        // Where this is forbidden, init reaps what a wrapper leaves behind.
        let _ = process::set_child_subreaper(Some(process::getpid()));

        let terminal = Terminal::of_stdin();
        let started = Mutex::new(Started { main: spawn(argv, port)?, port });
        let (sender, exit) = watch::channel(None);
        let shared = Arc::new(Shared { started, exit: sender, terminal });
        tokio::spawn(shared.clone().reap(child_exits?, continued?));
        Ok(Self { shared, exit })
    }

    /// Starts the command again, on another port, after it has ended.
    ///
    /// # Errors
    ///
    /// As [`App::start`].
    pub async fn start_again(&self, argv: &[impl AsRef<OsStr>], port: u16) -> Result<(), StartError> {
        if let Some(addr) = answering(port).await {
            return Err(StartError::PortTaken(addr));
        }
        // The reaper may run on another thread: it must not see an exit before it knows whose.
        let mut started = self.shared.started();
        *started = Started { main: spawn(argv, port)?, port };
        self.shared.exit.send_replace(None);
        Ok(())
    }

    /// The id of the process that was started, which is also the id of its process group.
    pub fn pid(&self) -> u32 {
        self.main().as_raw_nonzero().get().unsigned_abs()
    }

    /// The port that the app was given in `PORT`.
    pub fn port(&self) -> u16 {
        self.shared.started().port
    }

    fn main(&self) -> Pid {
        self.shared.started().main
    }

    /// Waits until the app accepts a connection, and returns the loopback address on which it did. An app that only
    /// listens elsewhere is told of in the log before long.
    ///
    /// # Errors
    ///
    /// When the app exits first, or doesn't listen `within` this time; it then still runs: `terminate` it.
    pub async fn wait_listening(&self, within: Duration) -> Result<SocketAddr, StartError> {
        let (port, began) = (self.port(), Instant::now());
        let not_listening = |within, listens| StartError::NotListening { port, within, listens };
        let answer = async {
            let (mut pause, mut answers_since) = (Duration::from_millis(5), None);
            loop {
                // A server that went its own ways can't be told from somebody else's: so it is believed in the end.
                if let Some(addr) = answering(port).await {
                    let since = *answers_since.get_or_insert_with(Instant::now);
                    if !processes::is_strangers(port) || since.elapsed() > LISTENS_ELSEWHERE {
                        return addr;
                    }
                } else {
                    answers_since = None;
                }
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(50));
            }
        };
        let elsewhere = async {
            let mut looks = interval_at(began + LISTENS_ELSEWHERE, Duration::from_secs(1));
            loop {
                looks.tick().await;
                let listens = processes::listening();
                if !listens.is_empty() {
                    tracing::warn!("{}", not_listening(LISTENS_ELSEWHERE, listens));
                    return std::future::pending().await;
                }
            }
        };
        tokio::select! {
            biased;
            code = self.exited() => Err(StartError::Exited { code, port }),
            addr = timeout(within, answer) => addr.map_err(|_| not_listening(within, processes::listening())),
            never = elsewhere => never,
        }
    }

    /// Whether the process that was started has exited.
    pub fn has_exited(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Whether something takes connections on the app's port.
    pub async fn listens(&self) -> bool {
        answering(self.port()).await.is_some()
    }

    /// Whether somebody else takes connections on the app's port. A server that the app has left behind is not.
    pub async fn lost_its_port(&self) -> bool {
        self.listens().await && processes::is_strangers(self.port())
    }

    /// Whether Ctrl-C in the terminal is the app's.
    pub fn has_terminal(&self) -> bool {
        self.shared.terminal.as_ref().is_some_and(Terminal::is_wanted)
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

    /// Sends a signal to who would get it without us: the main process. Where that is a wrapper that would not pass
    /// it on, to what it wraps.
    pub fn signal(&self, signal: Signal) {
        if !self.has_exited() {
            for pid in processes::recipients(self.main(), self.port(), signal) {
                let _ = process::kill_process(pid, signal);
            }
        }
    }

    /// Asks the app to end and waits until all of it has gone; what still runs after `reserve` is sent SIGKILL.
    ///
    /// SIGTERM goes to whom [`App::signal`] finds first. The others of its group are sent theirs once the main process
    /// has gone, or when time runs out: until then it may wait for its children's work. Where we were `asked` by Ctrl-C
    /// in our terminal it is SIGINT at first; also SIGQUIT where that asked, if there is a handler for it. May be dropped
    /// and called again with less time.
    pub async fn terminate(&self, asked: Signal, reserve: Duration) -> Exit {
        let mut told = Vec::new();
        if !self.has_exited() {
            for pid in processes::recipients(self.main(), self.port(), Signal::TERM) {
                told.push((pid, self.first_of(pid, asked)));
            }
        }
        told.iter().for_each(|(pid, signal)| ask(*pid, *signal));
        let gone = async {
            tokio::select! {
                _ = self.exited() => {}
                () = self.outlives(&told) => {}
                () = sleep(reserve * 3 / 4) => {}
            }
            let rest = processes::members(self.main()).into_iter();
            rest.filter(|pid| !told.contains(&(*pid, Signal::TERM))).for_each(|pid| ask(pid, Signal::TERM));
            self.gone().await;
        };
        let killed = timeout(reserve, gone).await.is_err();
        if killed {
            let _ = process::kill_process_group(self.main(), Signal::KILL);
            let _ = timeout(AFTER_KILL, self.gone()).await;
        }
        let code = self.exit.borrow().unwrap_or(code_of_signal(Signal::KILL.as_raw()));
        Exit { code, killed }
    }

    /// What asks this process to end first. Node catches SIGINT and SIGTERM itself, so they don't tell what it handles.
    fn first_of(&self, pid: Pid, asked: Signal) -> Signal {
        match asked {
            Signal::INT if self.shared.terminal.is_some() => asked,
            Signal::QUIT if processes::catches(pid, asked) => asked,
            _ => Signal::TERM,
        }
    }

    /// Waits until all of these have gone and the main process had its time to end by that.
    async fn outlives(&self, told: &[(Pid, Signal)]) {
        while told.iter().any(|(pid, _)| process::test_kill_process(*pid).is_ok()) {
            sleep(Duration::from_millis(10)).await;
        }
        sleep(WRAPPER_ENDS).await;
    }

    /// Waits for the whole group: a wrapper may be gone long before the server that it started.
    async fn gone(&self) {
        self.exited().await;
        while process::test_kill_process_group(self.main()) != Err(Errno::SRCH) {
            sleep(Duration::from_millis(10)).await;
        }
    }
}

fn ask(pid: Pid, signal: Signal) {
    let _ = process::kill_process(pid, signal);
    // A stopped process would handle it only when continued.
    let _ = process::kill_process(pid, Signal::CONT);
}

impl Shared {
    fn started(&self) -> MutexGuard<'_, Started> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The only reaper of this process: the app's own exit is published, orphans are just taken away. A job that stops
    /// and goes on stops and goes on as a whole.
    async fn reap(self: Arc<Self>, mut children: unix::Signal, mut continued: unix::Signal) {
        loop {
            while let Ok(Some((pid, status))) = process::wait(WaitOptions::NOHANG | WaitOptions::UNTRACED) {
                let main = self.started().main;
                // Only the first exit: an orphan may get the same pid later.
                if pid == main && self.exit.borrow().is_none() {
                    self.changed(main, status);
                }
            }
            tokio::select! {
                come = children.recv() => if come.is_none() { return },
                come = continued.recv() => match &self.terminal {
                    Some(terminal) if come.is_some() => terminal.continued(self.started().main),
                    _ => {}
                },
            }
        }
    }

    fn changed(&self, main: Pid, status: WaitStatus) {
        let stopped_by = status.stopping_signal().and_then(Signal::from_named_raw);
        if let Some(terminal) = &self.terminal {
            match stopped_by {
                Some(signal) => terminal.stopped(main, signal),
                None => terminal.take_back(main),
            }
        }
        if !status.stopped() {
            self.exit.send_replace(Some(code_of(status)));
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(terminal) = &self.terminal {
            terminal.take_back(self.started().main);
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
    let program = program.as_ref();
    let mut command = Command::new(program);
    command.args(args).env("PORT", port.to_string()).process_group(0);
    // Settings of the proxy are none of the app's business, least of all the token.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"LAMEDUCK_"))
    {
        command.env_remove(name);
    }
    let child = spawn::with_our_life(&mut command).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => StartError::NotFound(program.into()),
        _ => StartError::NotExecutable(program.into(), error),
    })?;
    Ok(Pid::from_child(&child))
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
