//! Signals → what is asked of this process.

use std::fs::{self, File};
use std::future::poll_fn;
use std::io;
use std::task::Poll;

use rustix::process::Signal;
use tokio::signal::unix::{self, SignalKind};

/// These ask to go. SIGQUIT is the stop signal of many images, and may be any pod's (`stopSignal`).
const ASKS: [(Signal, &str); 3] =
    [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT"), (Signal::QUIT, "SIGQUIT")];

/// These would end a process that doesn't care for them, or are for the app (SIGWINCH). SIGPIPE is ignored by Rust's
/// own start; what stops and continues a job does what it does for any program.
const OTHERS: [(Signal, &str); 9] = [
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

/// The signals that this process takes over. From the moment it is made none is lost, and none ends the process.
pub struct Signals {
    asks: Taken,
    others: Taken,
    /// There was a terminal that can hang up.
    terminal: bool,
    first: Option<Signal>,
}

/// Some signals, from when they were taken over.
pub struct Taken(Vec<(Signal, &'static str, unix::Signal)>);

impl Signals {
    /// Takes them over, all but a SIGHUP that is ignored already (nohup).
    ///
    /// # Errors
    /// When the kernel or the runtime refuses it.
    pub fn new() -> io::Result<Self> {
        let others = OTHERS.into_iter().filter(|(signal, _)| *signal != Signal::HUP || !ignores(Signal::HUP));
        Ok(Self {
            asks: Taken::over(ASKS)?,
            others: Taken::over(others)?,
            terminal: File::open("/dev/tty").is_ok(),
            first: None,
        })
    }

    /// Those that ask for nothing here: `run` passes them on. Where nobody takes them, they are ignored.
    pub fn others(&mut self) -> Taken {
        std::mem::replace(&mut self.others, Taken(Vec::new()))
    }

    /// The first that asked to go, if one has.
    pub fn first(&self) -> Option<Signal> {
        self.first
    }

    /// Waits for the next that asks to go; its name.
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
                // Whoever typed the command has gone.
                self.first.get_or_insert(Signal::TERM);
                return name;
            }
            tracing::info!(signal = name, "ignored a signal that asks for nothing here");
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

    /// Waits for the next of them, for ever if there are none; the signal and its name.
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

/// Whether whoever started this process had it ignore the signal; no where `/proc` doesn't say.
fn ignores(signal: Signal) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask =
        status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.unwrap_or(0) >> (signal.as_raw() - 1) & 1 == 1
}
