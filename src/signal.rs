//! Signal handling: which signals ask this process to end.

use std::fs::{self, File};
use std::future::poll_fn;
use std::io;
use std::task::Poll;

use rustix::process::Signal;
use tokio::signal::unix::{self, SignalKind};

/// Signals that ask the process to end. SIGQUIT is the stop signal of many images, and any pod may set it
/// (`stopSignal`).
const END_SIGNALS: [(Signal, &str); 3] =
    [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT"), (Signal::QUIT, "SIGQUIT")];

/// Signals that would end a process without a handler, or are meant for the app (SIGWINCH). Rust's runtime ignores
/// SIGPIPE; job control signals keep their default action.
const OTHER_SIGNALS: [(Signal, &str); 9] = [
    (Signal::HUP, "SIGHUP"),
    (Signal::USR1, "SIGUSR1"),
    (Signal::USR2, "SIGUSR2"),
    (Signal::WINCH, "SIGWINCH"),
    (Signal::ALARM, "SIGALRM"),
    (Signal::VTALARM, "SIGVTALRM"),
    (Signal::PROF, "SIGPROF"),
    (Signal::IO, "SIGIO"),
    (Signal::POWER, "SIGPWR"),
];

/// Handlers for the process's signals. From creation on no signal is lost, and none ends the process.
pub struct Signals {
    asks: Taken,
    others: Taken,
    /// There was a terminal that can hang up.
    terminal: bool,
    first: Option<Signal>,
}

/// Handlers for a set of signals.
pub struct Taken(Vec<(Signal, &'static str, unix::Signal)>);

impl Signals {
    /// Installs the handlers; a SIGHUP that is already ignored (nohup) stays ignored.
    ///
    /// # Errors
    /// The kernel or the runtime refuses a handler.
    pub fn new() -> io::Result<Self> {
        let others =
            OTHER_SIGNALS.into_iter().filter(|(signal, _)| *signal != Signal::HUP || !ignores(Signal::HUP));
        Ok(Self {
            asks: Taken::over(END_SIGNALS)?,
            others: Taken::over(others)?,
            terminal: File::open("/dev/tty").is_ok(),
            first: None,
        })
    }

    /// Handlers for the signals that don't ask to end: `run` forwards them. Other modes ignore them.
    pub fn others(&mut self) -> Taken {
        std::mem::replace(&mut self.others, Taken(Vec::new()))
    }

    /// The first signal that asked to end, if one came.
    pub fn first(&self) -> Option<Signal> {
        self.first
    }

    /// Waits for the next signal that asks to end; returns its name.
    pub async fn next(&mut self) -> &'static str {
        loop {
            let (signal, name) = tokio::select! {
                asked = self.asks.next() => {
                    self.first.get_or_insert(asked.0);
                    return asked.1;
                }
                other = self.others.next() => other,
            };
            if signal == Signal::HUP && self.terminal && File::open("/dev/tty").is_err() {
                // The terminal is gone, and so is the user.
                self.first.get_or_insert(Signal::TERM);
                return name;
            }
            tracing::info!(signal = name, "ignored a signal");
        }
    }
}

impl Taken {
    fn over(signals: impl IntoIterator<Item = (Signal, &'static str)>) -> io::Result<Self> {
        let take = |(signal, name): (Signal, _)| {
            Ok((signal, name, unix::signal(SignalKind::from_raw(signal.as_raw()))?))
        };
        signals.into_iter().map(take).collect::<io::Result<_>>().map(Self)
    }

    /// Waits for the next signal, forever if the set is empty; returns it with its name.
    pub async fn next(&mut self) -> (Signal, &'static str) {
        poll_fn(|cx| {
            let mut come = self.0.iter_mut().filter_map(|(signal, name, arrivals)| {
                arrivals.poll_recv(cx).is_ready().then_some((*signal, *name))
            });
            come.next().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// Whether this process was started with the signal ignored; false if `/proc` is not readable.
fn ignores(signal: Signal) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask =
        status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.unwrap_or(0) >> (signal.as_raw() - 1) & 1 == 1
}
