//! The app's process under `lameduck run`: start it, wait until it listens, forward signals, reap zombies, stop it.
//!
//! The app runs in its own process group, so that Ctrl-C reaches only the proxy, which drains first; the app gets the
//! terminal when it needs it (`terminal.rs`). The proxy becomes a child subreaper: processes that a wrapper (`npm
//! start`, `sh -c …`) leaves behind become its children, as they would for PID 1. [`App`] reaps every child, so a
//! process may have only one `App`, and nothing else in it may wait for children (`Child::wait`, `tokio::process`).

mod error;
mod preload;
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
pub use self::preload::Preload;
pub use self::processes::{Sockets, sockets};
use self::terminal::Terminal;

/// The loader's variable (ld.so(8)).
const LD_PRELOAD: &str = "LD_PRELOAD";

/// Time limit for a connect to the app. Loopback answers at once unless the app's accept queue is full.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(250);

/// Time after which we warn that the app listens on another port: a booting app may open another port first.
const LISTENS_ELSEWHERE_TIMEOUT: Duration = Duration::from_secs(3);

/// Time that a wrapper has to exit after the app that it wraps has exited on SIGTERM.
const WRAPPER_TIMEOUT: Duration = Duration::from_secs(2);

/// Time to wait after SIGKILL. It works at once, except on a process stuck in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);

/// A running app. Clones are handles on the same app.
#[derive(Clone, Debug)]
pub struct App {
    supervised: Arc<Supervised>,
    exit: watch::Receiver<Option<u8>>,
}

#[derive(Debug)]
struct Supervised {
    started: Mutex<Started>,
    exit: watch::Sender<Option<u8>>,
    terminal: Option<Terminal>,
}

#[derive(Clone, Copy, Debug)]
struct Started {
    /// The process that was started; it leads the app's process group.
    main: Pid,
    /// Its `PORT`, if we chose it.
    port: Option<u16>,
    /// Where it listens, if that is known and not on its `PORT`.
    at: Option<SocketAddr>,
}

/// How the app is started.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The program and its arguments.
    pub argv: &'a [OsString],
    /// Its `PORT`; `None` leaves the variable as it is.
    pub port: Option<u16>,
    /// A shared object to load into it, after those that `LD_PRELOAD` names already.
    pub preload: Option<&'a Preload>,
}

/// Result of [`App::terminate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code of the process that was started, or 128 + the number of the signal that ended it.
    pub code: u8,
    /// Whether a process of the app outlived its SIGTERM and was sent SIGKILL.
    pub killed: bool,
}

impl App {
    /// Starts `argv` with `PORT=port`, as [`App::launch`] does.
    ///
    /// # Errors
    ///
    /// As [`App::launch`].
    pub async fn start(argv: &[impl AsRef<OsStr>], port: u16) -> Result<Self, StartError> {
        let argv: Vec<_> = argv.iter().map(|arg| arg.as_ref().to_owned()).collect();
        Self::launch(Launch { argv: &argv, port: Some(port), preload: None }).await
    }

    /// Starts the app without the `LAMEDUCK_*` variables, and begins to reap. The app is killed when the calling thread
    /// ends, so that thread must last as long as the process.
    ///
    /// # Errors
    ///
    /// The port is taken or the command can't be run. Nothing has been started then.
    pub async fn launch(launch: Launch<'_>) -> Result<Self, StartError> {
        is_free(launch.port).await?;
        // Handlers are installed before the app starts, so that no signal is lost.
        let signals = [SignalKind::child(), SignalKind::from_raw(Signal::CONT.as_raw())].map(unix::signal);
        let [child_exits, continued] = signals.map(|signal| signal.map_err(StartError::Signals));
        // Where this is forbidden, init reaps the processes that a wrapper leaves behind.
        let _ = process::set_child_subreaper(Some(process::getpid()));

        let terminal = Terminal::of_stdin();
        let started = Mutex::new(spawn(launch)?);
        let (sender, exit) = watch::channel(None);
        let supervised = Arc::new(Supervised { started, exit: sender, terminal });
        tokio::spawn(supervised.clone().reap(child_exits?, continued?));
        Ok(Self { supervised, exit })
    }

