//! Runs the app of `lameduck run`: start it, serve once it listens, drain, stop it.

use std::future::pending;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::find::{Finder, upstream_at};
use super::state::CHECK_INTERVAL_AT_START;
use super::{FAILURE_TIMEOUT, drain_by_signals, drain_now, linger, linger_most};
use crate::cli::AppCommand;
use crate::config::UpstreamAddr;
use crate::control::clock::seconds;
use crate::control::handle::Control;
use crate::drain::machine::{Phase, Trigger};
use crate::proxy::shared::Shared;
use crate::signal::{Signals, Taken};
use crate::supervise::{App, Launch, StartError, free_port};

/// Number of ports to try for an app if other processes take them.
const MAX_PORTS: usize = 5;
/// Interval between checks whether an app that was not asked to end still listens.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// Exit code of an app without a handler for SIGTERM.
const BY_SIGTERM: u8 = 128 + 15;

/// State for running one app.
pub struct Life<'a> {
    pub command: AppCommand,
    /// Its `PORT`: `--app-port`, or one that we chose; `None` leaves the variable as it is.
    pub port: Option<u16>,
    /// Finds its port; `None` with `--app-port`.
    pub finder: Option<Finder>,
    pub shared: &'a Shared,
    pub control: &'a Control,
    pub signals: &'a mut Signals,
    /// URL under which the app is served.
    pub url: Option<String>,
}

impl Life<'_> {
    /// Returns the process's exit code.
    pub async fn run(&mut self, serve: impl FnOnce() -> Result<(), u8>) -> u8 {
        let app = match self.start().await {
            Ok(app) => app,
            Err(error) => {
                tracing::error!("{error}");
                return error.exit_code();
            }
        };
        tokio::spawn(pass_on(self.signals.others(), app.clone()));
        let listens = self.serve_once_listening(&app, serve).await;
        if let Err(failed) = listens {
            let most = if failed.is_some() { Duration::ZERO } else { linger_most(self.shared, self.control) };
            let ended = self.end(&app, most).await;
            return failed.unwrap_or(ended);
        }
        if let Some(url) = &self.url {
            tracing::info!(%url, "serving");
        }
        let exited = async { tokio::join!(app.exited(), tell_of_a_stray_signal(&app, self.control)).0 };
        tokio::select! {
            code = exited => self.exited_by_itself(&app, code).await,
            _ = drain_by_signals(self.control, self.signals) => {
                self.end(&app, linger_most(self.shared, self.control)).await
            }
        }
    }

    /// Starts the app. If another process takes the port that we chose, on the next.
    async fn start(&mut self) -> Result<App, StartError> {
        for _ in 1..MAX_PORTS {
            match App::launch(self.launch()).await {
                Err(StartError::PortTaken(_)) if self.choose_port() => {}
                started => return started.inspect(|app| self.started(app)),
            }
        }
        App::launch(self.launch()).await.inspect(|app| self.started(app))
    }

    fn launch(&mut self) -> Launch<'_> {
        if let Some(finder) = &mut self.finder {
            finder.prepare(self.port);
        }
        let preload = self.finder.as_ref().and_then(Finder::preload);
        Launch { argv: &self.command.command, port: self.port, preload }
    }

    /// Starts the command on another port, if it exited because another process took the port that we chose.
    async fn start_again(&mut self, app: &App) -> bool {
        if !app.lost_its_port().await || !self.choose_port() {
            return false;
        }
        // Processes that the first attempt left behind.
        app.terminate(Signal::TERM, Duration::ZERO).await;
        let started = app.launch_again(self.launch()).await;
        started.inspect(|()| self.started(app)).is_ok()
    }

    fn started(&self, app: &App) {
        tracing::info!(pid = app.pid(), port = self.port, "started the app");
    }

    /// Chooses another port; false if the user has set it, or the app itself.
    fn choose_port(&mut self) -> bool {
        let (Some(taken), None) = (self.port, self.command.port) else { return false };
        let Ok(port) = free_port() else { return false };
        tracing::warn!(taken, port, "another process took the app's port; trying another port");
        self.port = Some(port);
        self.shared.upstream.be_at(UpstreamAddr::Tcp { host: "localhost".to_owned(), port });
        true
    }

    /// Where the app listens is now known.
    fn found(&self, app: &App, addr: SocketAddr) {
        app.listens_at(addr);
        if self.port != Some(addr.port()) {
            self.shared.upstream.be_at(upstream_at(addr));
        }
        if let Some(finder) = &self.finder {
            tokio::spawn(finder.follow(app.clone(), self.shared));
        }
        tracing::info!(port = addr.port(), "the app listens");
    }

    /// Until the app listens, clients wait in the accept queue. The error is the exit code; none means the app's own
    /// code, after a drain.
    async fn serve_once_listening(
        &mut self,
        app: &App,
        serve: impl FnOnce() -> Result<(), u8>,
    ) -> Result<(), Option<u8>> {
        let mut serve = Some(serve);
        let within = self.command.start_timeout;
        let wait = |life: &Self| {
            wait_listening(app.clone(), within, life.finder.as_ref().map(|it| it.wait(app, within)))
        };
        let mut listening = std::pin::pin!(wait(self));
        loop {
            tokio::select! {
                listens = &mut listening => match listens {
                    Ok(addr) => {
                        self.found(app, addr);
                        return serve.map_or(Ok(()), |serve| serve().map_err(Some));
                    }
                    Err(StartError::Exited { .. }) if self.start_again(app).await => {
                        listening.set(wait(self));
                    }
                    Err(error) => {
                        tracing::error!("{error}");
                        return Err(Some(error.exit_code()));
                    }
                },
                signal = self.signals.next() => {
                    tracing::info!(signal, "shutdown requested before the app listens");
                    serve.take().map_or(Ok(()), |serve| serve().map_err(Some))?;
                    // Waiting clients are served if the app listens before the deadline. Without any, the drain does
                    // not wait.
                    self.shared.set_booting(true);
                    let boots = async {
                        if let Err(error) = listening.as_mut().await {
                            tracing::error!("{error}");
                        }
                        self.shared.set_booting(false);
                        pending::<()>().await;
                    };
                    tokio::select! {
                        _ = drain_now(self.control, self.signals) => {}
                        () = boots => {}
                    }
                    return Err(None);
                }
                // A drain needs the data plane: waiting clients get their response, and the listeners close.
                () = drain_began(self.shared), if serve.is_some() => {
                    if let Some(serve) = serve.take() {
                        serve().map_err(Some)?;
                    }
                }
            }
        }
    }

    /// The app exited without being asked.
    async fn exited_by_itself(&mut self, app: &App, code: u8) -> u8 {
        let reserve = self.shared.settings.drain.reserve;
        if app.has_terminal() {
            tracing::info!(code, "the app exited while it had the terminal");
        } else if code == BY_SIGTERM || code == 0 && self.signals.first().is_some() {
            warn_of_a_stray_signal();
            tracing::info!(code, "the app exited before the drain was over");
        } else {
            tracing::error!(code, "the app exited by itself");
        }
        let mut drained = std::pin::pin!(self.control.drain(Trigger::Signal));
        // Requests that wait for the app notice its exit themselves and respond to their clients.
        if tokio::time::timeout(FAILURE_TIMEOUT, &mut drained).await.is_err() {
            self.control.force();
            let _ = tokio::time::timeout(reserve, drained).await;
        }
        self.end(app, reserve).await
    }

    /// Terminates the app and delivers the last responses, side by side, both within the reserve. Another signal skips
    /// both.
    async fn end(&mut self, app: &App, most: Duration) -> u8 {
        let reserve = self.shared.settings.drain.reserve;
        let asked = self.signals.first().unwrap_or(Signal::TERM);
        let both = async { tokio::join!(stop(app, asked, reserve), linger(self.shared, most)).0 };
        tokio::select! {
            code = both => code,
            () = asked_once_more(self.signals, app) => stop(app, asked, Duration::ZERO).await,
        }
    }
}

