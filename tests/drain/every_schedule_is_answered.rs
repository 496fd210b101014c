//! What callers of a drain, a hold and a resume are promised, over thousands of random schedules: the drain's runner is
//! real, its data plane simulated, its clock paused. `LAMEDUCK_SEED=N cargo test --test drain every_schedule_is` replays a
//! schedule and prints it.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::common::random::Random;
use lameduck::config::{DrainSettings, Settings, Sidecar};
use lameduck::control::data_plane::Listeners;
use lameduck::control::handle::{DrainOutcome, HoldAnswer};
use lameduck::control::verdict::Verdict;
use lameduck::drain::machine::{Phase, Trigger};
use lameduck::metrics::Ended;
use tokio::task::{JoinHandle, yield_now};
use tokio::time::sleep;

use super::simulated_plane::{App, Work, World, settings};

const SEEDS: u64 = 2_000;
const MS: Duration = Duration::from_millis(1);
/// Opening or closing the listeners takes this long.
const LISTENERS: Duration = Duration::from_millis(60);
/// How late an answer may be: steps are noticed at once, but a socket waits for the next timer of a paused clock.
const LATE: Duration = Duration::from_millis(100);
/// Forcing lasts a second.
const FORCING: Duration = Duration::from_secs(1);

#[derive(Debug)]
enum Answer {
    /// And how many requests had been lost by then.
    Drain(DrainOutcome, u64),
    Hold(HoldAnswer),
    Resumed,
}

/// Somebody who waits for an answer.
struct Caller {
    what: String,
    trigger: Option<Trigger>,
    asked: Duration,
    /// When the answer must have come, whatever else happens.
    until: Option<Duration>,
    answer: JoinHandle<Answer>,
}

struct Sim {
    seed: u64,
    random: Random,
    world: World,
    app: App,
    app_runs: bool,
    drain: DrainSettings,
    sidecar: Sidecar,
    callers: Vec<Caller>,
    resumes: u32,
    /// Requests lost when the data plane was last seen serving.
    lost_before: u64,
    /// When the drain was first seen to be over.
    drained: Option<Duration>,
    exits: bool,
    log: Vec<String>,
    seen: BTreeSet<String>,
}

impl Drop for Sim {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed={} {:?} {:?}\n{}", self.seed, self.sidecar, self.drain, self.log.join("\n"));
        }
    }
}

impl Sim {
    fn new(seed: u64, mut settings: Settings) -> Self {
        let mut random = Random(seed);
        let reserve = random.ms(2_000);
        let lame_duck = if random.one_in(3) { Duration::ZERO } else { random.ms(3_000) };
        settings.drain = DrainSettings {
            lame_duck,
            // Hooks that belong together come up to 2 s apart; sooner there is no deadline.
            grace: reserve + lame_duck + Duration::from_secs(2) + random.ms(10_000),
            reserve,
            restart_grace: random.ms(6_000),
            stream_spread: random.ms(3_000),
            readiness: None,
        };
        settings.sidecar = random.pick(&[Sidecar::None, Sidecar::Native, Sidecar::Ordinary]);
        let app = App::start(true, Duration::from_secs(1));
        settings.upstream = app.address();
        Self {
            seed,
            random,
            drain: settings.drain.clone(),
            sidecar: settings.sidecar,
            world: World::new(settings, LISTENERS),
            app,
            app_runs: true,
            callers: Vec::new(),
            resumes: 0,
            lost_before: 0,
            drained: None,
            exits: false,
            log: Vec::new(),
            seen: BTreeSet::new(),
        }
    }

    async fn run(&mut self) {
        for _ in 0..self.random.below(30) {
            let pause = self.random.pick(&[5, 300, 3_000]);
            let pause = self.random.ms(pause);
            self.pass(MS + pause).await;
            if self.exits {
                break;
            }
            if self.random.one_in(2) {
                self.command().await;
            } else {
                self.traffic();
            }
        }
        // From here on only time passes. A second signal ends what may take as long as it takes.
        self.app_starts();
        self.pass(self.drain.grace + self.drain.grace + FORCING).await;
        self.say("second signal");
        self.world.control.force();
        self.pass(FORCING + LATE).await;
        self.promise(self.phase() == Phase::Drained, "a second signal ends everything");
        self.promise(self.callers.is_empty(), "everyone is answered");
        self.promise(self.world.plane.gate.admit().is_err(), "nothing is admitted after the end");
        self.promise(self.world.plane.gate.held() == 0, "nothing is held after the end");
        self.promise(!self.world.sockets.is_listening(), "nothing listens after the end");
    }

