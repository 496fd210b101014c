//! Errors at the app's start; their text says how to fix them.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

/// Reason why the app could not be started. The text says how to fix it.
#[derive(Debug)]
pub enum StartError {
    /// Signal handlers could not be installed.
    Signals(io::Error),
    /// A process already answers on the app's port.
    PortTaken(SocketAddr),
    /// The command does not exist.
    NotFound(OsString),
    /// The command exists but can't be executed.
    NotExecutable(OsString, io::Error),
    /// The app exited before it listened.
    Exited {
        /// As in [`super::Exit`].
        code: u8,
        /// Value of `PORT`, if we chose it.
        port: Option<u16>,
    },
    /// The app runs but does not listen on its port.
    NotListening {
        /// Value of `PORT`, if we chose it.
        port: Option<u16>,
        /// `--start-timeout`.
        within: Duration,
        /// Addresses on which processes of its group listen.
        listens: Vec<SocketAddr>,
    },
}

impl StartError {
    /// Exit code of `lameduck run`: 127 and 126 as in a shell for a command that is not found or not executable, the
    /// app's own code if it exited, else 1.
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
                "another process already listens on {addr}, the app's port: stop it, or give the app another port"
            ),
            Self::NotFound(program) if is_existing_path(program) => write!(
                f,
                "{} exists, but its interpreter does not: check its first line (#!), or whether it was built \
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
            Self::Exited { code, port } => {
                write!(f, "the app exited with code {code} before it listened")?;
                if let Some(port) = port {
                    write!(f, " on port {port}")?;
                }
                write!(f, ": its own output says why")
            }
            Self::NotListening { port, within, listens } => {
                let within = humantime::format_duration(*within);
                match port {
                    Some(port) => write!(f, "the app does not listen on port {port}, its PORT,")?,
                    None => write!(f, "the app does not listen on any port")?,
                }
                write!(f, " after {within}: ")?;
                write_advice(f, *port, listens)
            }
        }
    }
}

/// Whether the command is a path to an existing file: then "not found" is about its interpreter or loader.
fn is_existing_path(program: &OsStr) -> bool {
    program.as_encoded_bytes().contains(&b'/') && Path::new(program).is_file()
}

fn write_advice(f: &mut fmt::Formatter<'_>, port: Option<u16>, listens: &[SocketAddr]) -> fmt::Result {
    if let Some(addr) = listens.iter().find(|addr| Some(addr.port()) == port) {
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
