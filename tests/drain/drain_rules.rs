//! The drain machine's rules, one by one. `drain_machine.rs` tests them together over random schedules.

use std::time::{Duration, Instant};

use lameduck::config::{DrainSettings, Sidecar};
use lameduck::drain::machine::Effect::{
    CloseIdle, EndStreams, Enter, Exit, Hold, Listen, Release, ReleaseHook, StopListening,
};
use lameduck::drain::machine::Event::{AppBack, AppGone, AppStops, Begin, Force, Resume, Tick};
use lameduck::drain::machine::Phase::{Drained, Draining, Forcing, LameDuck, Serving};
use lameduck::drain::machine::Trigger::{AppHook, Hook, Operator, SidecarHook, Signal};
use lameduck::drain::machine::{Counts, Effect, Event, Machine, Trigger};

const MS: Duration = Duration::from_millis(1);
const PATIENT: Trigger = Operator { timeout: None };

/// A machine with the pod's default times (deadline 25 s, longest lame duck 8.333 s) and the world around it.
struct Rig {
    machine: Machine,
    start: Instant,
    counts: Counts,
}

impl Rig {
    fn new(sidecar: Sidecar) -> Self {
        Self::with_lame_duck(sidecar, Duration::from_secs(5))
    }

    fn with_lame_duck(sidecar: Sidecar, lame_duck: Duration) -> Self {
        let secs = Duration::from_secs;
        let settings = DrainSettings {
            lame_duck,
            grace: secs(30),
            reserve: secs(5),
            restart_grace: secs(10),
            stream_spread: secs(5),
            readiness: None,
        };
        let machine = Machine::new(settings, sidecar);
        let counts = Counts {
            running: 1,
            kept: 0,
            held: 0,
            connections: 1,
            listening: true,
            last_arrival: None,
            mean_gap: None,
        };
        // Leaves time before T0 for arrivals.
        Self { machine, start: Instant::now() + secs(60), counts }
    }

    fn time(&self, ms: i64) -> Instant {
        let span = Duration::from_millis(ms.unsigned_abs());
        if ms < 0 { self.start - span } else { self.start + span }
    }

    fn at(&mut self, ms: i64, event: Event) -> Vec<Effect> {
        self.machine.step(self.time(ms), event, &self.counts)
    }

    /// Milliseconds from the start.
    fn since(&self, at: Option<Instant>) -> Option<u128> {
        at.map(|at| at.duration_since(self.start).as_millis())
    }

    fn wake(&self) -> Option<u128> {
        self.since(self.machine.wake_at(&self.counts))
    }

    fn deadline(&self) -> Option<u128> {
        self.since(self.machine.deadline())
    }

    fn empty(&mut self) {
        self.counts = Counts { running: 0, connections: 0, listening: false, ..self.counts };
    }
}

fn spread(ms: u32) -> Effect {
    EndStreams { spread: MS * ms }
}

#[test]
fn a_drain_without_work_goes_through_every_phase_and_waits_for_the_listener() {
    let mut rig = Rig::new(Sidecar::Native);
    (rig.counts.running, rig.counts.connections) = (0, 0);
    assert_eq!(rig.at(0, Begin(Hook)), [Enter(LameDuck)]);
    assert_eq!((rig.wake(), rig.deadline()), (Some(5_000), Some(25_000)));
    assert_eq!(rig.at(4_999, Tick), []);
    assert_eq!(rig.at(5_000, Tick), [Enter(Draining), StopListening, spread(5_000)]);
    assert_eq!(rig.at(5_001, Tick), [], "drained while the listener was open");
    rig.counts.listening = false;
    assert_eq!(rig.at(5_002, Tick), [Enter(Drained)]);
    assert_eq!(rig.wake(), None);
    for event in [Tick, Force, Begin(Hook), Begin(PATIENT)] {
        assert_eq!(rig.at(6_000, event), [], "{event:?} after the end");
    }
}

