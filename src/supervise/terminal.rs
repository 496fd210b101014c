//! The terminal that `run` was started from. Ctrl-C there is ours, so that it drains, until the app wants the terminal:
//! reads it, or sets its mode. Then the app has it as it would without us, Ctrl-C included.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{self, Pid, Signal};
use rustix::termios;

use super::spawn;

/// Our terminal, which the app's process group has when it needs it.
#[derive(Debug)]
pub struct Terminal {
    /// The app wanted it, so it gets it whenever we have it.
    wanted: AtomicBool,
}

impl Terminal {
    /// Stdin, if that is the terminal which controls this process.
    pub fn of_stdin() -> Option<Self> {
        let controls = io::stdin().is_terminal() && termios::tcgetpgrp(io::stdin()).is_ok();
        controls.then(|| {
            spawn::ignore_sigttou();
            Self { wanted: AtomicBool::new(false) }
        })
    }

    /// Whether the app has it, or had.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// The app's group was stopped by this signal. If it only needs the terminal, it gets it and goes on. Else all of
    /// the job stops, ourselves too, as it would without us; the shell continues it.
    pub fn stopped(&self, app: Pid, by: Signal) {
        let needs = [Signal::TTIN, Signal::TTOU].contains(&by);
        if !needs && by != Signal::TSTP {
            // Somebody wants it to be stopped.
            return;
        }
        self.wanted.fetch_or(needs, Ordering::Relaxed);
        if needs && self.is_ours() {
            return self.continued(app);
        }
        self.take_back(app);
        let _ = process::kill_current_process_group(Signal::TSTP);
    }

    /// The shell has continued us, in the foreground or not.
    pub fn continued(&self, app: Pid) {
        if self.is_wanted() && self.is_ours() {
            let _ = termios::tcsetpgrp(io::stdin(), app);
        }
        let _ = process::kill_process_group(app, Signal::CONT);
    }

    /// We are in the foreground again, if the app was.
    pub fn take_back(&self, app: Pid) {
        if termios::tcgetpgrp(io::stdin()).is_ok_and(|foreground| foreground == app) {
            let _ = termios::tcsetpgrp(io::stdin(), process::getpgrp());
        }
    }

    fn is_ours(&self) -> bool {
        termios::tcgetpgrp(io::stdin()).is_ok_and(|foreground| foreground == process::getpgrp())
    }
}
