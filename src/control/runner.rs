//! Runs the drain's state machine: feeds it events, carries out its effects, answers the callers, and logs the
//! progress.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::app_stop::{AppStop, WaitingCaller};
use super::clock::{now, seconds};
use super::data_plane::{DataPlane, Listeners};
use super::handle::{Control, DrainOutcome, HoldAnswer, Order, Published, trigger_name};
use super::telling::{self, Telling};
use super::verdict::Verdict;
use crate::config::UpstreamAddr;
use crate::drain::ledger::{LedgerRow, lock};
use crate::drain::machine::{Counts, Effect, Event, Machine, Phase, Trigger};
use crate::drain::quiet::LookBack;
use crate::metrics::Ended;
use crate::readiness;
use crate::termination_log;
use crate::upstream;

/// How often a drain logs what it is still waiting for.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// Limit on the requests that such a log line names; the oldest come first.
const MAX_NAMED: usize = 5;
/// How often to check whether the app has exited or is back.
const APP_CHECK_INTERVAL: Duration = Duration::from_millis(20);
/// A connection that stays open for this long shows that the app is running: no app closes a new, silent connection
/// sooner. Node's shortest timeout is 30 s.
const STEADY_TIME: Duration = Duration::from_secs(1);
/// How much longer than the hold a request may wait: the end of the hold must come first, as it releases requests in
/// turn.
const RELEASE_MARGIN: Duration = Duration::from_secs(5);
/// A connection that ends sooner was never used by the app: it has reached its own limit (`server.maxConnections`) or
/// is about to exit.
const MIN_CONNECTION_TIME: Duration = Duration::from_millis(100);

/// The task behind [`Control`].
pub struct Runner {
    machine: Machine,
    plane: Arc<dyn DataPlane>,
    listeners: Box<dyn Listeners>,
    idle: Arc<Notify>,
    commands: mpsc::UnboundedReceiver<Order>,
    /// Given to the task that watches a restarting app.
    events: mpsc::UnboundedSender<Order>,
    published: Arc<Mutex<Published>>,
    exit: watch::Sender<bool>,
    waiting: Vec<WaitingCaller>,
    stop: AppStop,
    /// Handle of the task that watches a restarting app.
    watch: Option<AbortHandle>,
    /// Callers that wait until a hold is idle.
    holders: Vec<oneshot::Sender<HoldAnswer>>,
    /// The app's hook has been answered; another call of it is answered at once.
    hook_released: bool,
    arrivals: LookBack,
    ended_before: [u64; Ended::ALL.len()],
    /// The app has been told of the drain.
    telling: Option<Telling>,
    /// When to log the progress of the drain next; `None` outside a drain.
    still: Option<Instant>,
}

/// Creates a handle and the task that must run for it. `idle` must be notified whenever the counts may have changed
/// what to do.
pub fn control(
    plane: Arc<dyn DataPlane>,
    listeners: impl Listeners + 'static,
    idle: Arc<Notify>,
) -> (Control, Runner) {
    let (events, commands) = mpsc::unbounded_channel();
    let published = Arc::<Mutex<Published>>::default();
    let exit = watch::Sender::new(false);
    let control = Control {
        commands: events.clone(),
        published: published.clone(),
        plane: plane.clone(),
        exit: exit.subscribe(),
    };
    let machine = Machine::new(plane.settings().drain.clone(), plane.settings().sidecar);
    let runner = Runner {
        machine,
        plane,
        listeners: Box::new(listeners),
        idle,
        commands,
        events,
        published,
        exit,
        waiting: Vec::new(),
        stop: AppStop::default(),
        watch: None,
        holders: Vec::new(),
        hook_released: false,
        arrivals: LookBack::new(now()),
        ended_before: [0; Ended::ALL.len()],
        telling: None,
        still: None,
    };
    (control, runner)
}

