//! Output and exit codes of the client commands.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use rustix::termios::tcgetwinsize;

/// Error text for stderr.
pub type CommandError = String;

/// Writes a line to stderr.
pub fn show_line(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Runs a command. On failure the text goes to stderr, and the exit code is 1.
pub fn run(work: impl Future<Output = Result<ExitCode, CommandError>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = runtime.map_err(|why| why.to_string()).and_then(|runtime| runtime.block_on(work));
    done.unwrap_or_else(|why| {
        let _ = writeln!(io::stderr(), "lameduck: {why}");
        ExitCode::FAILURE
    })
}

/// Columns and rows of a terminal; none for anything else.
pub fn size(out: &impl AsFd) -> Option<(usize, usize)> {
    // A terminal of unknown size reports 0.
    let known = |n: u16| if n == 0 { usize::MAX } else { n.into() };
    tcgetwinsize(out).ok().map(|size| (known(size.ws_col), known(size.ws_row)))
}

/// Writes a line to stdout. A closed stdout is ignored.
pub fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}