    /// Starts it again on another port, after it has exited.
    ///
    /// # Errors
    ///
    /// As [`App::launch`].
    pub async fn launch_again(&self, launch: Launch<'_>) -> Result<(), StartError> {
        is_free(launch.port).await?;
        // The reaper may run on another thread: it must not see an exit before it knows the new pid.
        let mut started = self.supervised.started();
        *started = spawn(launch)?;
        self.supervised.exit.send_replace(None);
        Ok(())
    }

    /// Id of the process that was started, and of its process group.
    pub fn pid(&self) -> u32 {
        self.main().as_raw_nonzero().get().unsigned_abs()
    }

    /// Port on which the app was found, else the one that it got in `PORT`, else 0.
    pub fn port(&self) -> u16 {
        let started = *self.supervised.started();
        started.at.map(|at| at.port()).or(started.port).unwrap_or(0)
    }

    fn given_port(&self) -> Option<u16> {
        self.supervised.started().port
    }

    /// Notes where the app listens.
    pub fn listens_at(&self, addr: SocketAddr) {
        let mut started = self.supervised.started();
        started.at = (started.port != Some(addr.port())).then_some(addr);
    }

    fn main(&self) -> Pid {
        self.supervised.started().main
    }

    /// Waits until the app accepts a connection on its `PORT`; returns the loopback address. Logs a warning if the app
    /// listens elsewhere instead.
    ///
    /// # Errors
    ///
    /// The app exits first, or doesn't listen `within` this time. In the latter case it still runs: `terminate` it.
    pub async fn wait_listening(&self, within: Duration) -> Result<SocketAddr, StartError> {
        self.wait_or_warn(within, self.listens_elsewhere(), || false).await
    }

    /// Waits until the app accepts a connection on the `PORT` that we chose, or is `found` elsewhere; returns the address.
    /// Once it `is_elsewhere`, a foreign process on its `PORT` is not taken for the app.
    ///
    /// # Errors
    ///
    /// As [`App::wait_listening`].
    pub async fn wait_found(
        &self,
        within: Duration,
        found: impl Future<Output = SocketAddr>,
        is_elsewhere: impl Fn() -> bool,
    ) -> Result<SocketAddr, StartError> {
        self.wait_or_warn(within, found, is_elsewhere).await
    }

    async fn wait_or_warn(
        &self,
        within: Duration,
        elsewhere: impl Future<Output = SocketAddr>,
        is_elsewhere: impl Fn() -> bool,
    ) -> Result<SocketAddr, StartError> {
        let port = self.given_port();
        let answer = async {
            tokio::select! {
                addr = self.answers_on_its_port(is_elsewhere) => addr,
                addr = elsewhere => addr,
            }
        };
        tokio::select! {
            biased;
            code = self.exited() => Err(StartError::Exited { code, port }),
            addr = timeout(within, answer) => {
                addr.map_err(|_| StartError::NotListening { port, within, listens: processes::listening() })
            }
        }
    }

