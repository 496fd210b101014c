//! The drain machine's promises over thousands of random schedules against a small simulated data plane.
//! `LAMEDUCK_SEED=N cargo test --test drain drain_machine` replays a schedule and prints it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::common::random::Random;
use lameduck::config::{DrainSettings, Sidecar};
use lameduck::drain::machine::{Counts, Effect, Event, Machine, Phase, Trigger};

const SEEDS: u64 = 10_000;
const MS: Duration = Duration::from_millis(1);

/// The simulation's own record of a running drain, to check the machine against.
struct Noted {
    began: Instant,
    /// When the first phase was entered; later than T0 if the second hook came late.
    entered: Instant,
    window: Duration,
    /// Whether `Force` came, or the process exits.
    forced: bool,
    exiting: bool,
    forcing_since: Option<Instant>,
    stops: u32,
    deadline: Option<Instant>,
}

struct Sim {
    seed: u64,
    random: Random,
    settings: DrainSettings,
    sidecar: Sidecar,
    machine: Machine,
    start: Instant,
    now: Instant,
    /// The latest time passed to the machine; an earlier one counts as this.
    latest: Instant,
    counts: Counts,
    /// When the listener will have closed.
    closes_at: Option<Instant>,
    /// Requests that cannot be cut.
    stubborn: bool,
    /// When the app's hook came without the sidecar's, and the quiet window at that time.
    hook: Option<(Instant, Duration)>,
    holding: bool,
    /// An operator's hold: when it ends, and whether it keeps streams.
    hold: Option<(Instant, bool)>,
    /// Whether the machine has reported that nothing is running.
    idle: bool,
    phase: Phase,
    drain: Option<Noted>,
    log: Vec<String>,
    seen: BTreeSet<String>,
}

impl Drop for Sim {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed={} {:?} {:?}\n{}", self.seed, self.sidecar, self.settings, self.log.join("\n"));
        }
    }
}

