//! The drain as a pure state machine: `step(now, event, counts) → effects`. It has no tokio, no sockets and no clock
//! of its own.

use std::time::{Duration, Instant};

use crate::config::{DrainSettings, Sidecar};

/// Where a drain stands. Phases go forward only; a resume starts a new round at `Serving`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Phase {
    /// No drain.
    Serving = 0,
    /// Still accepts connections, and asks every client to go elsewhere.
    LameDuck = 1,
    /// New connections are refused; running requests may finish.
    Draining = 2,
    /// The deadline has passed: remaining work is ended so that its client can tell.
    Forcing = 3,
    /// Nothing is in flight and nothing can arrive any more.
    Drained = 4,
}

impl Phase {
    /// The phase with this number; any number beyond the last is `Drained`.
    pub fn from_u8(n: u8) -> Self {
        match n {
            0 => Self::Serving,
            1 => Self::LameDuck,
            2 => Self::Draining,
            3 => Self::Forcing,
            _ => Self::Drained,
        }
    }

    /// The name used in logs, status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::LameDuck => "lame-duck",
            Self::Draining => "draining",
            Self::Forcing => "forcing",
            Self::Drained => "drained",
        }
    }
}

/// What started a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// SIGTERM, SIGINT or SIGQUIT to the proxy itself.
    Signal,
    /// `lameduck drain`. Without a timeout it has no deadline; during a drain, a timeout can only bring the deadline
    /// forward.
    Operator {
        /// Time from the arrival of the trigger to Forcing.
        timeout: Option<Duration>,
    },
    /// `/drain` without the name of a hook: the whole pod is being deleted.
    Hook,
    /// `/drain?hook=app`, the app's preStop hook. On its own it means that only the app restarts.
    AppHook,
    /// `/drain?hook=sidecar`, the sidecar's own preStop hook: the pod is being deleted.
    SidecarHook,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A trigger arrived.
    Begin(Trigger),
    /// During a restart of the app: its port and its connections have closed.
    AppGone,
    /// During a restart of the app: it answers again.
    AppBack,
    /// During a restart of the app: the callers of its hook have been answered and its own hook has ended, so SIGTERM
    /// is next.
    AppStops,
    /// `lameduck hold`. During a hold, this starts it again from the beginning.
    Hold {
        /// The longest time that new requests wait.
        max: Duration,
        /// WebSockets, event streams and long polls stay, and the hold does not wait for them.
        keep_streams: bool,
    },
    /// `lameduck resume`.
    Resume,
    /// Ends a hold and nothing else: a drain that has begun meanwhile continues.
    Release,
    /// A second signal: stop waiting.
    Force,
    /// Only the time and the counts have changed.
    Tick,
}

/// The current state of the gate and the listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Requests and tunnels in flight that are not held.
    pub running: u64,
    /// WebSockets, event streams and long polls among the running ones, which a hold may keep.
    pub kept: u64,
    /// Requests that are held.
    pub held: u64,
    /// Client connections on which a request can still arrive.
    pub connections: u64,
    /// Whether a listening socket is still open.
    pub listening: bool,
    /// When the last connection or request arrived; `None` if none ever did.
    pub last_arrival: Option<Instant>,
    /// The mean gap between callers in the last 30 s, from [`crate::drain::quiet`]; `None` with too few callers.
    pub mean_gap: Option<Duration>,
}

/// An action for the caller of [`Machine::step`]. Carry effects out in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Publish this phase.
    Enter(Phase),
    /// Hold new requests without closing connections, because the app restarts or is being replaced.
    Hold,
    /// Report that nothing is running any more during a hold.
    Idle,
    /// Release the held requests.
    Release,
    /// Answer the app's hook without a drain: running requests have finished, or `restart_grace` is over.
    ReleaseHook,
    /// Accept what is in the accept queue, then close the listening sockets.
    StopListening,
    /// End WebSockets, event streams and long polls, spread over a period.
    EndStreams {
        /// The period, already clamped to the deadline.
        spread: Duration,
    },
    /// Close the idle connections, because nothing is running.
    CloseIdle,
    /// Listen again after a resume.
    Listen,
    /// End the process at once; it may take up to 1.5 s.
    Exit,
}

