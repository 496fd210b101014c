//! What has no safe call: what a child sets for itself between fork and exec, and a signal that is to be ignored.

#![allow(unsafe_code, reason = "see above")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::process::{self, Signal};

/// Starts a child that the kernel kills when the calling thread has ended, however it ended (prctl(2),
/// `PR_SET_PDEATHSIG`): the thread must be one that lasts as long as the process. A program with more rights than its
/// parent is exempt.
///
/// # Errors
/// As [`Command::spawn`].
pub fn with_our_life(command: &mut Command) -> io::Result<Child> {
    let parent = process::getpid();
    let prepare = move || {
        process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have ended before.
        if process::getppid().is_some_and(|now| now != parent) {
            return Err(io::ErrorKind::NotFound.into());
        }
        // SAFETY: a signal's default; nothing of ours runs by it.
        unsafe { libc::signal(libc::SIGTTOU, libc::SIG_DFL) };
        Ok(())
    };
    // SAFETY: system calls only: no lock is taken and nothing is allocated.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

/// From now on this process may write to its terminal, and set the terminal's foreground group, from the background
/// (termios(3), "Job control"). Its children may not.
pub fn ignore_sigttou() {
    // SAFETY: an ignored signal runs no code.
    unsafe { libc::signal(libc::SIGTTOU, libc::SIG_IGN) };
}
