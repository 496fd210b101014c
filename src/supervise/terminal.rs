//! The terminal that `run` was started from. Ctrl-C goes to us and drains, until the app reads the terminal or sets its
//! mode. From then on the app has it as it would without us, Ctrl-C included.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{self, Pid, Signal};
use rustix::termios;

use super::spawn;

/// Our controlling terminal, which is handed to the app's process group on demand.
#[derive(Debug)]
pub struct Terminal {
    /// Whether the app has used it: then the app gets it whenever we have it.
    wanted: AtomicBool,
}

impl Terminal {
    /// Stdin, if that is our controlling terminal.
    pub fn of_stdin() -> Option<Self> {
        let controls = io::stdin().is_terminal() && termios::tcgetpgrp(io::stdin()).is_ok();
        controls.then(|| {
            spawn::ignore_sigttou();
            Self { wanted: AtomicBool::new(false) }
        })
    }

    /// Whether the app has used it.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// The app's group was stopped by this signal. If it only needs the terminal, it gets it and is continued.
    /// Otherwise the whole job stops, including us, as it would without us; the shell continues it.
    pub fn stopped(&self, app: Pid, by: Signal) {
        let needs = [Signal::TTIN, Signal::TTOU].contains(&by);
        if !needs && by != Signal::TSTP {
            // Another process stopped it on purpose.
            return;
        }
        self.wanted.fetch_or(needs, Ordering::Relaxed);
        if needs && self.is_ours() {
            return self.continued(app);
        }
        self.take_back(app);
        let _ = process::kill_current_process_group(Signal::TSTP);
    }

    /// The shell has continued us, in the foreground or in the background.
    pub fn continued(&self, app: Pid) {
        if self.is_wanted() && self.is_ours() {
            let _ = termios::tcsetpgrp(io::stdin(), app);
        }
        let _ = process::kill_process_group(app, Signal::CONT);
    }

    /// Puts us into the foreground if the app is in it.
    pub fn take_back(&self, app: Pid) {
        if termios::tcgetpgrp(io::stdin()).is_ok_and(|foreground| foreground == app) {
            let _ = termios::tcsetpgrp(io::stdin(), process::getpgrp());
        }
    }

    fn is_ours(&self) -> bool {
        termios::tcgetpgrp(io::stdin()).is_ok_and(|foreground| foreground == process::getpgrp())
    }
}
