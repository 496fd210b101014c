//! The drain as a pure machine: `step(now, event, counts) → effects`. No tokio, no sockets, no clock of its own.

use std::time::{Duration, Instant};

use crate::config::{DrainSettings, Sidecar};

/// Where a drain stands. Phases go forward only; a resume starts a new round at `Serving`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Phase {
    /// No drain.
    Serving = 0,
    /// Still accepts, and tells every client to go elsewhere.
    LameDuck = 1,
    /// New connections are refused; what runs may finish.
    Draining = 2,
    /// The deadline has passed: what is left is ended visibly.
    Forcing = 3,
    /// Nothing is in flight and nothing can come in any more.
    Drained = 4,
}

impl Phase {
    /// The phase whose number this is; anything past the last is `Drained`.
    pub fn from_u8(n: u8) -> Self {
        match n {
            0 => Self::Serving,
            1 => Self::LameDuck,
            2 => Self::Draining,
            3 => Self::Forcing,
            _ => Self::Drained,
        }
    }

    /// As it stands in logs, status and metrics.
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
    /// `lameduck drain`; without a timeout it has no deadline. Of a drain that runs a timeout brings the deadline forward.
    Operator {
        /// From its arrival to Forcing.
        timeout: Option<Duration>,
    },
    /// `/drain`, which doesn't say whose hook it is: the whole pod goes.
    Hook,
    /// `/drain?hook=app`: the app's preStop. Alone it means that only the app restarts.
    AppHook,
    /// `/drain?hook=sidecar`: the sidecar's own preStop, so the pod goes.
    SidecarHook,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A trigger arrived.
    Begin(Trigger),
    /// While the app restarts: its port closed, its connections died.
    AppGone,
    /// While the app restarts: it answers again.
    AppBack,
    /// While the app restarts: its hook's callers have their answer and its own hook has ended, so SIGTERM comes now.
    AppStops,
    /// `lameduck hold`; one that runs already begins anew.
    Hold {
        /// How long new requests wait at most.
        most: Duration,
        /// WebSockets, event streams and long polls stay, and aren't waited for.
        keep_streams: bool,
    },
    /// `lameduck resume`.
    Resume,
    /// The end of a hold, and of nothing else: a drain that came meanwhile goes on.
    Release,
    /// Don't wait any longer: a second signal.
    Force,
    /// Nothing but time and the counts changed.
    Tick,
}

/// The world at this moment, as the gate and the listeners tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Requests, tunnels and leases in flight that are not held.
    pub running: u64,
    /// How many of those running are WebSockets, event streams and long polls that a hold keeps.
    pub kept: u64,
    /// Requests held back.
    pub held: u64,
    /// Client connections over which a request could still come.
    pub connections: u64,
    /// Whether a listening socket is still open.
    pub listening: bool,
    /// When the last connection or request arrived, if one ever did.
    pub last_arrival: Option<Instant>,
    /// The mean gap between callers in the 30 s up to now, as [`crate::drain::quiet`] has it; none when nobody came.
    pub mean_gap: Option<Duration>,
}

/// What is to be done now, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Publish this phase.
    Enter(Phase),
    /// New requests wait, no connection closes: the app restarts or is replaced.
    Hold,
    /// Nothing runs any more while new requests wait.
    Idle,
    /// Let the held requests go.
    Release,
    /// The app's hook may return although nothing was drained: what ran has finished, or `restart_grace` is over.
    ReleaseHook,
    /// Take what is in the accept queue, then close the listening sockets.
    StopListening,
    /// WebSockets, event streams and long polls end, spread over this time.
    EndStreams {
        /// Already clamped to the deadline.
        spread: Duration,
    },
    /// Nothing runs: close the connections that are idle.
    CloseIdle,
    /// A resume: listen again.
    Listen,
    /// End the process at once, within 1.5 s.
    Exit,
}

/// Both hooks of a deleted pod fire together (5 ms apart on a real cluster): an app's hook that is alone for so long
/// means a restart.
const OTHER_HOOK: Duration = Duration::from_secs(2);

/// Cutting what is left takes a moment. What cannot be cut is not waited for any longer than this.
const FORCING: Duration = Duration::from_secs(1);

/// The drain's state. Whoever runs it feeds a `Tick` when in flight falls to 0, when the last connection or the
/// listener has closed, and at `wake_at`; and carries out what `step` returns, in order.
#[derive(Debug)]
pub struct Machine {
    settings: DrainSettings,
    sidecar: Sidecar,
    state: State,
    round: u32,
    /// The latest time seen, so that time never runs backwards in here.
    latest: Option<Instant>,
}