    fn phase(&self) -> Phase {
        self.world.plane.gate.phase()
    }

    fn lost(world: &World) -> u64 {
        world.plane.count(Ended::Cut) + world.plane.count(Ended::Unsent)
    }

    fn promise(&self, kept: bool, what: &str) {
        assert!(kept, "seed={}: {what}", self.seed);
    }

    fn say(&mut self, what: &str) {
        let (at, gate) = (self.world.time(), &self.world.plane.gate);
        self.log.push(format!("{at:>9.3?} {what}: {gate:?}, {} held", gate.held()));
    }

    async fn pass(&mut self, time: Duration) {
        let until = self.world.time() + time;
        while self.world.time() < until {
            sleep((until - self.world.time()).min(Duration::from_millis(500))).await;
            self.check().await;
        }
    }

    fn traffic(&mut self) {
        let takes = self.random.pick(&[10, 1_000, 30_000]);
        let takes = self.random.ms(takes);
        match self.random.below(8) {
            0 => drop(self.world.plane.connect()),
            1 if self.app_runs => self.app_stops(),
            1 => self.app_starts(),
            2..=3 => drop(self.world.plane.request(Work::Stream, takes)),
            4 => drop(self.world.plane.request(Work::Stubborn, takes)),
            _ => drop(self.world.plane.request(Work::Plain, takes)),
        }
        self.say("traffic");
    }

    fn app_stops(&mut self) {
        self.say("the app stops");
        self.app_runs = false;
        self.app.stop();
    }

    fn app_starts(&mut self) {
        if !self.app_runs {
            self.say("the app starts");
            self.app_runs = true;
            self.app.start_again();
        }
    }

    async fn command(&mut self) {
        match self.random.below(12) {
            // Or most schedules would spend their time after a drain.
            0..=8 if self.phase() == Phase::Drained && self.random.one_in(2) => self.resume(),
            0..=5 => self.begin(),
            6..=7 => self.hold(),
            8 => self.resume(),
            9 => self.world.control.release(),
            10 if self.random.one_in(2) => {
                self.say("second signal");
                self.world.control.force();
            }
            _ => {}
        }
        yield_now().await;
    }

    fn begin(&mut self) {
        let timeout = if self.random.one_in(2) { None } else { Some(self.random.ms(10_000)) };
        let trigger = self.random.pick(&[
            Trigger::Signal,
            Trigger::Operator { timeout },
            Trigger::Hook,
            Trigger::AppHook,
            Trigger::AppHook,
            Trigger::SidecarHook,
        ]);
        self.exits = trigger == Trigger::Signal && self.sidecar == Sidecar::Native;
        let deadline = self.drain.deadline();
        let within = match trigger {
            Trigger::Signal if self.exits => Some(Duration::ZERO),
            Trigger::Hook | Trigger::SidecarHook => Some(deadline),
            // The first hook may come before the end, and brings the kubelet's deadline.
            Trigger::Signal => Some(deadline * 2),
            Trigger::Operator { timeout } => timeout.map(|timeout| timeout + deadline),
            Trigger::AppHook if self.sidecar == Sidecar::None => Some(deadline),
            Trigger::AppHook => None,
        };
        let world = self.world.clone();
        let drained = async move {
            let outcome = world.control.drain(trigger).await;
            let lost = Self::lost(&world);
            Answer::Drain(outcome, lost)
        };
        let within = within.map(|within| within + FORCING);
        self.ask(format!("{trigger:?}"), Some(trigger), within, drained);
    }

    fn hold(&mut self) {
        let (max, keep, wait) = (self.random.ms(8_000), self.random.one_in(2), self.random.one_in(2));
        let world = self.world.clone();
        let held = async move { Answer::Hold(world.control.hold(max, keep, wait).await) };
        // Another hold starts the time anew for everyone.
        let within = (!wait).then_some(Duration::ZERO);
        self.ask(format!("hold {max:?}, keep {keep}, wait {wait}"), None, within, held);
    }

    fn resume(&mut self) {
        self.resumes += 1;
        let world = self.world.clone();
        let resumed = async move {
            world.control.resume().await;
            Answer::Resumed
        };
        self.ask("resume".to_owned(), None, Some(LISTENERS), resumed);
    }

