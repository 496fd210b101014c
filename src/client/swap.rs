//! `lameduck hold`, `swap` and `switch`: replace the app behind a running front door.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::process::{Command, ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use hyper::Method;
use hyper::body::Bytes;
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};

use super::call::{call, get, in_time, parse, state};
use super::reach::locate;
use super::terminal::{CommandError, run, say, show_line};
use super::view::{self, ProxyState};
use crate::cli::HoldLimits;
use crate::config::{ControlAddr, ControlPlaces, UpstreamAddr};

/// Interval between checks whether the app answers.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// Refresh interval of the progress line on a terminal.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// The same for output that is not a terminal, where each refresh is a new line.
const PROGRESS_LINE_INTERVAL: Duration = Duration::from_secs(2);
/// Exit code of a shell for SIGINT.
const INTERRUPTED: u8 = 130;

/// `lameduck hold`. Exit code: 0 once new requests are held and, with `until_idle`, no request runs; 1 on failure.
pub fn hold(places: &ControlPlaces, how: HoldLimits, until_idle: bool) -> ExitCode {
    let control = &locate(places, true);
    run(async {
        let held = call_hold(control, how, until_idle);
        match until_idle {
            true => beside_progress(control, "waiting for running requests", Instant::now(), held).await?,
            false => in_time(control, held).await?,
        };
        say(if until_idle { "idle: new requests are held" } else { "new requests are held" });
        Ok(ExitCode::SUCCESS)
    })
}

/// `lameduck switch`. Exit code: 0 once new requests go to `to`, or back to `--upstream`, and the old upstream has no
/// request left; 1 if nothing was changed.
pub fn switch(places: &ControlPlaces, to: Option<&UpstreamAddr>, timeout: Duration, wait: bool) -> ExitCode {
    let control = &locate(places, true);
    run(async {
        let to = to.map(|to| format!("&to={to}")).unwrap_or_default();
        let target = format!("/switch?timeout={}ms&wait={wait}{to}", timeout.as_millis());
        let switched = call(control, Method::POST, &target);
        beside_progress(control, "switching", Instant::now(), switched).await?;
        let state = state(control).await?;
        say(&format!("new requests go to {}", state.upstream.unwrap_or_default()));
        Ok(ExitCode::SUCCESS)
    })
}