#[derive(Debug)]
enum State {
    Serving,
    Restart(Restart),
    Hold(Hold),
    Drain(Drain),
}

/// The app's hook came, so far alone.
#[derive(Debug)]
struct Restart {
    arrived: Instant,
    /// The quiet window, in case it turns out to be a drain.
    window: Duration,
    /// The other hook didn't come: requests are held.
    holding: bool,
    hook_released: Option<Instant>,
    /// Its SIGTERM is due.
    stops: bool,
    /// The app's port is closed.
    gone: bool,
}

/// An operator replaces the app.
#[derive(Debug)]
struct Hold {
    until: Instant,
    keep_streams: bool,
    /// It was said that nothing runs any more.
    idle: bool,
}

#[derive(Debug)]
struct Drain {
    /// Never `Serving`.
    phase: Phase,
    trigger: Trigger,
    began: Instant,
    /// No arrival for so long means that the callers have heard.
    window: Duration,
    deadline: Option<Instant>,
    /// The deadline is already a deletion hook's: the kubelet may call twice.
    hooked: bool,
    /// The listener was told to close.
    stopped: bool,
    forced: Option<Instant>,
    /// Connections left at the last look while nothing ran; 0 while something did.
    idle: u64,
}

impl Machine {
    /// A machine that serves. `sidecar` decides what a signal and the app's hook mean.
    pub fn new(settings: DrainSettings, sidecar: Sidecar) -> Self {
        Self { settings, sidecar, state: State::Serving, round: 0, latest: None }
    }

    /// The phase that was last entered. While the app restarts it is `Serving`.
    pub fn phase(&self) -> Phase {
        self.drain().map_or(Phase::Serving, |drain| drain.phase)
    }

    /// How many drains were resumed so far.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// What began the drain; none without one. `AppHook` if the sidecar's hook came soon after the app's.
    pub fn trigger(&self) -> Option<Trigger> {
        self.drain().map(|drain| drain.trigger)
    }

    /// T0, when the drain began; none without one.
    pub fn began(&self) -> Option<Instant> {
        self.drain().map(|drain| drain.began)
    }

    /// When Forcing begins at the latest; none without a drain, or if it may take as long as it takes.
    pub fn deadline(&self) -> Option<Instant> {
        self.drain().and_then(|drain| drain.deadline)
    }

    /// Whether requests are held because only the app restarts.
    pub fn restarting(&self) -> bool {
        matches!(&self.state, State::Restart(restart) if restart.holding)
    }

    /// Until when requests are held for an operator at most; none if they aren't.
    pub fn held_until(&self) -> Option<Instant> {
        self.hold().map(|hold| hold.until)
    }

    /// Whether nothing ran any more since requests are held for an operator.
    pub fn held_idle(&self) -> bool {
        self.hold().is_some_and(|hold| hold.idle)
    }

    /// Whether the app has heard the SIGTERM of its restart: its port has closed since.
    pub fn app_stopped(&self) -> bool {
        matches!(&self.state, State::Restart(restart) if restart.stops && restart.gone)
    }

    /// Whether nothing is under way: no drain, no restart and no hold.
    pub fn rests(&self) -> bool {
        matches!(self.state, State::Serving)
    }

