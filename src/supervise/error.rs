//! Why there is no app to proxy to, in words that say what to do about it.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

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
        /// As in [`super::Exit`].
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