/// `lameduck swap`. Exit code: 0 if the app was replaced and answers; 130 if interrupted; else 1. The held requests are
/// released in any case.
pub fn swap(places: &ControlPlaces, how: HoldLimits, timeout: Duration, command: &[OsString]) -> ExitCode {
    let control = &locate(places, true);
    run(async {
        let replaced = tokio::select! {
            replaced = replace(control, how, timeout, command) => replaced,
            () = interrupted() => {
                let _ = release(control).await;
                say("interrupted: held requests are released to the current app");
                return Ok(ExitCode::from(INTERRUPTED));
            }
        };
        let released = release(control).await;
        match (replaced, released) {
            (Ok(done), Ok(())) => say(&done),
            (Err(failed), Ok(())) => {
                return Err(format!("{failed}; held requests are released to the current app"));
            }
            (Ok(failed) | Err(failed), Err(why)) => {
                return Err(format!("{failed}; then resume failed: {why}"));
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// Holds requests, replaces the app and waits for the new one. Returns a summary.
async fn replace(
    control: &ControlAddr,
    how: HoldLimits,
    timeout: Duration,
    command: &[OsString],
) -> Result<String, CommandError> {
    let start = Instant::now();
    beside_progress(control, "waiting for running requests", start, call_hold(control, how, true)).await?;
    let idle = start.elapsed();
    let shown = command.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    show_line(&format!("idle after {:.1}s; running {shown}", idle.as_secs_f64()));
    let status = execute(command).await.map_err(|why| format!("can't run {shown}: {why}"))?;
    if !status.success() {
        return Err(format!("{shown} failed ({status})"));
    }
    let ran = start.elapsed();
    let answers = beside_progress(control, "waiting for the app", start, async {
        while !answers(control).await? {
            if ran + timeout < start.elapsed() {
                let late = humantime::format_duration(timeout);
                return Err(format!("the app did not answer within {late} (--timeout)"));
            }
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
        Ok(Bytes::new())
    });
    answers.await?;
    let seconds = |time: Duration| time.as_secs_f64();
    let state = state(control).await?;
    if state.hold.is_none() {
        return Err("the app was replaced, but the hold had already ended (--max)".to_owned());
    }
    Ok(format!(
        "swapped in {:.1}s: idle after {:.1}s, the command took {:.1}s, the app answered {:.1}s later; {} held requests released",
        seconds(start.elapsed()),
        seconds(idle),
        seconds(ran - idle),
        seconds(start.elapsed() - ran),
        state.held,
    ))
}

async fn call_hold(control: &ControlAddr, how: HoldLimits, until_idle: bool) -> Result<Bytes, CommandError> {
    #[derive(Deserialize)]
    struct Came {
        outcome: String,
    }
    let HoldLimits { max, keep_streams } = how;
    let target = format!("/hold?max={}ms&streams={}&wait={until_idle}", max.as_millis(), keep(keep_streams));
    let answer = call(control, Method::POST, &target).await?;
    match parse::<Came>(&answer)?.outcome.as_str() {
        "released" => Err("not idle in time: the hold ended (--max, a resume or a drain)".to_owned()),
        _ => Ok(answer),
    }
}

fn keep(streams: bool) -> &'static str {
    if streams { "keep" } else { "end" }
}

/// Releases the hold; a drain that has begun meanwhile goes on.
async fn release(control: &ControlAddr) -> Result<(), CommandError> {
    in_time(control, call(control, Method::POST, "/resume?only=hold")).await.map(drop)
}

async fn answers(control: &ControlAddr) -> Result<bool, CommandError> {
    #[derive(Deserialize)]
    struct AppReply {
        answers: bool,
    }
    parse::<AppReply>(&get(control, "/app").await?).map(|app| app.answers)
}

/// The command inherits our stdout and stderr.
async fn execute(command: &[OsString]) -> io::Result<ExitStatus> {
    let mut child = Command::new(&command[0]).args(&command[1..]).spawn()?;
    tokio::task::spawn_blocking(move || child.wait()).await?
}

/// Includes SIGHUP, when the terminal is closed.
async fn interrupted() {
    let ends = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::quit(), SignalKind::hangup()]
        .map(signal);
    let [Ok(mut interrupt), Ok(mut terminate), Ok(mut quit), Ok(mut hang_up)] = ends else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = quit.recv() => {}
        _ = hang_up.recv() => {}
    }
}

/// Runs `work` and shows its progress: on a terminal in one line that is overwritten, otherwise a line whenever a
/// number has changed.
async fn beside_progress(
    control: &ControlAddr,
    what: &str,
    start: Instant,
    work: impl Future<Output = Result<Bytes, CommandError>>,
) -> Result<Bytes, CommandError> {
    let terminal = io::stderr().is_terminal();
    let progress = async {
        let mut last = None;
        loop {
            if let Ok(state) = state(control).await {
                let ProxyState { in_flight, running, held, .. } = state;
                if terminal || last != Some((running, held)) {
                    let line = view::swapping(what, in_flight - held.min(in_flight), held, start.elapsed());
                    match terminal {
                        true => drop(write!(io::stderr(), "\r\x1b[K{line}")),
                        false => show_line(&line),
                    }
                }
                last = Some((running, held));
            }
            tokio::time::sleep(if terminal { PROGRESS_INTERVAL } else { PROGRESS_LINE_INTERVAL }).await;
        }
    };
    let done = tokio::select! {
        done = work => done,
        never = progress => never,
    };
    if terminal {
        let _ = write!(io::stderr(), "\r\x1b[K");
    }
    done
}
