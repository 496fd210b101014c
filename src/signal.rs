//! SIGTERM and SIGINT → events.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that ask the proxy to go. From the moment it is made none is lost.
pub struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    /// Takes both signals over.
    ///
    /// # Errors
    /// When the kernel or the runtime refuses it.
    pub fn new() -> io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next one; its name.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}
