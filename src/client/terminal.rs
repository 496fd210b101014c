//! What a command says, and how it ends.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use rustix::termios::tcgetwinsize;

/// What the user is told on stderr.
pub type Failure = String;

/// A line on stderr.
pub fn show_line(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Runs a command's work. Its failure goes to stderr, and the exit code is 1 then.
pub fn run(work: impl Future<Output = Result<ExitCode, Failure>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = runtime.map_err(|why| why.to_string()).and_then(|runtime| runtime.block_on(work));
    done.unwrap_or_else(|why| {
        let _ = writeln!(io::stderr(), "lameduck: {why}");
        ExitCode::FAILURE
    })
}

/// A terminal's columns and rows; none for anything else.
pub fn size(out: &impl AsFd) -> Option<(usize, usize)> {
    // One that doesn't know its size says 0.
    let known = |n: u16| if n == 0 { usize::MAX } else { n.into() };
    tcgetwinsize(out).ok().map(|size| (known(size.ws_col), known(size.ws_row)))
}

/// A line on stdout. Whoever closed it doesn't want to know.
pub fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}