    /// Feeds one event; returns what is to be done now, in order.
    /// A `now` before an earlier one counts as that one.
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
            Event::Hold { most, keep_streams } => {
                self.hold_requests(later(now, most), keep_streams, &mut effects);
                // The counts are older than the hold: `wake_at` asks for new ones at once.
                return effects;
            }
            Event::Resume => self.resume(&mut effects),
            Event::Release if self.hold().is_some() => self.resume(&mut effects),
            Event::Release => {}
            Event::Force => self.force(now, counts, &mut effects),
            Event::Tick => {}
        }
        match &mut self.state {
            State::Serving => {}
            State::Restart(restart) => {
                if restart.advance(now, counts, &self.settings, &mut effects) {
                    self.state = State::Serving;
                }
            }
            State::Hold(hold) => {
                if hold.advance(now, counts, &mut effects) {
                    self.state = State::Serving;
                }
            }
            State::Drain(drain) => drain.advance(now, counts, &self.settings, &mut effects),
        }
        effects
    }

    /// When a `Tick` is needed at the latest, perhaps at once; none if only events and counts matter.
    pub fn wake_at(&self, counts: &Counts) -> Option<Instant> {
        match &self.state {
            State::Serving => None,
            State::Restart(restart) => restart.wake_at(self.latest, counts, &self.settings),
            State::Hold(hold) => hold.wake_at(self.latest, counts),
            State::Drain(drain) => drain.wake_at(counts, &self.settings),
        }
    }

    fn drain(&self) -> Option<&Drain> {
        match &self.state {
            State::Drain(drain) => Some(drain),
            State::Serving | State::Restart(_) | State::Hold(_) => None,
        }
    }

    fn hold(&self) -> Option<&Hold> {
        match &self.state {
            State::Hold(hold) => Some(hold),
            State::Serving | State::Restart(_) | State::Drain(_) => None,
        }
    }

    fn begin(&mut self, now: Instant, trigger: Trigger, counts: &Counts, effects: &mut Vec<Effect>) {
        // Without a sidecar's own hook there is no telling: the pod goes.
        let alone = trigger == Trigger::AppHook && self.sidecar == Sidecar::None;
        let trigger = if alone { Trigger::Hook } else { trigger };
        let deletion = !matches!(trigger, Trigger::Operator { .. });
        match &mut self.state {
            State::Drain(drain) => drain.again(now, trigger, &self.settings, effects),
            State::Serving | State::Hold(_) if trigger == Trigger::AppHook => {
                self.release(effects);
                self.state = State::Restart(Restart::new(now, quiet_window(counts, &self.settings)));
            }
            State::Restart(_) if trigger == Trigger::AppHook => {}
            State::Restart(Restart { holding: false, arrived, window, .. }) if deletion => {
                let (arrived, window) = (*arrived, *window);
                self.start(arrived, Trigger::AppHook, window, effects);
            }
            State::Serving | State::Restart(_) | State::Hold(_) => {
                self.start(now, trigger, quiet_window(counts, &self.settings), effects);
            }
        }
    }

    /// Only where nothing else is under way.
    fn hold_requests(&mut self, until: Instant, keep_streams: bool, effects: &mut Vec<Effect>) {
        match &mut self.state {
            State::Serving => {
                self.state = State::Hold(Hold { until, keep_streams, idle: false });
                effects.push(Effect::Hold);
            }
            State::Hold(hold) => *hold = Hold { until, keep_streams, idle: false },
            State::Restart(_) | State::Drain(_) => return,
        }
        // At once: their clients are held when they come again, and let go one after the other.
        effects.extend((!keep_streams).then_some(Effect::EndStreams { spread: Duration::ZERO }));
    }

    /// Whoever is held is held no longer.
    fn release(&self, effects: &mut Vec<Effect>) {
        if self.restarting() || self.hold().is_some() {
            effects.push(Effect::Release);
        }
    }

    fn start(&mut self, began: Instant, trigger: Trigger, window: Duration, effects: &mut Vec<Effect>) {
        self.release(effects);
        let mut drain = Drain::new(began, trigger, window, &self.settings);
        drain.enter(Phase::LameDuck, effects);
        self.state = State::Drain(drain);
    }

    fn force(&mut self, now: Instant, counts: &Counts, effects: &mut Vec<Effect>) {
        if self.drain().is_none() {
            self.start(now, Trigger::Signal, quiet_window(counts, &self.settings), effects);
        }
        if let State::Drain(drain) = &mut self.state {
            drain.force(now, effects);
        }
    }

    /// A native sidecar's signal: the app has exited or the grace is used up, so nothing is worth waiting for.
    fn exit(&mut self, now: Instant, counts: &Counts, effects: &mut Vec<Effect>) {
        self.release(effects);
        if self.drain().is_none() {
            let window = quiet_window(counts, &self.settings);
            self.state = State::Drain(Drain::new(now, Trigger::Signal, window, &self.settings));
        }
        if let State::Drain(drain) = &mut self.state
            && drain.phase < Phase::Forcing
        {
            drain.forced = Some(now);
            drain.enter(Phase::Forcing, effects);
        }
        effects.push(Effect::Exit);
    }

    fn resume(&mut self, effects: &mut Vec<Effect>) {
        match &self.state {
            State::Drain(drain) => {
                effects.push(Effect::Enter(Phase::Serving));
                effects.extend(drain.stopped.then_some(Effect::Listen));
                self.round += 1;
            }
            State::Restart(restart) if restart.holding => {
                effects.push(Effect::Release);
                // Nothing else would ever answer it.
                effects.extend(restart.hook_released.is_none().then_some(Effect::ReleaseHook));
            }
            State::Hold(_) => effects.push(Effect::Release),
            State::Serving | State::Restart(_) => return,
        }
        self.state = State::Serving;
    }

    fn app_gone(&mut self) {
        if let State::Restart(restart) = &mut self.state {
            restart.gone = true;
        }
    }

    fn app_stops(&mut self) {
        if let State::Restart(restart) = &mut self.state {
            restart.stops = restart.hook_released.is_some();
        }
    }

    /// The kubelet stops the app only once its hooks have ended, so a port that blinked before was no restart.
    fn app_back(&mut self, effects: &mut Vec<Effect>) {
        let State::Restart(restart) = &mut self.state else { return };
        if restart.gone && restart.stops {
            effects.push(Effect::Release);
            self.state = State::Serving;
        } else {
            restart.gone = false;
        }
    }
}