/// How long to wait for the sidecar's hook after the app's. Both hooks of a deleted pod fire together (5 ms apart on a
/// real cluster), so an app's hook without the other means that only the app restarts.
const OTHER_HOOK_TIMEOUT: Duration = Duration::from_secs(2);

/// Time for ending the remaining work in Forcing. Work that cannot be ended is abandoned after it.
const FORCING_TIMEOUT: Duration = Duration::from_secs(1);

/// The state of the drain. The runner must feed a `Tick` when the number in flight drops to 0, when the last connection
/// or the listener closes, and at `wake_at`; it must carry out the effects that `step` returns, in order.
#[derive(Debug)]
pub struct Machine {
    settings: DrainSettings,
    sidecar: Sidecar,
    state: MachineState,
    round: u32,
    /// The latest time seen, so that time never runs backwards inside the machine.
    latest: Option<Instant>,
}

#[derive(Debug)]
enum MachineState {
    Serving,
    Restart(Restart),
    Hold(Hold),
    Drain(Drain),
}

/// The app's hook has been called, so far without the sidecar's.
#[derive(Debug)]
struct Restart {
    arrived: Instant,
    /// The quiet window, used if this turns out to be a drain.
    window: Duration,
    /// The other hook was not called in time, so requests are held.
    holding: bool,
    hook_released: Option<Instant>,
    /// The app's SIGTERM is due.
    stops: bool,
    /// The app's port has closed.
    gone: bool,
}

/// An operator is replacing the app.
#[derive(Debug)]
struct Hold {
    until: Instant,
    keep_streams: bool,
    /// `Effect::Idle` has been issued.
    idle: bool,
}

#[derive(Debug)]
struct Drain {
    /// Never `Serving`.
    phase: Phase,
    trigger: Trigger,
    began: Instant,
    /// The callers are considered to know of the drain once nothing has arrived for this long.
    window: Duration,
    deadline: Option<Instant>,
    /// A deletion hook has set the deadline. The kubelet may call twice, and only the first call counts.
    hooked: bool,
    /// The listener has been asked to close.
    stopped: bool,
    forced: Option<Instant>,
    /// Connections left at the last check if nothing was running then; 0 otherwise.
    idle: u64,
}

impl Machine {
    /// Creates a machine in `Serving`. `sidecar` decides what a signal and the app's hook mean.
    pub fn new(settings: DrainSettings, sidecar: Sidecar) -> Self {
        Self { settings, sidecar, state: MachineState::Serving, round: 0, latest: None }
    }

    /// The current phase. It is `Serving` during a restart of the app or a hold.
    pub fn phase(&self) -> Phase {
        self.drain().map_or(Phase::Serving, |drain| drain.phase)
    }

    /// Number of drains resumed so far.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// What began the drain; `None` outside a drain. It is `AppHook` if the sidecar's hook followed the app's in time.
    pub fn trigger(&self) -> Option<Trigger> {
        self.drain().map(|drain| drain.trigger)
    }

    /// T0, when the drain began; `None` outside a drain.
    pub fn began(&self) -> Option<Instant> {
        self.drain().map(|drain| drain.began)
    }

    /// When Forcing begins at the latest; `None` outside a drain or if the drain has no time limit.
    pub fn deadline(&self) -> Option<Instant> {
        self.drain().and_then(|drain| drain.deadline)
    }

    /// Whether requests are held because only the app restarts.
    pub fn restarting(&self) -> bool {
        matches!(&self.state, MachineState::Restart(restart) if restart.holding)
    }

    /// When an operator's hold ends at the latest; `None` without one.
    pub fn held_until(&self) -> Option<Instant> {
        self.hold().map(|hold| hold.until)
    }

    /// Whether an operator's hold has reached the point where nothing was running any more.
    pub fn held_idle(&self) -> bool {
        self.hold().is_some_and(|hold| hold.idle)
    }