impl Runner {
    /// Runs until the process ends.
    pub async fn run(mut self) {
        telling::forget(self.plane.settings().share_dir.as_deref());
        let mut seconds = tokio::time::interval(Duration::from_secs(1));
        loop {
            let wake = [self.machine.wake_at(&self.counts()), self.still].into_iter().flatten().min();
            let idle = self.idle.clone();
            let event = tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    Some(Order::Begin(trigger, done)) => {
                        self.stop.note(trigger);
                        self.waiting.push((trigger, done));
                        Event::Begin(trigger)
                    }
                    Some(Order::Resume(done)) => {
                        self.step(Event::Resume);
                        let all_open = self.listeners.all_open();
                        tokio::spawn(async move {
                            all_open.await;
                            let _ = done.send(());
                        });
                        continue;
                    }
                    Some(Order::Hold { max, keep_streams, wait, done }) => {
                        self.hold(max, keep_streams, wait, done);
                        continue;
                    }
                    Some(Order::Event(event)) => event,
                    None => return,
                },
                () = idle.notified() => Event::Tick,
                () = sleep_until(wake) => Event::Tick,
                _ = seconds.tick() => {
                    self.arrivals.note(now(), self.plane.arrivals().0);
                    continue;
                }
            };
            self.step(event);
        }
    }

    fn hold(&mut self, max: Duration, keep_streams: bool, wait: bool, done: oneshot::Sender<HoldAnswer>) {
        self.step(Event::Hold { max, keep_streams });
        match self.machine.held_until() {
            None => drop(done.send(HoldAnswer::Refused)),
            Some(_) if wait => self.holders.push(done),
            Some(_) => drop(done.send(HoldAnswer::Begun)),
        }
        if self.machine.held_until().is_some() {
            self.plane.hold(max + RELEASE_MARGIN);
        }
    }

    fn step(&mut self, event: Event) {
        let now = now();
        let before = (self.machine.began(), self.machine.deadline());
        let effects = self.machine.step(now, event, &self.counts());
        if let Event::Begin(trigger) = event {
            self.log_new_deadline(trigger, before);
        }
        if self.machine.app_stopped() {
            self.stop.app_gone();
        }
        // Publish before the effects, so that a reader of the new phase also finds its trigger.
        self.publish();
        for effect in effects {
            self.carry_out(effect);
        }
        self.publish();
        self.answer_late_callers();
        if self.still.is_some_and(|still| still <= now) {
            self.log_still();
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Enter(Phase::Drained) => self.drained(),
            Effect::Enter(phase) => self.enter(phase),
            Effect::Hold => {
                self.hook_released = false;
                let in_flight = self.plane.gate().in_flight();
                let settings = self.plane.settings();
                if self.machine.held_until().is_some() {
                    tracing::info!(in_flight, "new requests wait: the app is replaced");
                    if !self.plane.upstream().tells_app() {
                        tracing::info!(
                            "an app on loopback or a unix socket can't be told: what it asks for itself waits too"
                        );
                    }
                } else {
                    tracing::info!(in_flight, "only the app restarts: new requests wait");
                    self.plane.hold(settings.drain.grace + settings.upstream_wait);
                    let watch = tokio::spawn(watch_app(self.plane.clone(), self.events.clone()));
                    self.watch = Some(watch.abort_handle());
                }
            }
            Effect::Idle => {
                tracing::info!(
                    held = self.plane.gate().held(),
                    "nothing runs any more: the app may be replaced"
                );
                self.answer_holders(HoldAnswer::Idle);
            }
            Effect::Release => {
                tracing::info!(held = self.plane.gate().held(), "the held requests go on");
                self.hook_released = false;
                if let Some(watch) = self.watch.take() {
                    watch.abort();
                }
                // If a drain or a restart has ended the hold, the kubelet is still about to stop the app.
                if self.machine.is_inactive() {
                    self.stop = AppStop::default();
                }
                self.plane.release();
                self.answer_holders(HoldAnswer::Released);
            }
            Effect::ReleaseHook => {
                let gate = self.plane.gate();
                let running = gate.in_flight().saturating_sub(gate.held());
                tracing::info!(running, "the app may stop");
                self.hook_released = true;
                self.answer(&DrainOutcome::AppMayStop);
            }
            Effect::StopListening => self.listeners.close(),
            Effect::Listen => self.listeners.listen(),
            Effect::EndStreams { spread } => self.plane.end_streams(spread),
            Effect::CloseIdle => self.plane.close_idle(),
            Effect::Exit => {
                self.stop.warn_if_killed(&*self.plane);
                self.listeners.close();
                self.exit.send_replace(true);
            }
        }
    }

    fn enter(&mut self, phase: Phase) {
        let gate = self.plane.gate();
        let (in_flight, connections) = (gate.in_flight(), gate.connections());
        if gate.phase() == Phase::Serving {
            self.ended_before = self.plane.ended();
        }
        match phase {
            Phase::Serving => {
                tracing::info!(round = self.machine.round(), "resumed: serving again");
                self.still = None;
                self.telling = None;
                self.hook_released = false;
                lock(&self.published).verdict = None;
                self.plane.set_phase(phase);
                self.answer(&DrainOutcome::Resumed);
                self.stop = AppStop::default();
                return;
            }
            Phase::LameDuck => {
                let trigger = self.machine.trigger().map(trigger_name);
                let deadline = self.machine.deadline().map(seconds_until);
                tracing::info!(trigger, in_flight, connections, deadline_s = deadline, "drain began");
                self.still = Some(now() + PROGRESS_INTERVAL);
                self.telling = Some(Telling::begin(&self.plane));
                lock(&self.published).verdict = None;
            }
            Phase::Draining => tracing::info!(in_flight, connections, "new connections are refused"),
            // Reached by a second signal or because the app has crashed, with nothing left to end.
            Phase::Forcing if in_flight == 0 => {}
            Phase::Forcing => {
                tracing::warn!(in_flight, "no more time: what still runs is ended");
                self.log_still();
            }
            Phase::Drained => {}
        }
        self.plane.set_phase(phase);
    }

    fn drained(&mut self) {
        // Close the gate before counting the losses, so that nothing that ends later belongs to this drain.
        if !self.plane.gate().close() {
            self.plane.set_phase(Phase::Drained);
        }
        self.plane.close_idle();
        let after = self.plane.ended();
        let ended: Vec<(Ended, u64)> = Ended::ALL
            .iter()
            .map(|way| (*way, after[*way as usize] - self.ended_before[*way as usize]))
            .collect();
        let verdict = Verdict::of(&ended);
        let count = |way: Ended| ended.iter().find(|(other, _)| *other == way).map_or(0, |(_, n)| *n);
        let took = self.machine.began().map_or(Duration::ZERO, |began| now().duration_since(began));
        tracing::info!(
            verdict = verdict.to_string(),
            seconds = seconds(took),
            complete = count(Ended::Complete),
            streams_ended =
                [Ended::EventsEnded, Ended::PollEnded, Ended::WebSocketEnded].map(count).iter().sum::<u64>(),
            quiet_ended = count(Ended::QuietEnded),
            unsent = count(Ended::Unsent),
            unanswered = count(Ended::Unanswered),
            cut = count(Ended::Cut),
            "drained"
        );
        let line = format!("lameduck: drained in {:.1} s: {verdict}\n", took.as_secs_f64());
        termination_log::write(&self.plane.settings().termination_log, &(line + &self.plane.bypassed()));
        let mut published = lock(&self.published);
        published.drains[usize::from(!verdict.is_clean())] += 1;
        published.last = Some(took);
        published.verdict = Some(verdict.clone());
        drop(published);
        self.still = None;
        self.answer(&DrainOutcome::Drained { verdict });
    }

    fn answer(&mut self, outcome: &DrainOutcome) {
        let waiting = std::mem::take(&mut self.waiting);
        self.stop.answer(&self.plane, &self.events, waiting, outcome);
    }

    fn answer_holders(&mut self, held: HoldAnswer) {
        for holder in self.holders.drain(..) {
            let _ = holder.send(held);
        }
    }

    /// Answers callers that arrive after the drain, or after the app's hook has been answered.
    fn answer_late_callers(&mut self) {
        if self.machine.phase() == Phase::Drained {
            let verdict = lock(&self.published).verdict.clone().unwrap_or(Verdict::Clean);
            self.answer(&DrainOutcome::Drained { verdict });
        } else if self.hook_released && self.machine.restarting() {
            self.answer(&DrainOutcome::AppMayStop);
        }
    }

    /// Logs the new deadline if a trigger has moved the deadline of a running drain. `before` is when the drain began
    /// and its previous deadline.
    fn log_new_deadline(&self, trigger: Trigger, before: (Option<Instant>, Option<Instant>)) {
        let (began, deadline) = (self.machine.began(), self.machine.deadline());
        if before.0.is_some() && before.0 == began && before.1 != deadline {
            let (trigger, left) = (trigger_name(trigger), deadline.map(seconds_until));
            tracing::info!(trigger, deadline_s = left, "the drain's deadline is another one now");
        }
    }

    fn log_still(&mut self) {
        self.still = Some(now() + PROGRESS_INTERVAL);
        let in_flight = self.plane.gate().in_flight();
        if in_flight == 0 {
            return;
        }
        let rows = self.plane.ledger();
        let name = |row: &LedgerRow| {
            format!("{} {} {}s {} {}", row.method, row.path, row.age_ms / 1000, row.class, row.peer)
        };
        let oldest: Vec<_> = rows.iter().take(MAX_NAMED).map(name).collect();
        let phase = self.machine.phase().name();
        tracing::info!(phase, in_flight, oldest = oldest.join(", "), "still draining");
    }

    fn publish(&self) {
        let mut published = lock(&self.published);
        published.phase = Some(self.machine.phase());
        published.trigger = self.machine.trigger();
        published.restarting = self.machine.restarting();
        published.hold = self.machine.held_until().map(|until| (until, self.machine.held_idle()));
        published.round = self.machine.round();
        published.began = self.machine.began();
        published.deadline = self.machine.deadline();
    }

    fn counts(&self) -> Counts {
        let gate = self.plane.gate();
        // Read the listener first and the requests last, so that work that moves on in between is still seen.
        let listening = self.listeners.is_listening();
        let connections = gate.connections();
        // A request that becomes held or is released in between must count as running, never as held.
        let before = gate.held();
        let (in_flight, streams) = gate.in_flight_and_streams();
        let held = gate.held().min(before);
        let (arrived, last_arrival) = self.plane.arrivals();
        Counts {
            running: in_flight.saturating_sub(held),
            kept: streams,
            held: held.min(in_flight),
            connections,
            listening,
            last_arrival,
            mean_gap: self.arrivals.mean_gap(now(), arrived),
        }
    }
}

