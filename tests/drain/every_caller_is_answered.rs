//! Everyone who begins or joins a drain, a hold or a restart gets one answer, in time. The drain's runner is real; its
//! data plane is simulated and its clock paused, so that a minute passes in milliseconds.

use std::time::Duration;

use lameduck::control::data_plane::Listeners;
use lameduck::control::handle::{DrainOutcome, HoldAnswer};
use lameduck::control::verdict::Verdict;
use lameduck::drain::machine::{Phase, Trigger};
use lameduck::metrics::Ended;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::simulated_plane::{App, Work, World, settings};

const MINUTE: &str = "--upstream unix:/nowhere --lame-duck 5s --grace 65s --reserve 5s --sidecar native";
/// How precise times are where an app with a socket takes part.
const STEP: Duration = Duration::from_millis(5);
const REOPENING: Duration = Duration::from_millis(50);

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn world(line: &str) -> World {
    World::new(settings(line), REOPENING)
}

fn clean() -> DrainOutcome {
    DrainOutcome::Drained { verdict: Verdict::Clean }
}

fn cut(n: u64) -> DrainOutcome {
    DrainOutcome::Drained { verdict: Verdict::Lost(vec![(Ended::Cut, n)]) }
}

/// The answer, which came at this second or up to 100 ms later.
async fn answer(caller: JoinHandle<(DrainOutcome, Duration)>, second: u64) -> DrainOutcome {
    let (outcome, at) = caller.await.expect("an answer");
    assert!(
        at >= secs(second) && at <= secs(second) + Duration::from_millis(100),
        "{outcome:?} after {at:?}"
    );
    outcome
}

fn phase(world: &World) -> Phase {
    world.plane.gate.phase()
}

#[tokio::test(start_paused = true)]
async fn all_callers_of_a_drain_get_its_end_and_later_ones_at_once() {
    let world = world(MINUTE);
    world.plane.request(Work::Plain, secs(40));
    world.plane.connect();
    let mut callers = Vec::new();
    let patient = Trigger::Operator { timeout: None };
    for trigger in [Trigger::AppHook, Trigger::SidecarHook, Trigger::Hook, Trigger::Hook, patient] {
        callers.push(world.caller(trigger).await);
    }
    for caller in callers {
        assert_eq!(answer(caller, 40).await, clean());
    }
    assert_eq!(phase(&world), Phase::Drained);
    assert!(world.plane.gate.admit().is_err(), "nothing is admitted any more");
    sleep(secs(3)).await;
    for trigger in [Trigger::AppHook, Trigger::SidecarHook, patient] {
        assert_eq!(answer(world.caller(trigger).await, 43).await, clean());
    }
}

#[tokio::test(start_paused = true)]
async fn the_lame_duck_lasts_as_long_as_it_was_set_to() {
    let world = world(MINUTE);
    let hook = world.caller(Trigger::Hook).await;
    sleep(Duration::from_millis(4_990)).await;
    assert!(phase(&world) == Phase::LameDuck && world.sockets.is_listening());
    sleep(Duration::from_millis(20)).await;
    assert_eq!(phase(&world), Phase::Draining);
    assert_eq!(answer(hook, 5).await, clean());
}

/// Between two newcomers.
const GAP: Duration = Duration::from_millis(500);