    /// Whether the app has reacted to the SIGTERM of its restart, that is, its port has closed since.
    pub fn app_stopped(&self) -> bool {
        matches!(&self.state, MachineState::Restart(restart) if restart.stops && restart.gone)
    }

    /// Whether there is no drain, no restart and no hold.
    pub fn is_inactive(&self) -> bool {
        matches!(self.state, MachineState::Serving)
    }

    /// Processes one event and returns the effects to carry out, in order. A `now` before an earlier one counts as the
    /// earlier one.
    pub fn step(&mut self, now: Instant, event: Event, counts: &Counts) -> Vec<Effect> {
        let now = self.latest.map_or(now, |latest| latest.max(now));
        self.latest = Some(now);
        let mut effects = Vec::new();
        match event {
            Event::Begin(Trigger::Signal) if self.sidecar == Sidecar::Native => {
                self.exit(now, counts, &mut effects);
                return effects;
            }
            Event::Begin(trigger) => self.begin(now, trigger, counts, &mut effects),
            Event::AppGone => self.app_gone(),
            Event::AppStops => self.app_stops(),
            Event::AppBack => self.app_back(&mut effects),
            Event::Hold { max, keep_streams } => {
                self.hold_requests(later(now, max), keep_streams, &mut effects);
                // The counts are older than the hold, so don't use them; `wake_at` asks for new ones at once.
                return effects;
            }
            Event::Resume => self.resume(&mut effects),
            Event::Release if self.hold().is_some() => self.resume(&mut effects),
            Event::Release => {}
            Event::Force => self.force(now, counts, &mut effects),
            Event::Tick => {}
        }
        match &mut self.state {
            MachineState::Serving => {}
            MachineState::Restart(restart) => {
                if restart.advance(now, counts, &self.settings, &mut effects) {
                    self.state = MachineState::Serving;
                }
            }
            MachineState::Hold(hold) => {
                if hold.advance(now, counts, &mut effects) {
                    self.state = MachineState::Serving;
                }
            }
            MachineState::Drain(drain) => drain.advance(now, counts, &self.settings, &mut effects),
        }
        effects
    }

    /// When the next `Tick` is due, which may be at once; `None` if only events and counts matter.
    pub fn wake_at(&self, counts: &Counts) -> Option<Instant> {
        match &self.state {
            MachineState::Serving => None,
            MachineState::Restart(restart) => restart.wake_at(self.latest, counts, &self.settings),
            MachineState::Hold(hold) => hold.wake_at(self.latest, counts),
            MachineState::Drain(drain) => drain.wake_at(counts, &self.settings),
        }
    }

    fn drain(&self) -> Option<&Drain> {
        match &self.state {
            MachineState::Drain(drain) => Some(drain),
            MachineState::Serving | MachineState::Restart(_) | MachineState::Hold(_) => None,
        }
    }

    fn hold(&self) -> Option<&Hold> {
        match &self.state {
            MachineState::Hold(hold) => Some(hold),
            MachineState::Serving | MachineState::Restart(_) | MachineState::Drain(_) => None,
        }
    }

    fn begin(&mut self, now: Instant, trigger: Trigger, counts: &Counts, effects: &mut Vec<Effect>) {
        // Without a sidecar's hook, a restart and a deletion look the same, so assume that the pod is being deleted.
        let alone = trigger == Trigger::AppHook && self.sidecar == Sidecar::None;
        let trigger = if alone { Trigger::Hook } else { trigger };
        let deletion = !matches!(trigger, Trigger::Operator { .. });
        match &mut self.state {
            MachineState::Drain(drain) => drain.again(now, trigger, &self.settings, effects),
            MachineState::Serving | MachineState::Hold(_) if trigger == Trigger::AppHook => {
                self.release(effects);
                self.state = MachineState::Restart(Restart::new(now, quiet_window(counts, &self.settings)));
            }
            MachineState::Restart(_) if trigger == Trigger::AppHook => {}
            MachineState::Restart(Restart { holding: false, arrived, window, .. }) if deletion => {
                let (arrived, window) = (*arrived, *window);
                self.start(arrived, Trigger::AppHook, window, effects);
            }
            MachineState::Serving | MachineState::Restart(_) | MachineState::Hold(_) => {
                self.start(now, trigger, quiet_window(counts, &self.settings), effects);
            }
        }
    }