/// Watches the app during a restart: sends an event each time it has gone and each time it is back. The machine decides
/// which of them was the restart.
async fn watch_app(plane: Arc<dyn DataPlane>, events: mpsc::UnboundedSender<Order>) {
    let ready = &plane.settings().ready;
    loop {
        any_gone(plane.app()).await;
        let _ = events.send(Order::Event(Event::AppGone));
        while !readiness::silent(&plane.app(), &ready.check, ready.timeout).await.is_empty() {
            tokio::time::sleep(APP_CHECK_INTERVAL).await;
        }
        let _ = events.send(Order::Event(Event::AppBack));
    }
}

/// Returns once one of these has [`gone`]: other containers' ports stay while one container restarts. An app without
/// addresses can't be watched, so it counts as gone after a moment.
async fn any_gone(app: Vec<UpstreamAddr>) {
    let mut all: JoinSet<()> = app.into_iter().map(gone).collect();
    if all.join_next().await.is_none() {
        tokio::time::sleep(STEADY_TIME).await;
    }
}

/// Returns once the app's port has closed, or once the app has restarted. One connection is kept open, because its end
/// reveals even a restart that is over between two checks. A process that exits closes its connections one by one while
/// the kernel still accepts new ones for a moment, so only a connection that stays open shows that the app is back.
async fn gone(addr: UpstreamAddr) {
    let mut closed = false;
    while let Ok(mut app) = upstream::connect(&addr).await {
        let since = now();
        // Nothing is sent on the connection, so both a byte and an end mean that the app has given it up.
        let ended =
            tokio::time::timeout(STEADY_TIME, std::future::poll_fn(|cx| app.poll_end(cx))).await.is_ok();
        match ended {
            true if now().duration_since(since) < MIN_CONNECTION_TIME => {
                tokio::time::sleep(APP_CHECK_INTERVAL).await;
            }
            true => closed = true,
            false if closed => return,
            false => {}
        }
    }
}

fn seconds_until(at: Instant) -> f64 {
    at.saturating_duration_since(now()).as_secs_f64().round()
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