    async fn answers_on_its_port(&self, is_elsewhere: impl Fn() -> bool) -> SocketAddr {
        let Some(port) = self.given_port() else { return std::future::pending().await };
        let (mut pause, mut answers_since) = (Duration::from_millis(5), None);
        loop {
            // A server that left the app's process tree looks like a foreign one, so it is accepted after a while.
            if let Some(addr) = answering(port).await {
                let since = *answers_since.get_or_insert_with(Instant::now);
                let left = || since.elapsed() > LISTENS_ELSEWHERE_TIMEOUT && !is_elsewhere();
                if !processes::is_strangers(port) || left() {
                    return addr;
                }
            } else {
                answers_since = None;
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// Warns if the app listens on other ports than its own; never returns.
    async fn listens_elsewhere(&self) -> SocketAddr {
        let port = self.given_port();
        let mut looks = interval_at(Instant::now() + LISTENS_ELSEWHERE_TIMEOUT, Duration::from_secs(1));
        let mut just_began = true;
        loop {
            looks.tick().await;
            let listens = processes::listening();
            // A listener on its port may have opened this moment: the next connection attempt finds it.
            let expected = listens.iter().any(|addr| Some(addr.port()) == port);
            if expected && std::mem::take(&mut just_began) {
                continue;
            }
            if !listens.is_empty() {
                let within = LISTENS_ELSEWHERE_TIMEOUT;
                tracing::warn!("{}", StartError::NotListening { port, within, listens });
                return std::future::pending().await;
            }
        }
    }

    /// Whether the process that was started has exited.
    pub fn has_exited(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Whether a process accepts connections where the app listens.
    pub async fn listens(&self) -> bool {
        let Started { port, at, .. } = *self.supervised.started();
        match at {
            Some(at) if !at.ip().is_unspecified() => connects(at).await,
            _ => match at.map(|at| at.port()).or(port) {
                Some(port) => answering(port).await.is_some(),
                None => false,
            },
        }
    }

    /// Whether another program has the `PORT` that we chose for the app: it listens there, or it is connected from there,
    /// as the kernel may choose this port for any connection. A server that the app left behind is not another program.
    pub async fn lost_its_port(&self) -> bool {
        let Some(port) = self.given_port() else { return false };
        match answering(port).await {
            Some(_) => processes::is_strangers(port),
            None => is_bound(port) && !processes::listening().iter().any(|addr| addr.port() == port),
        }
    }

    /// Whether Ctrl-C in the terminal goes to the app.
    pub fn has_terminal(&self) -> bool {
        self.supervised.terminal.as_ref().is_some_and(Terminal::is_wanted)
    }

    /// Waits until the process that was started has exited; returns its code as in [`Exit`]. Other processes of its
    /// group may still run: `terminate` ends them.
    pub async fn exited(&self) -> u8 {
        let code = self.exit.clone().wait_for(Option::is_some).await.ok().and_then(|code| *code);
        match code {
            Some(code) => code,
            // The reaper ends only with its runtime, and so with the process.
            None => std::future::pending().await,
        }
    }

    /// Sends a signal to the process that would get it without us: the main process, or, if that is a wrapper that
    /// doesn't forward it, the processes that it wraps.
    pub fn signal(&self, signal: Signal) {
        if !self.has_exited() {
            for pid in processes::recipients(self.main(), self.port(), signal) {
                let _ = process::kill_process(pid, signal);
            }
        }
    }

    /// Asks the app to end and waits until all of its processes have exited. After `reserve`, the rest are sent
    /// SIGKILL.
    ///
    /// SIGTERM goes first to the processes that [`App::signal`] would choose. The others of the group get it once the
    /// main process has exited or three quarters of `reserve` have passed: until then the main process may be waiting
    /// for their work. If `asked` is a Ctrl-C in our terminal, the first signal is SIGINT; if it is SIGQUIT and the app
    /// handles that, SIGQUIT. The future may be dropped and the call repeated with less time.
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
            let _ = timeout(KILL_TIMEOUT, self.gone()).await;
        }
        let code = self.exit.borrow().unwrap_or(code_of_signal(Signal::KILL.as_raw()));
        Exit { code, killed }
    }

    /// First signal for this process. Node handles SIGINT and SIGTERM itself, so a handler says nothing about the app's
    /// code.
    fn first_of(&self, pid: Pid, asked: Signal) -> Signal {
        match asked {
            Signal::INT if self.supervised.terminal.is_some() => asked,
            Signal::QUIT if processes::catches(pid, asked) => asked,
            _ => Signal::TERM,
        }
    }

    /// Waits until all of these have exited, and then gives the main process time to do so.
    async fn outlives(&self, told: &[(Pid, Signal)]) {
        while told.iter().any(|(pid, _)| process::test_kill_process(*pid).is_ok()) {
            sleep(Duration::from_millis(10)).await;
        }
        sleep(WRAPPER_TIMEOUT).await;
    }

    /// Waits for the whole group: a wrapper may exit long before the server that it started.
    async fn gone(&self) {
        self.exited().await;
        while process::test_kill_process_group(self.main()) != Err(Errno::SRCH) {
            sleep(Duration::from_millis(10)).await;
        }
    }
}

fn ask(pid: Pid, signal: Signal) {
    let _ = process::kill_process(pid, signal);
    // A stopped process handles a signal only after it is continued.
    let _ = process::kill_process(pid, Signal::CONT);
}

impl Supervised {
    fn started(&self) -> MutexGuard<'_, Started> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The only reaper of this process: publishes the exit of the app, and discards orphans. When a job is stopped or
    /// continued, all of it is.
    async fn reap(self: Arc<Self>, mut children: unix::Signal, mut continued: unix::Signal) {
        loop {
            while let Ok(Some((pid, status))) = process::wait(WaitOptions::NOHANG | WaitOptions::UNTRACED) {
                let main = self.started().main;
                // Only the first exit counts: an orphan may get the same pid later.
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

impl Drop for Supervised {
    fn drop(&mut self) {
        if let Some(terminal) = &self.terminal {
            terminal.take_back(self.started().main);
        }
    }
}

/// Returns a free port. It is bound on all addresses for a moment, since most apps listen on all of them.
///
/// # Errors
///
/// No port is free or no socket can be created.
pub fn free_port() -> io::Result<u16> {
    let any = [SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)), SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))];
    Ok(TcpListener::bind(&any[..])?.local_addr()?.port())
}

/// Whether a socket has this port on any address, listening or connected.
fn is_bound(port: u16) -> bool {
    let any = [IpAddr::from(Ipv6Addr::UNSPECIFIED), Ipv4Addr::UNSPECIFIED.into()];
    let in_use = |error: io::Error| error.kind() == io::ErrorKind::AddrInUse;
    any.iter().any(|ip| TcpListener::bind((*ip, port)).is_err_and(in_use))
}

async fn is_free(port: Option<u16>) -> Result<(), StartError> {
    let Some(port) = port else { return Ok(()) };
    answering(port).await.map_or(Ok(()), |addr| Err(StartError::PortTaken(addr)))
}

fn spawn(Launch { argv, port, preload }: Launch<'_>) -> Result<Started, StartError> {
    let (program, args) = argv.split_first().ok_or(StartError::NotFound(OsString::new()))?;
    let mut command = Command::new(program);
    command.args(args).process_group(0);
    if let Some(port) = port {
        command.env("PORT", port.to_string());
    }
    if let Some(preload) = preload {
        let mut all = std::env::var_os(LD_PRELOAD).filter(|set| !set.is_empty()).unwrap_or_default();
        if !all.is_empty() {
            all.push(":");
        }
        // Whatever else stands in for `bind` passes its call on to what comes after it.
        all.push(preload.path());
        command.env(LD_PRELOAD, all);
    }
    // The app must not see the proxy's settings, above all not the token.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"LAMEDUCK_"))
    {
        command.env_remove(name);
    }
    let child = spawn::with_our_life(&mut command).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => StartError::NotFound(program.into()),
        _ => StartError::NotExecutable(program.into(), error),
    })?;
    Ok(Started { main: Pid::from_child(&child), port, at: None })
}

/// Exit code as in a shell: the exit status, or 128 + the signal.
fn code_of(status: WaitStatus) -> u8 {
    match status.exit_status() {
        Some(code) => code.to_le_bytes()[0],
        None => code_of_signal(status.terminating_signal().unwrap_or_default()),
    }
}

fn code_of_signal(signal: i32) -> u8 {
    128 + signal.to_le_bytes()[0]
}

/// Loopback address that accepts connections. Node may resolve `localhost` to ::1.
async fn answering(port: u16) -> Option<SocketAddr> {
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        let addr = SocketAddr::new(ip, port);
        if connects(addr).await {
            return Some(addr);
        }
    }
    None
}

async fn connects(addr: SocketAddr) -> bool {
    // A connect whose ephemeral port equals the target connects to itself, with no listener.
    match timeout(CONNECT_TIMEOUT, TcpStream::connect(addr)).await {
        Ok(Ok(stream)) => stream.local_addr().is_ok_and(|own| own != addr),
        _ => false,
    }
}
