//! `lameduck drain`, `resume`, `lease`, `status` and others: they talk to a running proxy over its control socket or TCP.

mod call;
mod lease;
mod reach;
mod swap;
mod terminal;
mod view;

use std::ffi::OsString;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use hyper::Method;
use hyper::body::Bytes;
use serde::Deserialize;

use self::call::{call, get, in_time, parse, state};
pub use self::lease::lease;
pub use self::swap::{hold, swap, switch};
use self::terminal::{CommandError, run, say, show_line, size};
use self::view::Row;
use crate::cli::StatusView;
use crate::config::{ControlAddr, ControlPlaces};
use crate::inject::share;

/// Exit code when the drain cut something.
const CUT: u8 = 3;
/// Refresh interval of `--watch` and of a drain's progress.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// `lameduck drain`. Exit code: 0 if nothing was cut (without `wait`: if it began), 3 if something was, 1 on failure.
pub fn drain(places: &ControlPlaces, timeout: Option<Duration>, wait: bool) -> ExitCode {
    let control = &reach::locate(places, true);
    let mut target = format!("/drain?wait={wait}");
    if let Some(timeout) = timeout {
        target += &format!("&timeout={}ms", timeout.as_millis().max(1));
    }
    run(async {
        if let Some(timeout) = timeout {
            tell_of_sooner_deadline(control, timeout).await;
        }
        let end = call(control, Method::POST, &target);
        let answer = match wait && io::stderr().is_terminal() {
            true => beside_progress(control, end).await?,
            false if wait => end.await?,
            false => in_time(control, end).await?,
        };
        let end: End = parse(&answer)?;
        match (end.outcome.as_str(), end.verdict) {
            ("drained", Some(verdict)) => {
                say(&format!("drained: {verdict}"));
                Ok(if verdict == "clean" { ExitCode::SUCCESS } else { ExitCode::from(CUT) })
            }
            ("begun", _) => Ok(ExitCode::SUCCESS),
            ("app-may-stop", _) => {
                say("only the app restarts: nothing was drained");
                Ok(ExitCode::SUCCESS)
            }
            _ => Err("not drained: the proxy was resumed meanwhile".to_owned()),
        }
    })
}

/// A drain that already runs may have an earlier deadline than this `timeout`.
async fn tell_of_sooner_deadline(control: &ControlAddr, timeout: Duration) {
    let left = state(control).await.ok().and_then(|state| state.time_left());
    if let Some(left) = left.filter(|left| *left < timeout) {
        let left = left.as_secs_f64();
        show_line(&format!("a drain is already running and cuts remaining requests in {left:.1}s"));
    }
}

/// `lameduck drain --app-hook`: waits until the app may stop, then executes the app's own hook, if it has one. The hook
/// runs whatever the result of the drain, and its exit code is returned.
pub fn app_hook(places: &ControlPlaces, command: &[OsString]) -> ExitCode {
    let control = &reach::locate(places, false);
    // The app gets SIGTERM only after its own hook has ended; the proxy notices that end by this connection.
    let _running = share::mark_running();
    let waited = run(async {
        call(control, Method::POST, "/drain?hook=app").await?;
        Ok(ExitCode::SUCCESS)
    });
    let Some((program, args)) = command.split_first() else { return waited };
    let error = Command::new(program).args(args).exec();
    let _ = writeln!(io::stderr(), "lameduck: can't run {}: {error}", program.display());
    // Exit codes of a shell.
    ExitCode::from(if error.kind() == ErrorKind::NotFound { 127 } else { 126 })
}

/// `lameduck resume`. Exit code: 0 if the proxy serves again, 1 on failure.
pub fn resume(places: &ControlPlaces) -> ExitCode {
    let control = &reach::locate(places, true);
    run(async {
        in_time(control, call(control, Method::POST, "/resume")).await?;
        say("resumed");
        Ok(ExitCode::SUCCESS)
    })
}

/// `lameduck status`. Exit code: 0 on success; with `Ready`, 0 if ready, else 1, without output.
pub fn status(places: &ControlPlaces, view: StatusView) -> ExitCode {
    let control = &reach::locate(places, view != StatusView::Ready);
    run(async {
        match view {
            StatusView::Ready => {
                let ready = state(control).await.is_ok_and(|state| state.ready);
                Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
            }
            StatusView::Human { watch } => {
                show(watch, async || {
                    let rows: Vec<Row> = parse(&get(control, "/ledger").await?)?;
                    let table = view::table(&state(control).await?, rows);
                    // Cursor to the top left, and clear to the end.
                    Ok(match size(&io::stdout()).filter(|_| watch) {
                        Some((columns, rows)) => format!("\x1b[H\x1b[J{}", view::fit(&table, columns, rows)),
                        None => table,
                    })
                })
                .await
            }
            StatusView::Json { watch } => {
                show(watch, async || {
                    let mut whole: serde_json::Value = parse(&get(control, "/status").await?)?;
                    whole["ledger"] = parse(&get(control, "/ledger").await?)?;
                    Ok(format!("{whole}\n"))
                })
                .await
            }
        }
    })
}

/// Prints the result of `look` once, or each second until it fails or stdout is closed.
async fn show(
    watch: bool,
    look: impl AsyncFn() -> Result<String, CommandError>,
) -> Result<ExitCode, CommandError> {
    loop {
        let text = look().await?;
        let mut out = io::stdout().lock();
        let shown = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        if !watch || shown.is_err() {
            return Ok(ExitCode::SUCCESS);
        }
        drop(out);
        tokio::time::sleep(REFRESH_INTERVAL).await;
    }
}

/// Waits for the end of the drain, and shows its progress on stderr.
async fn beside_progress(
    control: &ControlAddr,
    end: impl Future<Output = Result<Bytes, CommandError>>,
) -> Result<Bytes, CommandError> {
    let start = Instant::now();
    let progress = async {
        loop {
            tokio::time::sleep(REFRESH_INTERVAL).await;
            // If the proxy is gone, the drain's own call reports it.
            if let Ok(state) = state(control).await {
                let line = view::progress(&state, start.elapsed());
                let columns = size(&io::stderr()).map_or(usize::MAX, |(columns, _)| columns);
                let _ = write!(io::stderr(), "\r\x1b[K{}", view::fit(&line, columns, 2).trim_end());
            }
        }
    };
    let answer = tokio::select! {
        answer = end => answer,
        never = progress => never,
    };
    let _ = write!(io::stderr(), "\r\x1b[K");
    answer
}

#[derive(Deserialize)]
struct End {
    outcome: String,
    verdict: Option<String>,
}
