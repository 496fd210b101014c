//! Every interleaving of the gate's atomics, by loom: nothing is admitted after "drained".

#[path = "../../src/drain/gate.rs"]
#[allow(dead_code)] // the model takes what it needs of the gate
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
                    assert_ne!(worker_gate.phase(), Phase::Drained, "closed over running work");
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
fn the_last_one_out_is_always_noticed() {
    loom::model(|| {
        let told = Arc::new(AtomicBool::new(false));
        let tell = told.clone();
        let gate = Arc::new(Gate::new(move || tell.store(true, Ordering::SeqCst)));
        let guard_gate = gate.clone();
        let worker = thread::spawn(move || drop(guard_gate.admit()));
        gate.set_phase(Phase::Draining);
        let seen_idle = gate.in_flight() == 0;
        worker.join().unwrap();
        assert!(seen_idle || told.load(Ordering::SeqCst), "the drain would wait for nothing");
    });
}