impl Sim {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let reserve = random.ms(6_000);
        let lame_duck = if random.one_in(3) { Duration::ZERO } else { random.ms(8_000) };
        let settings = DrainSettings {
            lame_duck,
            grace: reserve + lame_duck + MS + random.ms(40_000),
            reserve,
            restart_grace: random.ms(15_000),
            stream_spread: random.ms(8_000),
            readiness: None,
        };
        let sidecar = random.pick(&[Sidecar::None, Sidecar::Native, Sidecar::Ordinary]);
        let machine = Machine::new(settings.clone(), sidecar);
        let stubborn = random.one_in(4);
        let start = Instant::now();
        let counts = Counts {
            running: 0,
            kept: 0,
            held: 0,
            connections: 0,
            listening: true,
            last_arrival: None,
            mean_gap: None,
        };
        Self {
            seed,
            random,
            settings,
            sidecar,
            machine,
            start,
            now: start,
            latest: start,
            counts,
            closes_at: None,
            stubborn,
            hook: None,
            holding: false,
            hold: None,
            idle: false,
            phase: Phase::Serving,
            drain: None,
            log: Vec::new(),
            seen: BTreeSet::new(),
        }
    }

    fn run(&mut self) {
        self.step(self.start, Event::Tick);
        for _ in 0..self.random.below(80) {
            let pause = self.random.pick(&[5, 500, 5_000]);
            let until = self.now + self.random.ms(pause);
            self.pass(until);
            if self.random.one_in(3) {
                let event = self.any_event();
                // The caller may have read the clock a little earlier.
                let early = if self.random.one_in(10) { self.random.ms(5) } else { Duration::ZERO };
                self.step(self.now.checked_sub(early).unwrap_or(self.now), event);
            } else {
                self.traffic();
            }
        }
        // From here on only time passes. Everything must end without another event, except a restart, which
        // needs the app back, and a drain without a deadline.
        self.pass(self.now + Duration::from_secs(200));
        for event in [Event::AppStops, Event::AppGone, Event::AppBack] {
            self.step(self.now, event);
        }
        self.promise(!self.machine.restarting(), "requests are still held although the app is back");
        if self.machine.deadline().is_some() {
            self.promise(self.phase == Phase::Drained, "a drain with a deadline ends");
        }
        self.promise(
            self.machine.wake_at(&self.counts).is_none() || self.stuck(),
            "nothing is left to wake up for",
        );
    }

    /// An operator's drain without a deadline may wait for work.
    fn stuck(&self) -> bool {
        self.phase == Phase::Draining && self.counts.running + self.counts.held > 0
    }

    fn any_event(&mut self) -> Event {
        let timeout = if self.random.one_in(2) { None } else { Some(self.random.ms(30_000)) };
        let begin = [
            Trigger::Signal,
            Trigger::Operator { timeout },
            Trigger::Hook,
            Trigger::AppHook,
            Trigger::AppHook,
            Trigger::SidecarHook,
        ];
        match self.random.below(22) {
            0..=5 => Event::Begin(self.random.pick(&begin)),
            6..=7 => Event::AppGone,
            8..=9 => Event::AppBack,
            10 => Event::Resume,
            11 => Event::Force,
            20 => Event::Release,
            21 => Event::AppStops,
            12..=14 => Event::Hold { max: self.random.ms(20_000), keep_streams: self.random.one_in(2) },
            _ => Event::Tick,
        }
    }

    /// Lets time pass; the listener closes and the machine wakes when they are due.
    fn pass(&mut self, until: Instant) {
        let mut turns = 0;
        loop {
            turns += 1;
            self.promise(turns < 1_000, "wake-ups must make progress");
            let wake = self.machine.wake_at(&self.counts).filter(|at| *at <= until);
            let closes = self.closes_at.filter(|at| *at <= until);
            match (wake, closes) {
                (_, Some(at)) if wake.is_none_or(|wake| at <= wake) => {
                    self.now = self.now.max(at);
                    self.closes_at = None;
                    self.counts.listening = false;
                    self.step(self.now, Event::Tick);
                }
                (Some(at), _) => {
                    self.now = self.now.max(at);
                    let done = self.step(self.now, Event::Tick);
                    let later = self.machine.wake_at(&self.counts).is_none_or(|at| at > self.now);
                    self.promise(done || later, "a wake-up does something or sets a later one");
                }
                (None, _) => break,
            }
        }
        self.now = until;
    }

    /// A request or a connection begins or ends.
    fn traffic(&mut self) {
        let open = self.counts.connections > 0 && self.phase < Phase::Forcing;
        let mut tick = self.random.one_in(4);
        match self.random.below(6) {
            0 if self.counts.listening => {
                self.counts.connections += 1;
                self.counts.last_arrival = Some(self.now);
            }
            1..=2 if open => {
                if self.holding {
                    self.counts.held += 1;
                } else {
                    self.counts.running += 1;
                }
                self.counts.last_arrival = Some(self.now);
            }
            3..=4 if self.counts.running > 0 => {
                self.counts.running -= 1;
                self.counts.kept = self.counts.kept.min(self.counts.running);
                tick |= self.counts.running == self.counts.kept;
            }
            5 if self.counts.kept < self.counts.running && self.random.one_in(2) => {
                self.counts.kept += 1;
                tick |= self.counts.running == self.counts.kept;
            }
            5 if self.counts.connections > self.counts.running + self.counts.held => {
                self.counts.connections -= 1;
                tick |= self.counts.connections == 0;
            }
            _ => {
                let gap = self.random.ms(2_000);
                self.counts.mean_gap = self.random.one_in(2).then_some(gap);
            }
        }
        if tick {
            self.step(self.now, Event::Tick);
        }
    }

    /// Makes one step, checks it and applies its effects; returns whether there were any.
    fn step(&mut self, at: Instant, event: Event) -> bool {
        let before = (self.machine.phase(), self.machine.round());
        self.counts.kept = self.counts.kept.min(self.counts.running);
        let effects = self.machine.step(at, event, &self.counts);
        self.latest = self.latest.max(at);
        self.now = self.latest;
        let ms = self.now.duration_since(self.start).as_millis();
        let Counts { running, held, connections, listening, .. } = self.counts;
        self.log.push(format!(
            "{ms:>7} ms: {event:?} with {running} running, {held} held, {connections} connections, \
             listening {listening} -> {effects:?}"
        ));
        self.note_event(event, before.0);
        if before.0 == Phase::Drained {
            let exits = effects.is_empty() || effects == [Effect::Exit];
            self.promise(exits || event == Event::Resume, "nothing happens once drained");
        }
        let exit = event == Event::Begin(Trigger::Signal) && self.sidecar == Sidecar::Native;
        self.promise(exit == (effects.last() == Some(&Effect::Exit)), "a native sidecar's signal exits");
        for effect in &effects {
            self.seen.insert(format!("{effect:?}").split(' ').next().unwrap_or_default().to_owned());
            self.check(*effect, event);
        }
        self.check_deadline(event);
        let resumed = event == Event::Resume && before.0 > Phase::Serving;
        self.promise(self.machine.round() == before.1 + u32::from(resumed), "each resume begins a new round");
        self.check_state();
        let begins = matches!(event, Event::Hold { .. });
        self.promise(
            begins || self.idle || !self.hold_rests(),
            "a hold reports at once that nothing is running",
        );
        self.obey(&effects);
        !effects.is_empty()
    }

    fn window(&self) -> Duration {
        let gap = self.counts.mean_gap.unwrap_or_default();
        let most = if self.settings.lame_duck.is_zero() { 1_000 } else { 10_000 };
        (gap * 7).clamp(1_000 * MS, most * MS)
    }

    fn note_event(&mut self, event: Event, before: Phase) {
        let lonely_at_rest = self.hold.is_some() || !self.holding;
        let may_hold = before == Phase::Serving && self.hook.is_none() && lonely_at_rest;
        if let (Event::Hold { max, keep_streams }, true) = (event, may_hold) {
            (self.hold, self.idle) = (Some((self.now + max, keep_streams)), false);
        }
        let lonely = self.sidecar != Sidecar::None && event == Event::Begin(Trigger::AppHook);
        if lonely && may_hold {
            self.hook = Some((self.now, self.window()));
        }
        if let (None, Some(began)) = (&self.drain, self.machine.began()) {
            let by_hook = self.machine.trigger() == Some(Trigger::AppHook);
            let window = self.hook.filter(|_| by_hook).map_or(self.window(), |hook| hook.1);
            self.promise(!by_hook || self.hook.is_some_and(|hook| hook.0 == began), "T0 is the first hook's");
            let deadline = self.machine.deadline();
            self.drain = Some(Noted {
                began,
                entered: self.now,
                window,
                forced: false,
                exiting: false,
                forcing_since: None,
                stops: 0,
                deadline,
            });
            self.hook = None;
        }
        if let Some(drain) = &mut self.drain {
            drain.forced |= event == Event::Force;
            drain.exiting |= event == Event::Begin(Trigger::Signal) && self.sidecar == Sidecar::Native;
        }
    }

    fn check(&mut self, effect: Effect, event: Event) {
        match effect {
            Effect::Enter(phase) => {
                let onward = phase > self.phase || (phase == Phase::Serving && event == Event::Resume);
                self.promise(onward, "phases go forward only");
                self.check_lame_duck(phase);
                if let Some(drain) = &mut self.drain {
                    drain.forcing_since =
                        drain.forcing_since.or((phase == Phase::Forcing).then_some(self.now));
                }
                self.phase = phase;
                self.check_drained();
                if phase == Phase::Serving {
                    self.drain = None;
                }
            }
            Effect::Idle => {
                self.promise(
                    self.hold_rests() && !self.idle,
                    "idle is reported once, when nothing is running",
                );
                self.idle = true;
            }
            Effect::Hold | Effect::Release => {
                if effect == Effect::Release {
                    self.hold = None;
                }
                self.promise(self.holding != (effect == Effect::Hold), "held once, released once");
                self.promise(self.phase == Phase::Serving, "nothing is held in a drain");
                self.holding = !self.holding;
            }
            Effect::ReleaseHook => {
                let waited = self.hook.take().is_some();
                self.promise(waited, "the hook is released once");
            }
            Effect::StopListening => {
                let Some(drain) = &mut self.drain else { panic!("seed={}: no drain", self.seed) };
                drain.stops += 1;
                let once = drain.stops == 1 && self.phase == Phase::Draining;
                self.promise(once, "the listener is stopped once in a round");
            }
            Effect::EndStreams { spread } => {
                let left = self.machine.deadline().map_or(Duration::MAX, |deadline| deadline - self.now);
                self.promise(spread <= left && spread <= self.settings.stream_spread, "streams end in time");
            }
            Effect::CloseIdle => {
                let rest = self.counts.running + self.counts.held == 0 && !self.counts.listening;
                self.promise(rest && self.phase == Phase::Draining, "idle connections close last");
            }
            Effect::Listen | Effect::Exit => {}
        }
    }

    /// `next` is being entered.
    fn check_lame_duck(&self, next: Phase) {
        let Some(drain) = &self.drain else { return };
        if self.phase != Phase::LameDuck || next == Phase::Serving || drain.forced || drain.exiting {
            return;
        }
        if self.machine.deadline().is_some_and(|deadline| self.now >= deadline) {
            return;
        }
        self.promise(self.lame_duck_over(drain), "the lame-duck phase lasts until arrivals are quiet");
    }

    fn lame_duck_over(&self, drain: &Noted) -> bool {
        let lasted = self.now - drain.began;
        let quiet = self.counts.last_arrival.is_none_or(|last| self.now - last >= drain.window);
        (lasted >= self.settings.lame_duck && quiet) || lasted >= self.settings.lame_duck_max()
    }

    fn hold_rests(&self) -> bool {
        self.hold.is_some_and(|(_, keep)| self.counts.running <= if keep { self.counts.kept } else { 0 })
    }

    fn empty(&self) -> bool {
        let Counts { running, held, connections, listening, .. } = self.counts;
        running + held + connections == 0 && !listening
    }

    fn check_drained(&self) {
        let Some(drain) = self.drain.as_ref().filter(|_| self.phase == Phase::Drained) else { return };
        let given_up = drain.forcing_since.is_some_and(|since| self.now >= since + 1_000 * MS);
        self.promise(self.empty() || given_up, "drained means that nothing is in flight");
        self.promise(
            drain.stops == 1 || drain.exiting,
            "a drain does not end before the listener is stopped",
        );
    }

    fn check_deadline(&mut self, event: Event) {
        let Some(drain) = &mut self.drain else { return };
        let old = drain.deadline;
        drain.deadline = self.machine.deadline();
        let new = drain.deadline;
        let by_platform = matches!(event, Event::Begin(by) if !matches!(by, Trigger::Operator { .. }));
        let wanted = match event {
            Event::Begin(Trigger::Operator { timeout }) => timeout.map(|timeout| self.latest + timeout),
            _ => None,
        };
        let sooner = wanted.is_some() && new == wanted && old.is_none_or(|old| new < Some(old));
        self.promise(
            new == old || by_platform || sooner,
            "only a deletion or an operator moves the deadline",
        );
        let late = wanted.is_some_and(|wanted| new.is_none_or(|new| new > wanted));
        self.promise(!late || self.phase >= Phase::Forcing, "an operator's timeout is kept");
        let hook = matches!(event, Event::Begin(Trigger::Hook | Trigger::SidecarHook | Trigger::Signal));
        if hook && self.phase < Phase::Forcing {
            let within = new.is_some_and(|new| new <= self.now + self.settings.deadline());
            self.promise(within, "the kubelet's grace period is kept");
        }
    }

    /// What holds after every step.
    fn check_state(&self) {
        self.promise(self.machine.phase() == self.phase, "every phase is announced");
        let until = self.machine.held_until();
        self.promise(until == self.hold.map(|hold| hold.0), "an operator's hold is announced");
        self.promise((self.machine.restarting() || until.is_some()) == self.holding, "holding is announced");
        self.promise(until.is_none_or(|until| self.now <= until), "a hold ends in time");
        if let Some((arrived, _)) = self.hook {
            let bound = self.settings.restart_grace.max(2_000 * MS);
            self.promise(self.now <= arrived + bound, "the app's hook returns within restart_grace");
        }
        let Some(drain) = &self.drain else { return };
        if let Some(deadline) = self.machine.deadline() {
            self.promise(self.phase >= Phase::Forcing || self.now < deadline, "the deadline forces");
            let bound = deadline.max(drain.entered) + 1_000 * MS;
            self.promise(self.phase == Phase::Drained || self.now < bound, "forcing lasts a second");
        }
        if self.phase == Phase::LameDuck {
            self.promise(!self.lame_duck_over(drain), "the lame-duck phase ends when it may");
        }
        if self.empty() && !drain.exiting {
            let ended = self.phase <= Phase::LameDuck || self.phase == Phase::Drained;
            self.promise(ended, "the end comes with the last byte");
        }
    }

    /// Applies the effects, as the data plane does.
    fn obey(&mut self, effects: &[Effect]) {
        let before = self.counts;
        for effect in effects {
            match effect {
                Effect::Release => {
                    self.counts.running += self.counts.held;
                    self.counts.held = 0;
                }
                Effect::StopListening => self.closes_at = Some(self.now + self.random.ms(300)),
                Effect::Listen => {
                    self.closes_at = None;
                    self.counts.listening = true;
                }
                Effect::CloseIdle => self.counts.connections = 0,
                Effect::Enter(Phase::Forcing) if !self.stubborn => {
                    (self.counts.running, self.counts.held, self.counts.connections) = (0, 0, 0);
                }
                _ => {}
            }
        }
        let rests = self.counts.running + self.counts.held + self.counts.connections == 0;
        if rests && before.running + before.held + before.connections > 0 {
            self.step(self.now, Event::Tick);
        }
    }

    fn promise(&self, kept: bool, what: &str) {
        assert!(kept, "seed={}: {what}", self.seed);
    }
}

#[test]
fn every_schedule_keeps_the_drains_promises() {
    if let Ok(seed) = std::env::var("LAMEDUCK_SEED") {
        let mut sim = Sim::new(seed.parse().expect("LAMEDUCK_SEED is a number"));
        sim.run();
        println!("{}", sim.log.join("\n"));
        return;
    }
    let mut seen = BTreeSet::new();
    for seed in 0..SEEDS {
        let mut sim = Sim::new(seed);
        sim.run();
        seen.append(&mut sim.seen);
    }
    // The schedules must reach every effect: five phases and nine others.
    assert_eq!(seen.len(), 14, "{seen:?}");
}
