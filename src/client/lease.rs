//! `lameduck lease`: runs a command and counts it as in flight.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Duration;

use hyper::Method;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};

use super::call::{call, in_time, parse};
use super::reach::locate;
use super::terminal::{CommandError, run, show_line};
use crate::config::{ControlAddr, ControlPlaces};

/// Time of the lease. It is renewed well before, so it only matters if this process is killed.
const TTL: Duration = Duration::from_secs(30);
/// Time between two renewals.
const RENEW_INTERVAL: Duration = Duration::from_secs(10);
/// EX_TEMPFAIL of sysexits.h: the caller may try again later.
const REFUSED: u8 = 75;

/// `lameduck lease`. Exit code: the command's, with 128 added to the number of the signal that ended it; 75 if a drain
/// accepts no new work, so that the command was not run; 126 or 127 if it can't be run; 1 without a proxy.
pub fn lease(places: &ControlPlaces, name: Option<&str>, command: &[OsString]) -> ExitCode {
    let control = &locate(places, false);
    let name = name.map_or_else(|| name_of(&command[0]), str::to_owned);
    run(async {
        let mut id = match take(control, &name).await {
            Ok(id) => id,
            Err(why) if why.starts_with("409") => {
                show_line(&format!("lameduck: not run: {why}"));
                return Ok(ExitCode::from(REFUSED));
            }
            Err(why) => return Err(why),
        };
        let ended = execute(control, &name, &mut id, command).await;
        // If the proxy is gone, nothing waits for the lease.
        let target = format!("/leases/return?id={id}");
        let _ = in_time(control, call(control, Method::POST, &target)).await;
        match ended {
            Ok(status) => Ok(ExitCode::from(code(status))),
            Err(why) => {
                show_line(&format!("lameduck: can't run {}: {why}", command[0].display()));
                Ok(ExitCode::from(if why.kind() == ErrorKind::NotFound { 127 } else { 126 }))
            }
        }
    })
}

async fn take(control: &ControlAddr, name: &str) -> Result<String, CommandError> {
    #[derive(Deserialize)]
    struct TakenLease {
        id: String,
    }
    let target = format!("/leases?name={name}&ttl={}s", TTL.as_secs());
    parse::<TakenLease>(&in_time(control, call(control, Method::POST, &target)).await?).map(|taken| taken.id)
}

/// Runs the command to its end, renews the lease meanwhile, and passes on the signals that ask this process to end.
async fn execute(
    control: &ControlAddr,
    name: &str,
    id: &mut String,
    command: &[OsString],
) -> std::io::Result<ExitStatus> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut child = Command::new(&command[0]).args(&command[1..]).spawn()?;
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
    let mut ended = tokio::task::spawn_blocking(move || child.wait());
    let mut ticks = interval(RENEW_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    loop {
        tokio::select! {
            ended = &mut ended => return ended?,
            // The command is in our process group, so it has had a terminal's Ctrl-C itself.
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {
                if let Ok(process) = &process {
                    let _ = pidfd_send_signal(process, Signal::TERM);
                }
            }
            _ = ticks.tick() => renew(control, name, id).await,
        }
    }
}

/// After a restart the proxy has forgotten the lease, so take another one.
async fn renew(control: &ControlAddr, name: &str, id: &mut String) {
    let target = format!("/leases/renew?id={id}&ttl={}s", TTL.as_secs());
    let renewed = in_time(control, call(control, Method::POST, &target)).await;
    if renewed.is_err_and(|why| why.starts_with("404"))
        && let Ok(another) = take(control, name).await
    {
        *id = another;
    }
}

/// The program's file name, as far as a lease's name can hold it.
fn name_of(program: &OsString) -> String {
    let text = program.to_string_lossy();
    let file = text.rsplit('/').next().unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-._~:@".contains(c) { c } else { '-' };
    let name: String = file.chars().map(plain).take(64).collect();
    if name.is_empty() { "command".to_owned() } else { name }
}

/// As a shell's.
fn code(status: ExitStatus) -> u8 {
    let signal = || status.signal().map(|signal| 128 + signal);
    status.code().or_else(signal).and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