    /// Begins or restarts an operator's hold; ignored during a drain or a restart.
    fn hold_requests(&mut self, until: Instant, keep_streams: bool, effects: &mut Vec<Effect>) {
        match &mut self.state {
            MachineState::Serving => {
                self.state = MachineState::Hold(Hold { until, keep_streams, idle: false });
                effects.push(Effect::Hold);
            }
            MachineState::Hold(hold) => *hold = Hold { until, keep_streams, idle: false },
            MachineState::Restart(_) | MachineState::Drain(_) => return,
        }
        // No spread is needed: the clients are held when they reconnect, and released one after the other.
        effects.extend((!keep_streams).then_some(Effect::EndStreams { spread: Duration::ZERO }));
    }

    /// Releases held requests, if requests are being held.
    fn release(&self, effects: &mut Vec<Effect>) {
        if self.restarting() || self.hold().is_some() {
            effects.push(Effect::Release);
        }
    }

    fn start(&mut self, began: Instant, trigger: Trigger, window: Duration, effects: &mut Vec<Effect>) {
        self.release(effects);
        let mut drain = Drain::new(began, trigger, window, &self.settings);
        drain.enter(Phase::LameDuck, effects);
        self.state = MachineState::Drain(drain);
    }

    fn force(&mut self, now: Instant, counts: &Counts, effects: &mut Vec<Effect>) {
        if self.drain().is_none() {
            self.start(now, Trigger::Signal, quiet_window(counts, &self.settings), effects);
        }
        if let MachineState::Drain(drain) = &mut self.state {
            drain.force(now, effects);
        }
    }

    /// Handles a native sidecar's signal: the app has exited or the grace period is used up, so don't wait for
    /// anything.
    fn exit(&mut self, now: Instant, counts: &Counts, effects: &mut Vec<Effect>) {
        self.release(effects);
        if self.drain().is_none() {
            let window = quiet_window(counts, &self.settings);
            self.state = MachineState::Drain(Drain::new(now, Trigger::Signal, window, &self.settings));
        }
        if let MachineState::Drain(drain) = &mut self.state
            && drain.phase < Phase::Forcing
        {
            drain.forced = Some(now);
            drain.enter(Phase::Forcing, effects);
        }
        effects.push(Effect::Exit);
    }

    fn resume(&mut self, effects: &mut Vec<Effect>) {
        match &self.state {
            MachineState::Drain(drain) => {
                effects.push(Effect::Enter(Phase::Serving));
                effects.extend(drain.stopped.then_some(Effect::Listen));
                self.round += 1;
            }
            MachineState::Restart(restart) if restart.holding => {
                effects.push(Effect::Release);
                // Nothing else would answer the hook's callers.
                effects.extend(restart.hook_released.is_none().then_some(Effect::ReleaseHook));
            }
            MachineState::Hold(_) => effects.push(Effect::Release),
            MachineState::Serving | MachineState::Restart(_) => return,
        }
        self.state = MachineState::Serving;
    }

    fn app_gone(&mut self) {
        if let MachineState::Restart(restart) = &mut self.state {
            restart.gone = true;
        }
    }

    fn app_stops(&mut self) {
        if let MachineState::Restart(restart) = &mut self.state {
            restart.stops = restart.hook_released.is_some();
        }
    }

    /// The kubelet stops the app only after its hooks have ended, so a port that closed briefly before was no restart.
    fn app_back(&mut self, effects: &mut Vec<Effect>) {
        let MachineState::Restart(restart) = &mut self.state else { return };
        if restart.gone && restart.stops {
            effects.push(Effect::Release);
            self.state = MachineState::Serving;
        } else {
            restart.gone = false;
        }
    }
}

impl Restart {
    fn new(arrived: Instant, window: Duration) -> Self {
        Self { arrived, window, holding: false, hook_released: None, stops: false, gone: false }
    }