async fn newcomers(world: &World, n: u32) {
    for _ in 0..n {
        world.plane.request(Work::Plain, Duration::ZERO);
        sleep(GAP).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_lame_duck_lasts_until_newcomers_stay_away_for_seven_of_their_gaps() {
    let world = world(MINUTE);
    newcomers(&world, 40).await;
    let hook = world.caller(Trigger::Hook).await;
    newcomers(&world, 16).await;
    let last = world.time() - GAP;
    let (outcome, at) = hook.await.expect("an answer");
    assert_eq!(outcome, clean());
    // The gap is known from a look once a second.
    let quiet = (at - last).as_millis();
    assert!((3_400..=3_750).contains(&quiet), "{quiet} ms");
}

#[tokio::test(start_paused = true)]
async fn what_can_be_cut_ends_at_the_deadline() {
    let world = world(MINUTE);
    world.plane.request(Work::Plain, secs(3600));
    let stream = world.plane.request(Work::Stream, secs(3600));
    let hook = world.caller(Trigger::Hook).await;
    assert_eq!(answer(hook, 60).await, cut(1));
    assert_eq!(stream.await.expect("its end"), Some(Ended::EventsEnded));
}

#[tokio::test(start_paused = true)]
async fn the_drain_ends_a_second_after_its_deadline_whatever_stays_in_flight() {
    let world = world(MINUTE);
    for _ in 0..9 {
        world.plane.request(Work::Stubborn, secs(3600));
    }
    let hook = world.caller(Trigger::Hook).await;
    sleep(secs(20)).await;
    let operator = world.caller(Trigger::Operator { timeout: Some(secs(10)) }).await;
    assert!(matches!(answer(hook, 31).await, DrainOutcome::Drained { .. }));
    assert!(matches!(answer(operator, 31).await, DrainOutcome::Drained { .. }));
    assert_eq!((world.plane.gate.in_flight(), phase(&world)), (9, Phase::Drained));
}

#[tokio::test(start_paused = true)]
async fn a_second_signal_answers_everyone_at_once() {
    let world = world("--upstream unix:/nowhere --grace 65s");
    world.plane.request(Work::Plain, secs(3600));
    let signal = world.caller(Trigger::Signal).await;
    let operator = world.caller(Trigger::Operator { timeout: None }).await;
    sleep(secs(7)).await;
    world.control.force();
    assert_eq!(answer(signal, 7).await, cut(1));
    assert_eq!(answer(operator, 7).await, cut(1));
}

#[tokio::test(start_paused = true)]
async fn a_resume_answers_everyone_and_returns_once_all_listeners_are_open() {
    let world = world(MINUTE);
    world.plane.request(Work::Plain, secs(30));
    let hooks = [world.caller(Trigger::Hook).await, world.caller(Trigger::Hook).await];
    sleep(secs(10)).await;
    assert!(!world.sockets.is_listening(), "draining");
    world.control.resume().await;
    assert!(world.sockets.is_listening(), "back");
    for hook in hooks {
        assert_eq!(answer(hook, 10).await, DrainOutcome::Resumed);
    }
    let status = world.control.status();
    assert_eq!((status.phase, status.round, status.age_ms), ("serving", 1, None));
    // The next round is a drain of its own.
    let next = world.caller(Trigger::Hook).await;
    assert_eq!(answer(next, 30).await, clean());
}

#[tokio::test(start_paused = true)]
async fn a_hold_ends_when_its_time_is_over_and_another_starts_it_anew() {
    let world = world(MINUTE);
    world.plane.request(Work::Plain, secs(3600));
    let first = world.holder(secs(30), false).await;
    sleep(secs(10)).await;
    let second = world.holder(secs(50), false).await;
    for holder in [first, second] {
        assert_eq!(holder.await.expect("an answer"), (HoldAnswer::Released, secs(60)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_holder_hears_when_nothing_runs_and_the_held_requests_go_on_later() {
    let world = world(MINUTE);
    world.plane.request(Work::Plain, secs(3));
    let stream = world.plane.request(Work::Stream, secs(3600));
    tokio::task::yield_now().await;
    let holder = world.holder(secs(600), true).await;
    sleep(secs(1)).await;
    let held = world.plane.request(Work::Plain, secs(1));
    assert_eq!(holder.await.expect("an answer"), (HoldAnswer::Idle, secs(3)));
    assert_eq!((world.control.status().held, world.control.status().running), (1, 1), "the stream stays");
    sleep(secs(7)).await;
    world.control.release();
    assert_eq!(held.await.expect("its end"), Some(Ended::Complete));
    assert_eq!(world.time(), secs(11));
    assert!(!stream.is_finished());
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_a_hold_and_refuses_the_next() {
    let world = world(MINUTE);
    world.plane.request(Work::Plain, secs(30));
    let holder = world.holder(secs(600), false).await;
    sleep(secs(2)).await;
    let held = world.plane.request(Work::Plain, secs(1));
    sleep(secs(2)).await;
    let hook = world.caller(Trigger::Hook).await;
    assert_eq!(holder.await.expect("an answer"), (HoldAnswer::Released, secs(4)));
    assert_eq!(world.control.hold(secs(600), false, true).await, HoldAnswer::Refused);
    assert_eq!(answer(hook, 30).await, clean());
    assert_eq!(held.await.expect("its end"), Some(Ended::Complete));
}

#[tokio::test(start_paused = true)]
async fn the_apps_hook_returns_with_its_last_request_and_the_hold_ends_if_nobody_stops_the_app() {
    let app = App::start(true, STEP);
    let world = world(&format!("--upstream {} --sidecar native --grace 30s", app.address()));
    world.plane.request(Work::Plain, secs(6));
    let hook = world.caller(Trigger::AppHook).await;
    sleep(secs(3)).await;
    let held = world.plane.request(Work::Plain, secs(1));
    assert_eq!(answer(hook, 6).await, DrainOutcome::AppMayStop);
    sleep(secs(1)).await;
    // The kubelet may call twice.
    assert_eq!(answer(world.caller(Trigger::AppHook).await, 7).await, DrainOutcome::AppMayStop);
    assert_eq!(held.await.expect("its end"), Some(Ended::Complete));
    assert_eq!(world.time().as_secs(), 6 + 30 + 1, "the grace from the answer on, then the request itself");
    assert_eq!((phase(&world), world.control.published().restarting), (Phase::Serving, false));
}

#[tokio::test(start_paused = true)]
async fn held_requests_go_on_when_the_app_has_restarted() {
    let mut app = App::start(true, STEP);
    let world = world(&format!("--upstream {} --sidecar native --grace 300s", app.address()));
    let hook = world.caller(Trigger::AppHook).await;
    assert_eq!(answer(hook, 2).await, DrainOutcome::AppMayStop);
    let held = world.plane.request(Work::Plain, secs(1));
    sleep(secs(3)).await;
    app.stop();
    sleep(secs(10)).await;
    assert!(world.control.published().restarting, "it is still away");
    app.start_again();
    assert_eq!(held.await.expect("its end"), Some(Ended::Complete));
    assert_eq!(world.time().as_secs(), 2 + 3 + 10 + 1);
}

#[tokio::test(start_paused = true)]
async fn no_request_waits_for_ever_for_an_app_that_never_comes_back() {
    let world = world(&format!("{MINUTE} --upstream-wait 7s"));
    let hook = world.caller(Trigger::AppHook).await;
    assert_eq!(answer(hook, 2).await, DrainOutcome::AppMayStop);
    let began = world.time();
    let held = world.plane.request(Work::Plain, secs(1));
    assert_eq!(held.await.expect("its end"), Some(Ended::Unsent));
    assert_eq!((world.time() - began).as_secs(), 65 + 7);
    // The hold itself has no end of its own: the next app may need a new image first.
    assert!(world.control.published().restarting);
    world.control.resume().await;
    let next = world.plane.request(Work::Plain, secs(1));
    assert_eq!(next.await.expect("its end"), Some(Ended::Complete));
}

#[tokio::test(start_paused = true)]
async fn the_apps_own_hook_is_called_once_and_before_the_answers() {
    let app = App::start(true, STEP);
    let world = world(&format!("--upstream {} --grace 65s --after-drain /bye", app.address()));
    world.plane.request(Work::Plain, secs(9));
    let hooks = [world.caller(Trigger::Hook).await, world.caller(Trigger::Hook).await];
    sleep(secs(5)).await;
    assert_eq!(app.requests(), 0, "not before the drain is over");
    for hook in hooks {
        assert_eq!(answer(hook, 9).await, clean());
    }
    assert_eq!(answer(world.caller(Trigger::Hook).await, 9).await, clean());
    assert_eq!(app.requests(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_own_hook_that_hangs_delays_the_answers_until_the_grace_is_over() {
    let app = App::start(false, STEP);
    let world = world(&format!("--upstream {} --grace 65s --after-drain /bye", app.address()));
    world.plane.request(Work::Plain, secs(9));
    let hook = world.caller(Trigger::Hook).await;
    assert_eq!(answer(hook, 65).await, clean());
    assert_eq!(app.requests(), 1);
}

/// `drain_tells_its_story.rs` reads what the log says. Here its times: a log can be read within a process only if no
/// other test of it logs meanwhile.
#[tokio::test(start_paused = true)]
async fn the_log_says_every_five_seconds_what_a_drain_waits_for() {
    let world = world(MINUTE);
    world.plane.request(Work::Plain, secs(18));
    let hook = world.caller(Trigger::Hook).await;
    assert_eq!(answer(hook, 18).await, clean());
    let seconds: Vec<_> = world.ledger_times().iter().map(Duration::as_secs).collect();
    assert_eq!(seconds, [5, 10, 15]);
}

#[tokio::test(start_paused = true)]
async fn the_log_says_nothing_of_a_drain_that_waits_for_no_request() {
    let world = world("--upstream unix:/nowhere --lame-duck 12s --grace 65s --reserve 5s --sidecar native");
    let hook = world.caller(Trigger::Hook).await;
    assert_eq!(answer(hook, 12).await, clean());
    assert!(world.ledger_times().is_empty(), "{:?}", world.ledger_times());
}
