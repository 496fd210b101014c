//! All interleavings of the gate's atomics, checked by loom: nothing is admitted after "drained".

#[path = "../../src/drain/gate.rs"]
#[allow(dead_code)] // the model uses only a part of the gate
mod gate;
mod atomic {
    pub use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
}
mod machine {
    pub use lameduck::drain::machine::Phase;
}

use gate::Gate;
use loom::sync::Arc;
use loom::sync::atomic::AtomicBool;
use loom::thread;
use machine::Phase;
use std::sync::atomic::Ordering;

#[test]
fn nothing_is_admitted_after_drained() {
    loom::model(|| {
        let gate = Arc::new(Gate::new(|| {}));
        let works = Arc::new(AtomicBool::new(false));
        let (worker_gate, worker_works) = (gate.clone(), works.clone());
        let worker = thread::spawn(move || {
            for _ in 0..2 {
                if let Ok(guard) = worker_gate.admit() {
                    worker_works.store(true, Ordering::SeqCst);
                    assert_ne!(worker_gate.phase(), Phase::Drained, "closed while work was running");
                    worker_works.store(false, Ordering::SeqCst);
                    drop(guard);
                }
            }
        });
        gate.set_phase(Phase::Draining);
        if gate.close() {
            assert!(!works.load(Ordering::SeqCst), "work runs after drained");
            assert!(gate.admit().is_err());
        }
        worker.join().unwrap();
    });
}

#[test]
fn the_last_request_is_always_noticed() {
    loom::model(|| {
        let told = Arc::new(AtomicBool::new(false));
        let tell = told.clone();
        let gate = Arc::new(Gate::new(move || tell.store(true, Ordering::SeqCst)));
        let guard_gate = gate.clone();
        let worker = thread::spawn(move || drop(guard_gate.admit()));
        gate.set_phase(Phase::Draining);
        let seen_idle = gate.in_flight() == 0;
        worker.join().unwrap();
        assert!(seen_idle || told.load(Ordering::SeqCst), "the drain would never be notified");
    });
}

/// A hold that keeps streams is idle when nothing else is running, and not earlier.
#[test]
fn a_stream_is_never_counted_in_place_of_a_running_request() {
    loom::model(|| {
        let gate = std::sync::Arc::new(Gate::new(|| {}));
        let runs = gate.admit();
        let streams = gate.clone();
        let worker = thread::spawn(move || {
            drop(streams.admit().map(|in_flight| in_flight.into_tunnel(&streams)));
            let in_flight = streams.admit();
            drop(streams.stream());
            drop(in_flight);
        });
        // The write makes loom interleave the read below with every step of the worker.
        gate.set_phase(Phase::Serving);
        let (in_flight, streams) = gate.in_flight_and_streams();
        assert!(in_flight > streams, "{streams} streams among {in_flight} in flight");
        worker.join().unwrap();
        drop(runs);
        assert_eq!(gate.in_flight_and_streams(), (0, 0));
    });
}