    fn ask(
        &mut self,
        what: String,
        trigger: Option<Trigger>,
        within: Option<Duration>,
        answer: impl Future<Output = Answer> + Send + 'static,
    ) {
        self.say(&what);
        let asked = self.world.time();
        let until = within.map(|within| asked + within + LATE);
        self.callers.push(Caller { what, trigger, asked, until, answer: tokio::spawn(answer) });
    }

    /// Collects the answers, and checks that none is overdue.
    async fn check(&mut self) {
        let drained = (self.phase() == Phase::Drained).then(|| self.world.time());
        self.drained = drained.map(|now| self.drained.unwrap_or(now));
        for caller in std::mem::take(&mut self.callers) {
            if caller.answer.is_finished() {
                let answer = caller.answer.await.expect("an answer");
                self.say(&format!("{} → {answer:?}", caller.what));
                self.answered(caller.trigger, answer);
            } else {
                self.overdue(&caller);
                self.callers.push(caller);
            }
        }
        let status = self.world.control.status();
        let overdue = status.deadline_ms.is_some_and(|left| left < -((FORCING + LATE).as_millis() as i64));
        self.promise(drained.is_some() || !overdue, "the drain ends with its deadline");
        self.promise(status.running + status.held == status.in_flight, "what is in flight runs or is held");
        if self.phase() == Phase::Serving {
            self.lost_before = Self::lost(&self.world);
        }
    }

    fn overdue(&self, caller: &Caller) {
        let now = self.world.time();
        let what = &caller.what;
        self.promise(caller.until.is_none_or(|until| now <= until), &format!("{what}: no answer in time"));
        if let Some(drained) = self.drained.filter(|_| caller.trigger.is_some()) {
            let late = now > drained.max(caller.asked) + LATE;
            self.promise(!late, &format!("{what}: no answer although the drain is over"));
        }
        if caller.trigger == Some(Trigger::AppHook) && self.phase() == Phase::Serving {
            let bound = self.drain.restart_grace.max(Duration::from_secs(2)) + LATE;
            self.promise(now <= caller.asked + bound, "the app's hook returns within restart_grace");
        }
    }

    fn answered(&mut self, trigger: Option<Trigger>, answer: Answer) {
        let name = match answer {
            Answer::Resumed => {
                let open = self.world.sockets.is_listening() || self.phase() >= Phase::Draining || self.exits;
                self.promise(open, "a resume returns once everything listens");
                "resumed".to_owned()
            }
            Answer::Hold(held) => format!("{held:?}"),
            Answer::Drain(DrainOutcome::Resumed, _) => {
                self.promise(self.resumes > 0, "nobody resumed");
                "drain resumed".to_owned()
            }
            Answer::Drain(DrainOutcome::AppMayStop, _) => {
                self.promise(trigger == Some(Trigger::AppHook), "only the app's hook lets the app stop");
                "app may stop".to_owned()
            }
            Answer::Drain(DrainOutcome::Drained { verdict }, lost) => {
                let told: u64 = match &verdict {
                    Verdict::Clean => 0,
                    Verdict::Lost(lost) => lost.iter().map(|(_, n)| n).sum(),
                    Verdict::Unknown => return self.promise(false, "the runner has ended"),
                };
                self.promise(told == lost - self.lost_before, "the verdict tells what was lost");
                format!("clean {}", verdict.is_clean())
            }
        };
        self.seen.insert(name);
    }
}

fn run(seed: u64, settings: Settings) -> (Vec<String>, BTreeSet<String>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let mut sim = Sim::new(seed, settings);
        sim.run().await;
        (std::mem::take(&mut sim.log), std::mem::take(&mut sim.seen))
    })
}

#[test]
fn every_caller_gets_one_answer_in_time_whatever_the_schedule() {
    let settings = settings("--upstream unix:/nowhere");
    if let Ok(seed) = std::env::var("LAMEDUCK_SEED") {
        let (log, _) = run(seed.parse().expect("LAMEDUCK_SEED is a number"), settings);
        println!("{}", log.join("\n"));
        return;
    }
    let mut seen = BTreeSet::new();
    for seed in 0..SEEDS {
        seen.append(&mut run(seed, settings.clone()).1);
    }
    // The schedules are worth something only if they reach every answer.
    assert_eq!(seen.len(), 9, "{seen:?}");
}