    /// Advances the restart. Returns whether it is over because the app was never stopped.
    fn advance(
        &mut self,
        now: Instant,
        counts: &Counts,
        settings: &DrainSettings,
        effects: &mut Vec<Effect>,
    ) -> bool {
        if !self.holding {
            if now >= later(self.arrived, OTHER_HOOK_TIMEOUT) {
                self.holding = true;
                // Streams don't end on their own, and the app's exit would cut them. Their clients are held when they
                // reconnect.
                effects.extend([Effect::Hold, Effect::EndStreams { spread: Duration::ZERO }]);
            }
            // The counts are older than the hold, so don't use them; `wake_at` asks for new ones at once.
            return false;
        }
        let Some(released) = self.hook_released else {
            if counts.running == 0 || now >= later(self.arrived, settings.restart_grace) {
                self.hook_released = Some(now);
                effects.push(Effect::ReleaseHook);
            }
            return false;
        };
        let over = !self.gone && now >= later(released, settings.grace);
        effects.extend(over.then_some(Effect::Release));
        over
    }

    fn wake_at(&self, now: Option<Instant>, counts: &Counts, settings: &DrainSettings) -> Option<Instant> {
        match self.hook_released {
            _ if !self.holding => Some(later(self.arrived, OTHER_HOOK_TIMEOUT)),
            None if counts.running == 0 => now,
            None => Some(later(self.arrived, settings.restart_grace)),
            Some(_) if self.gone => None,
            Some(released) => Some(later(released, settings.grace)),
        }
    }
}

impl Hold {
    /// Advances the hold. Returns whether its time is over.
    fn advance(&mut self, now: Instant, counts: &Counts, effects: &mut Vec<Effect>) -> bool {
        if !self.idle && self.is_idle(counts) {
            self.idle = true;
            effects.push(Effect::Idle);
        }
        let over = now >= self.until;
        effects.extend(over.then_some(Effect::Release));
        over
    }

    fn wake_at(&self, now: Option<Instant>, counts: &Counts) -> Option<Instant> {
        if !self.idle && self.is_idle(counts) { now } else { Some(self.until) }
    }

    fn is_idle(&self, counts: &Counts) -> bool {
        let kept = if self.keep_streams { counts.kept } else { 0 };
        counts.running <= kept
    }
}

impl Drain {
    fn new(began: Instant, trigger: Trigger, window: Duration, settings: &DrainSettings) -> Self {
        let deadline = match trigger {
            Trigger::Operator { timeout } => timeout.map(|timeout| later(began, timeout)),
            _ => Some(later(began, settings.deadline())),
        };
        Self {
            phase: Phase::LameDuck,
            trigger,
            began,
            window,
            deadline,
            hooked: matches!(trigger, Trigger::Hook | Trigger::AppHook | Trigger::SidecarHook),
            stopped: false,
            forced: None,
            idle: 0,
        }
    }

    /// Handles another trigger. Only the deadline may change: the kubelet's grace period begins with the deletion, and
    /// an operator may want an earlier end.
    fn again(&mut self, now: Instant, trigger: Trigger, settings: &DrainSettings, effects: &mut Vec<Effect>) {
        if self.phase >= Phase::Forcing {
            return;
        }
        let before = self.deadline;
        let anew = later(now, settings.deadline());
        match trigger {
            Trigger::Hook | Trigger::SidecarHook if !self.hooked => {
                self.hooked = true;
                self.deadline = Some(anew);
            }
            Trigger::Signal => self.no_later_than(anew),
            Trigger::Operator { timeout: Some(timeout) } => self.no_later_than(later(now, timeout)),
            _ => {}
        }
        let sooner = self.deadline.is_some_and(|deadline| before.is_none_or(|before| deadline < before));
        if self.phase == Phase::Draining && sooner {
            // Streams may be spread over more time than is left now.
            effects.push(self.end_streams(now, settings));
        }
    }