#[test]
fn lame_duck_ends_when_arrivals_are_quiet_and_never_after_its_longest() {
    // (mean gap, last arrival, end), all in ms from T0
    for (gap, arrival, end) in [
        (None, None, 5_000),
        (None, Some(-300), 5_000),
        (None, Some(4_500), 5_500),
        (Some(10), Some(4_900), 5_900),
        (Some(300), Some(4_900), 7_000),
        (Some(900), Some(-1_000), 5_300),
        (Some(60_000), Some(-4_000), 6_000),
        (Some(1_000), Some(4_900), 8_333),
    ] {
        let mut rig = Rig::new(Sidecar::Native);
        rig.counts.mean_gap = gap.map(Duration::from_millis);
        rig.at(0, Begin(Hook));
        // The quiet window is fixed at T0, because the drain itself changes the traffic.
        rig.counts.mean_gap = Some(MS);
        rig.counts.last_arrival = arrival.map(|ms| rig.time(ms));
        assert_eq!(rig.wake(), Some(end), "{gap:?} {arrival:?}");
        assert_eq!(rig.at(end as i64 - 1, Tick), [], "{gap:?} {arrival:?}");
        assert_eq!(rig.at(end as i64 + 1, Tick)[0], Enter(Draining), "{gap:?} {arrival:?}");
    }
}

/// Otherwise two requests in the last 30 s would make Ctrl-C on a terminal wait for 8 s.
#[test]
fn where_no_lame_duck_is_asked_for_a_second_without_arrivals_is_enough() {
    for (gap, arrival, end) in [(15_000, -200, 800), (15_000, -3_000, 0), (300, -200, 800)] {
        let mut rig = Rig::with_lame_duck(Sidecar::None, Duration::ZERO);
        rig.counts.mean_gap = Some(Duration::from_millis(gap));
        rig.counts.last_arrival = Some(rig.time(arrival));
        let begun = rig.at(0, Begin(Signal));
        assert_eq!(begun.contains(&Enter(Draining)), end == 0, "{gap} {arrival}: {begun:?}");
        if end > 0 {
            assert_eq!(rig.wake(), Some(end), "{gap} {arrival}");
            assert_eq!(rig.at(end as i64, Tick)[0], Enter(Draining), "{gap} {arrival}");
        }
    }
}

#[test]
fn idle_connections_close_only_while_nothing_runs_and_once_each_time() {
    let mut rig = Rig::new(Sidecar::Native);
    rig.at(0, Begin(Hook));
    rig.at(5_000, Tick);
    // (running, listening, connections) → whether idle connections are closed
    for (n, (running, listening, connections, told)) in [
        (1, false, 2, false),
        (0, true, 2, false),
        (0, false, 2, true),
        (0, false, 2, false),
        (0, false, 1, false),
        (0, false, 3, true),
        (1, false, 3, false),
        (0, false, 3, true),
    ]
    .into_iter()
    .enumerate()
    {
        rig.counts = Counts { running, listening, connections, ..rig.counts };
        let expected: &[Effect] = if told { &[CloseIdle] } else { &[] };
        assert_eq!(rig.at(6_000, Tick), expected, "line {n}");
    }
}

#[test]
fn the_deadline_belongs_to_the_first_deletion_hook() {
    // (trigger at 0 s, trigger at 3 s, deadline in ms)
    let timeout = |ms: u32| Operator { timeout: Some(MS * ms) };
    for (first, second, deadline) in [
        (Hook, Hook, Some(25_000)),
        (SidecarHook, AppHook, Some(25_000)),
        (Hook, Signal, Some(25_000)),
        (Signal, Signal, Some(25_000)),
        (Signal, Hook, Some(28_000)),
        (Signal, AppHook, Some(25_000)),
        (PATIENT, PATIENT, None),
        (PATIENT, AppHook, None),
        (PATIENT, Signal, Some(28_000)),
        (PATIENT, SidecarHook, Some(28_000)),
        (timeout(9_000), Signal, Some(9_000)),
        (timeout(9_000), Hook, Some(28_000)),
        (timeout(90_000), Signal, Some(28_000)),
        (timeout(90_000), Hook, Some(28_000)),
    ] {
        let mut rig = Rig::new(Sidecar::Ordinary);
        assert_eq!(rig.at(0, Begin(first)), [Enter(LameDuck)]);
        assert_eq!(rig.at(3_000, Begin(second)), [], "{first:?}, then {second:?}");
        assert_eq!(rig.deadline(), deadline, "{first:?}, then {second:?}");
        rig.at(4_000, Begin(second));
        if second != Signal {
            assert_eq!(rig.deadline(), deadline, "{first:?}, then {second:?} twice");
        }
        assert_eq!((rig.machine.trigger(), rig.machine.began()), (Some(first), Some(rig.start)));
    }
}

