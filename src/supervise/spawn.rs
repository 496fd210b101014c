//! `unsafe` calls for child processes: settings between fork and exec, and an ignored signal.

#![allow(unsafe_code, reason = "see above")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::process::{self, Signal};

/// Starts a child that the kernel kills when the calling thread ends, for whatever reason (prctl(2),
/// `PR_SET_PDEATHSIG`). The thread must last as long as the process. Set-user-ID programs are exempt.
///
/// # Errors
/// As for [`Command::spawn`].
pub fn with_our_life(command: &mut Command) -> io::Result<Child> {
    let parent = process::getpid();
    let prepare = move || {
        process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have ended before prctl.
        if process::getppid().is_some_and(|now| now != parent) {
            return Err(io::ErrorKind::NotFound.into());
        }
        // SAFETY: restores the default action; no code of ours runs on the signal.
        unsafe { libc::signal(libc::SIGTTOU, libc::SIG_DFL) };
        Ok(())
    };
    // SAFETY: makes system calls only: takes no lock and allocates nothing.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

/// Ignores SIGTTOU: from now on this process may write to its terminal and set the terminal's foreground group from the
/// background (termios(3), "Job control"). Its children may not.
pub fn ignore_sigttou() {
    // SAFETY: an ignored signal runs no code.
    unsafe { libc::signal(libc::SIGTTOU, libc::SIG_IGN) };
}