    fn end_streams(&self, now: Instant, settings: &DrainSettings) -> Effect {
        let left = self.deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(now));
        Effect::EndStreams { spread: settings.stream_spread.min(left) }
    }

    fn no_later_than(&mut self, at: Instant) {
        self.deadline = Some(self.deadline.map_or(at, |deadline| deadline.min(at)));
    }

    fn enter(&mut self, phase: Phase, effects: &mut Vec<Effect>) {
        self.phase = phase;
        effects.push(Effect::Enter(phase));
    }

    fn stop_listening(&mut self, effects: &mut Vec<Effect>) {
        self.enter(Phase::Draining, effects);
        self.stopped = true;
        effects.push(Effect::StopListening);
    }

    fn force(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if self.phase == Phase::LameDuck {
            self.stop_listening(effects);
        }
        if self.phase == Phase::Draining {
            self.forced = Some(now);
            self.enter(Phase::Forcing, effects);
        }
    }

    /// Advances through the phases as far as time and the counts allow.
    fn advance(
        &mut self,
        now: Instant,
        counts: &Counts,
        settings: &DrainSettings,
        effects: &mut Vec<Effect>,
    ) {
        let due = self.deadline.is_some_and(|deadline| now >= deadline);
        if self.phase == Phase::LameDuck && !due && now >= self.lame_duck_end(counts, settings) {
            self.stop_listening(effects);
            effects.push(self.end_streams(now, settings));
        }
        let idle = counts.running + counts.held == 0 && !counts.listening;
        let empty = idle && counts.connections == 0;
        // The last work may end exactly at the deadline; then nothing is left to force.
        if due && !(empty && self.phase == Phase::Draining) {
            self.force(now, effects);
        }
        let given_up = self.forced.is_some_and(|forced| now >= later(forced, FORCING_TIMEOUT));
        match self.phase {
            Phase::Draining | Phase::Forcing if empty || given_up => self.enter(Phase::Drained, effects),
            Phase::Draining => self.close_idle(if idle { counts.connections } else { 0 }, effects),
            _ => {}
        }
    }

    /// Closes idle connections once each time everything has become idle, and again if connections were added since.
    fn close_idle(&mut self, idle: u64, effects: &mut Vec<Effect>) {
        if idle > self.idle {
            effects.push(Effect::CloseIdle);
        }
        self.idle = idle;
    }

    /// When the lame duck ends: once its minimum is over and arrivals have been quiet, or at its maximum.
    fn lame_duck_end(&self, counts: &Counts, settings: &DrainSettings) -> Instant {
        let least = later(self.began, settings.lame_duck);
        let quiet = counts.last_arrival.map_or(least, |arrival| later(arrival, self.window));
        least.max(quiet).min(later(self.began, settings.lame_duck_max()))
    }

    fn wake_at(&self, counts: &Counts, settings: &DrainSettings) -> Option<Instant> {
        match self.phase {
            Phase::LameDuck => {
                let end = self.lame_duck_end(counts, settings);
                Some(self.deadline.map_or(end, |deadline| deadline.min(end)))
            }
            Phase::Draining => self.deadline,
            Phase::Forcing => self.forced.map(|forced| later(forced, FORCING_TIMEOUT)),
            Phase::Serving | Phase::Drained => None,
        }
    }
}

/// How long nothing may arrive until the callers count as quiet: seven mean gaps, within 1 s and 10 s. With random
/// arrivals, seven mean gaps without a call happen by chance with a probability of 0.1 % (e⁻⁷). Without a lame duck
/// there is no load balancer to wait for, so the maximum is 1 s.
fn quiet_window(counts: &Counts, settings: &DrainSettings) -> Duration {
    let max = Duration::from_secs(if settings.lame_duck.is_zero() { 1 } else { 10 });
    let gap = counts.mean_gap.unwrap_or_default();
    gap.saturating_mul(7).clamp(Duration::from_secs(1), max)
}

/// `at + wait`, with `wait` capped at a century so that the sum cannot overflow.
fn later(at: Instant, wait: Duration) -> Instant {
    at + wait.min(Duration::from_secs(100 * 365 * 86_400))
}