#[test]
fn forcing_comes_with_the_deadline_or_a_second_signal_and_lasts_a_second_at_most() {
    let mut rig = Rig::new(Sidecar::Ordinary);
    rig.at(0, Begin(Signal));
    rig.at(22_000, Tick);
    assert_eq!((rig.wake(), rig.machine.phase()), (Some(25_000), Draining));
    assert_eq!(rig.at(25_000, Tick), [Enter(Forcing)]);
    assert_eq!(rig.wake(), Some(26_000));
    assert_eq!(rig.at(25_999, Begin(Hook)), []);
    assert_eq!(rig.deadline(), Some(25_000), "too late to move the deadline");
    assert_eq!(rig.at(26_000, Tick), [Enter(Drained)]);

    let forced = [Enter(Draining), StopListening, Enter(Forcing)];
    let mut rig = Rig::new(Sidecar::Ordinary);
    assert_eq!(rig.at(0, Force), [&[Enter(LameDuck)], &forced[..]].concat());
    rig.empty();
    assert_eq!(rig.at(10, Tick), [Enter(Drained)]);

    let mut rig = Rig::new(Sidecar::Ordinary);
    rig.at(0, Begin(Operator { timeout: Some(MS * 700) }));
    assert_eq!(rig.at(700, Tick), forced, "a deadline within the lame-duck phase");
    assert_eq!(rig.at(800, Force), []);
}

#[test]
fn streams_end_before_the_deadline_and_work_that_ends_with_it_is_not_forced() {
    let mut rig = Rig::new(Sidecar::Native);
    rig.at(0, Begin(Operator { timeout: Some(MS * 7_000) }));
    assert_eq!(rig.at(5_000, Tick), [Enter(Draining), StopListening, spread(2_000)]);
    rig.empty();
    assert_eq!(rig.at(7_000, Tick), [Enter(Drained)]);

    // A deadline that is brought forward while streams end.
    let mut rig = Rig::new(Sidecar::Ordinary);
    rig.at(0, Begin(PATIENT));
    assert_eq!(rig.at(5_000, Tick), [Enter(Draining), StopListening, spread(5_000)]);
    assert_eq!(rig.at(6_000, Begin(Operator { timeout: Some(MS * 1_500) })), [spread(1_500)]);
    assert_eq!(
        rig.at(6_500, Begin(Operator { timeout: Some(MS * 1_500) })),
        [],
        "a later deadline is ignored"
    );
}

#[test]
fn a_resume_starts_a_new_round_from_any_phase() {
    for (phase, until, effects) in [
        (LameDuck, 1, &[Enter(Serving)][..]),
        (Draining, 24_000, &[Enter(Serving), Listen]),
        (Forcing, 25_000, &[Enter(Serving), Listen]),
        (Drained, 26_000, &[Enter(Serving), Listen]),
    ] {
        let mut rig = Rig::new(Sidecar::Native);
        assert_eq!(rig.at(0, Resume), [], "nothing to resume");
        rig.at(0, Begin(Hook));
        for ms in [until.min(24_000), until.min(25_000), until] {
            rig.at(ms, Tick);
        }
        assert_eq!(rig.machine.phase(), phase);
        assert_eq!(rig.at(until, Resume), effects, "{phase:?}");
        assert_eq!((rig.machine.round(), rig.machine.phase(), rig.wake()), (1, Serving, None));
        assert_eq!((rig.machine.trigger(), rig.machine.began(), rig.machine.deadline()), (None, None, None));
        assert_eq!(rig.at(until, Begin(Hook)), [Enter(LameDuck)]);
    }
}

#[test]
fn both_hooks_of_a_deleted_pod_are_one_drain_in_either_order() {
    for (sidecar, second) in [
        (Sidecar::Native, SidecarHook),
        (Sidecar::Native, Hook),
        (Sidecar::Ordinary, SidecarHook),
        (Sidecar::Ordinary, Signal),
    ] {
        let mut rig = Rig::new(sidecar);
        assert_eq!(rig.at(0, Begin(AppHook)), []);
        assert_eq!((rig.wake(), rig.machine.phase()), (Some(2_000), Serving));
        assert_eq!(rig.at(5, Begin(second)), [Enter(LameDuck)]);
        assert_eq!((rig.machine.began(), rig.deadline()), (Some(rig.start), Some(25_000)), "{second:?}");
        assert_eq!(rig.machine.trigger(), Some(AppHook));
        assert_eq!(rig.at(1_000, Begin(AppHook)), []);
        assert_eq!(rig.deadline(), Some(25_000));
    }
    let mut rig = Rig::new(Sidecar::None);
    assert_eq!(
        rig.at(0, Begin(AppHook)),
        [Enter(LameDuck)],
        "without a sidecar there is no second hook to wait for"
    );
    assert_eq!(rig.machine.trigger(), Some(Hook));
}

