//! The gate counts everything that it admits, and admits nothing once it has closed.

use lameduck::drain::gate::{Gate, Refused};
use lameduck::drain::machine::Phase;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

#[test]
fn nothing_is_admitted_once_closed() {
    let gate = Gate::new(|| {});
    let one = gate.admit().unwrap();
    gate.set_phase(Phase::Draining);
    assert!(!gate.close(), "one is in flight");
    drop(one);
    assert!(gate.close());
    assert_eq!(gate.admit().err(), Some(Refused));
    assert_eq!((gate.phase(), gate.in_flight()), (Phase::Drained, 0));
    gate.set_phase(Phase::Serving);
    assert!(gate.admit().is_ok(), "a resume opens it again");
}

#[test]
fn a_health_check_keeps_no_gate_open_and_the_exemption_is_limited() {
    let told = Arc::new(AtomicU32::new(0));
    let count = told.clone();
    let gate = Arc::new(Gate::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
    }));
    let (mut check, mut work) = (gate.admit().unwrap(), gate.admit().unwrap());
    assert!(check.become_health_check(1) && !work.become_health_check(1), "the limit is 1");
    assert_eq!(gate.in_flight(), 1);
    gate.set_phase(Phase::Draining);
    assert!(work.become_health_check(2));
    assert_eq!((gate.in_flight(), told.load(Ordering::Relaxed)), (0, 1), "the drain is notified");
    let check = check.into_owned(&gate);
    assert!(gate.close());
    drop((check, work));
    assert_eq!(gate.in_flight(), 0);
    gate.set_phase(Phase::Serving);
    assert!(gate.admit().unwrap().become_health_check(1), "their slots are released");
}

#[test]
fn the_last_request_notifies_only_a_waiting_drain() {
    let told = Arc::new(AtomicU32::new(0));
    let count = told.clone();
    let gate = Gate::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    drop(gate.admit());
    assert_eq!(told.load(Ordering::Relaxed), 0, "while serving, no drain waits");
    let (one, two) = (gate.admit(), gate.admit());
    gate.set_phase(Phase::Draining);
    drop(one);
    assert_eq!(told.load(Ordering::Relaxed), 0, "one is still in flight");
    drop(two);
    assert_eq!(told.load(Ordering::Relaxed), 1);
}

#[test]
fn held_requests_do_not_keep_a_restart_waiting() {
    let told = Arc::new(AtomicU32::new(0));
    let count = told.clone();
    let gate = Gate::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    gate.set_holding(true);
    let (runs, waits) = (gate.admit(), gate.admit());
    let held = gate.hold_back(1);
    assert!(held.is_some() && gate.hold_back(1).is_none(), "the limit is 1");
    told.store(0, Ordering::Relaxed);
    drop(runs);
    assert_eq!(told.load(Ordering::Relaxed), 1, "only the held request remains");
    drop((held, waits));
    assert_eq!((gate.in_flight(), gate.held()), (0, 0));
}