async fn wait_listening(
    app: App,
    within: Duration,
    finds: Option<impl Future<Output = Result<SocketAddr, StartError>>>,
) -> Result<SocketAddr, StartError> {
    match finds {
        Some(finds) => finds.await,
        None => app.wait_listening(within).await,
    }
}

/// Waits for a further signal. If the app exited by itself, the first signal adds nothing to that and does not count.
async fn asked_once_more(signals: &mut Signals, app: &App) {
    let known = signals.first().is_none() && app.has_exited();
    if known {
        let signal = signals.next().await;
        tracing::info!(signal, "shutdown requested");
    }
    let signal = signals.next().await;
    tracing::warn!(signal, "immediate shutdown requested");
}

/// Warns if the app closes its port while we drain: it was sent a signal as well as us. Returns after that, or once the
/// app has exited.
async fn tell_of_a_stray_signal(app: &App, control: &Control) {
    let drains = || {
        let published = control.published();
        published.trigger == Some(Trigger::Signal) && published.phase < Some(Phase::Forcing)
    };
    while !app.has_exited() {
        if drains() && !app.listens().await && !app.has_exited() && drains() {
            return warn_of_a_stray_signal();
        }
        tokio::select! {
            _ = app.exited() => {}
            () = tokio::time::sleep(CHECK_INTERVAL) => {}
        }
    }
}

fn warn_of_a_stray_signal() {
    tracing::warn!(
        "the app got a SIGTERM that lameduck did not send, so it exits while it is still needed: send signals to \
        lameduck only, for example with KillMode=mixed in a systemd unit"
    );
}

/// Forwards signals that mean nothing to us to the app.
async fn pass_on(mut signals: Taken, app: App) {
    loop {
        let (signal, _) = signals.next().await;
        app.signal(signal);
    }
}

async fn drain_began(shared: &Shared) {
    while shared.phase() == Phase::Serving {
        tokio::time::sleep(CHECK_INTERVAL_AT_START).await;
    }
}

async fn stop(app: &App, asked: Signal, reserve: Duration) -> u8 {
    let began = Instant::now();
    let exit = app.terminate(asked, reserve).await;
    if exit.killed {
        tracing::warn!(seconds = seconds(began.elapsed()), "the app outlived its SIGTERM and was killed");
    }
    tracing::info!(code = exit.code, "the app has ended");
    exit.code
}