/// The app's hook alone: held from 2 s on.
fn restarting() -> Rig {
    let mut rig = Rig::new(Sidecar::Native);
    assert_eq!(rig.at(0, Begin(AppHook)), []);
    assert_eq!(rig.at(100, Begin(AppHook)), []);
    assert_eq!(rig.at(2_000, Tick), [Hold, spread(0)]);
    assert!(rig.machine.restarting());
    rig
}

#[test]
fn the_apps_hook_alone_holds_requests_until_the_app_is_back() {
    let mut rig = restarting();
    assert_eq!(rig.at(2_500, AppBack), [], "the app was never gone");
    assert_eq!(rig.wake(), Some(10_000));
    rig.counts.running = 0;
    assert_eq!(rig.at(3_000, Tick), [ReleaseHook]);
    assert_eq!(rig.at(3_000, Begin(AppHook)), []);
    assert_eq!(rig.wake(), Some(33_000));
    assert_eq!([rig.at(3_100, AppGone), rig.at(3_200, AppBack)].concat(), [], "its SIGTERM was not due");
    assert_eq!(rig.at(3_500, AppStops), []);
    assert_eq!(rig.at(4_000, AppBack), [], "the app was never gone");
    assert!(!rig.machine.app_stopped());
    assert_eq!(rig.at(5_000, AppGone), []);
    assert!(rig.machine.app_stopped());
    assert_eq!(rig.wake(), None);
    assert_eq!(rig.at(90_000, Tick), []);
    assert_eq!(rig.at(91_000, AppBack), [Release]);
    assert_eq!((rig.machine.restarting(), rig.machine.phase(), rig.machine.round()), (false, Serving, 0));
}

#[test]
fn the_apps_hook_returns_when_restart_grace_is_over_and_holding_ends_if_the_app_never_goes() {
    let mut rig = restarting();
    // The port closes and opens before the hook has returned: not the restart.
    assert_eq!([rig.at(3_000, AppGone), rig.at(4_000, AppBack)].concat(), []);
    assert_eq!(rig.at(9_999, Tick), []);
    assert_eq!(rig.at(10_000, Tick), [ReleaseHook]);
    assert_eq!(rig.at(39_999, Tick), []);
    assert_eq!(rig.at(40_000, Tick), [Release]);
    assert!(!rig.machine.restarting());
}

#[test]
fn the_apps_hook_is_judged_by_counts_taken_after_the_hold() {
    let mut rig = Rig::new(Sidecar::Native);
    rig.at(0, Begin(AppHook));
    rig.counts.running = 0;
    assert_eq!(rig.at(2_000, Tick), [Hold, spread(0)]);
    assert_eq!(rig.wake(), Some(2_000), "at once");
    assert_eq!(rig.at(2_000, Tick), [ReleaseHook]);
}

#[test]
fn a_drain_or_a_resume_ends_the_holding() {
    let ended = |effects: &[Effect]| [&[Release][..], effects].concat();
    for trigger in [Hook, SidecarHook, PATIENT] {
        let mut rig = restarting();
        assert_eq!(rig.at(6_000, Begin(trigger)), ended(&[Enter(LameDuck)]));
        assert_eq!((rig.machine.trigger(), rig.since(rig.machine.began())), (Some(trigger), Some(6_000)));
    }
    let forced = [Enter(LameDuck), Enter(Draining), StopListening, Enter(Forcing)];
    assert_eq!(restarting().at(6_000, Force), ended(&forced));
    assert_eq!(restarting().at(6_000, Resume), ended(&[ReleaseHook]));
}

#[test]
fn a_native_sidecars_signal_always_exits_and_times_may_run_backwards() {
    for before in [None, Some(Begin(AppHook)), Some(Begin(Hook)), Some(Force)] {
        let mut rig = Rig::new(Sidecar::Native);
        before.map(|event| rig.at(0, event));
        let expected: &[Effect] = if before == Some(Force) { &[Exit] } else { &[Enter(Forcing), Exit] };
        assert_eq!(rig.at(-1, Begin(Signal)), expected, "{before:?}");
        rig.empty();
        rig.at(1, Tick);
        assert_eq!((rig.machine.phase(), rig.at(1, Begin(Signal))), (Drained, vec![Exit]));
    }
}