impl Restart {
    fn new(arrived: Instant, window: Duration) -> Self {
        Self { arrived, window, holding: false, hook_released: None, stops: false, gone: false }
    }

    /// Whether nothing came of it: the app was never stopped.
    fn advance(
        &mut self,
        now: Instant,
        counts: &Counts,
        settings: &DrainSettings,
        effects: &mut Vec<Effect>,
    ) -> bool {
        if !self.holding {
            if now >= later(self.arrived, OTHER_HOOK) {
                self.holding = true;
                // Streams don't end by themselves: the app's end would cut them. Their clients are held when they
                // come again.
                effects.extend([Effect::Hold, Effect::EndStreams { spread: Duration::ZERO }]);
            }
            // The counts are older than the hold: `wake_at` asks for new ones at once.
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
            _ if !self.holding => Some(later(self.arrived, OTHER_HOOK)),
            None if counts.running == 0 => now,
            None => Some(later(self.arrived, settings.restart_grace)),
            Some(_) if self.gone => None,
            Some(released) => Some(later(released, settings.grace)),
        }
    }
}

impl Hold {
    /// Whether it has lasted long enough.
    fn advance(&mut self, now: Instant, counts: &Counts, effects: &mut Vec<Effect>) -> bool {
        if !self.idle && self.rests(counts) {
            self.idle = true;
            effects.push(Effect::Idle);
        }
        let over = now >= self.until;
        effects.extend(over.then_some(Effect::Release));
        over
    }

    fn wake_at(&self, now: Option<Instant>, counts: &Counts) -> Option<Instant> {
        if !self.idle && self.rests(counts) { now } else { Some(self.until) }
    }

    fn rests(&self, counts: &Counts) -> bool {
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

    /// Another trigger: only the deadline may change, as the kubelet's grace begins with a deletion, and an operator
    /// may want it sooner.
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
            // They end over a time that may be longer than what is left now.
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

    /// Goes as far as time and the counts allow.
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
        let at_rest = counts.running + counts.held == 0 && !counts.listening;
        let empty = at_rest && counts.connections == 0;
        // The last work may end at the deadline itself: then nothing is left to force.
        if due && !(empty && self.phase == Phase::Draining) {
            self.force(now, effects);
        }
        let given_up = self.forced.is_some_and(|forced| now >= later(forced, FORCING));
        match self.phase {
            Phase::Draining | Phase::Forcing if empty || given_up => self.enter(Phase::Drained, effects),
            Phase::Draining => self.close_idle(if at_rest { counts.connections } else { 0 }, effects),
            _ => {}
        }
    }

    /// Once each time that everything has come to rest, and again for connections that came since.
    fn close_idle(&mut self, idle: u64, effects: &mut Vec<Effect>) {
        if idle > self.idle {
            effects.push(Effect::CloseIdle);
        }
        self.idle = idle;
    }

    /// The first moment at which it is long enough and quiet, or too long.
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
            Phase::Forcing => self.forced.map(|forced| later(forced, FORCING)),
            Phase::Serving | Phase::Drained => None,
        }
    }
}

/// For random arrivals no call within seven mean gaps is 99.9 % sure to be the callers' silence (e⁻⁷). Where no lame
/// duck is asked for, there is no balancer that has to hear of the drain first.
fn quiet_window(counts: &Counts, settings: &DrainSettings) -> Duration {
    let most = Duration::from_secs(if settings.lame_duck.is_zero() { 1 } else { 10 });
    let gap = counts.mean_gap.unwrap_or_default();
    gap.saturating_mul(7).clamp(Duration::from_secs(1), most)
}

/// `at + wait`; a century instead of what the clock cannot hold.
fn later(at: Instant, wait: Duration) -> Instant {
    at + wait.min(Duration::from_secs(100 * 365 * 86_400))
}
