//! How an app treats its connections, learned from its responses.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// It has not kept a connection so far.
const UNKNOWN: u64 = 0;
/// It has kept every connection so far.
const KEEPS: u64 = 1;
/// It sometimes closes a connection without shutting down.
const VARIES: u64 = 2;
/// Latest arrival of a response that was already under way when an app began to shut down, in milliseconds.
const LATE_RESPONSE_LIMIT_MS: u64 = 1000;
/// Number of times that the app is asked how long it keeps a connection, before the proxy gives up.
const MAX_ASKED: u32 = 1000;

/// Whether a server keeps its connections. `Connection: close` concerns only one connection (RFC 9110 §7.6.1), as
/// does GOAWAY; but a server that has kept all of them and begins to close them is shutting down.
#[derive(Debug)]
pub struct Habit {
    /// [`UNKNOWN`], [`KEEPS`], [`VARIES`], or when it began to close them: milliseconds since `began`, plus 3.
    state: AtomicU64,
    began: Instant,
}

impl Default for Habit {
    fn default() -> Self {
        Self { state: AtomicU64::new(UNKNOWN), began: Instant::now() }
    }
}

impl Habit {
    /// Records that the server keeps a connection.
    pub fn keeps(&self) {
        match self.state.load(Ordering::Relaxed) {
            KEEPS | VARIES => {}
            UNKNOWN => self.state.store(KEEPS, Ordering::Relaxed),
            since if self.now() < since + LATE_RESPONSE_LIMIT_MS => {}
            // It keeps running: it closes connections after some number of requests, or on an error.
            _ => self.state.store(VARIES, Ordering::Relaxed),
        }
    }

    /// Records that the server closes a connection.
    pub fn closes(&self) {
        if self.state.load(Ordering::Relaxed) == KEEPS {
            self.state.store(self.now(), Ordering::Relaxed);
        }
    }

    /// Whether it has kept its connections and now begins to close them.
    pub fn is_going(&self) -> bool {
        self.state.load(Ordering::Relaxed) > VARIES
    }

    /// Forgets everything: the server is gone, and the next one at its address may behave differently.
    pub fn forget(&self) {
        self.state.store(UNKNOWN, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        VARIES + 1 + self.began.elapsed().as_millis() as u64
    }
}

/// Whether the app says how long it keeps a connection. Some servers, such as Tomcat and Apache, do so only in
/// response to `Connection: keep-alive`.
#[derive(Debug, Default)]
pub struct KeepAlive(Cell<Says>);

#[derive(Clone, Copy, Debug, Default)]
enum Says {
    /// It says so unasked, like Node, or keeps no connection.
    #[default]
    Unasked,
    /// It has kept this many connections without saying for how long.
    Nothing(u32),
    /// It says so when asked.
    Asked,
}

impl KeepAlive {
    /// Whether requests ask with `Connection: keep-alive`.
    pub fn is_asked(&self) -> bool {
        matches!(self.0.get(), Says::Nothing(..MAX_ASKED) | Says::Asked)
    }

    /// Records that the app keeps a connection, for `timeout` if it says so.
    pub fn learn(&self, timeout: Option<Duration>) {
        match (self.0.get(), timeout) {
            (Says::Unasked, None) => self.0.set(Says::Nothing(0)),
            (Says::Nothing(times @ ..MAX_ASKED), None) => self.0.set(Says::Nothing(times + 1)),
            (Says::Nothing(_), Some(_)) => self.0.set(Says::Asked),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same habit as if everything had happened `time` earlier.
    fn later(habit: Habit, time: Duration) -> Habit {
        Habit { began: habit.began.checked_sub(time).unwrap(), ..habit }
    }

    #[test]
    fn one_that_never_kept_a_connection_is_not_going() {
        let habit = Habit::default();
        habit.closes();
        assert!(!habit.is_going());
        habit.keeps();
        assert!(!habit.is_going());
        habit.closes();
        assert!(habit.is_going());
    }

    #[test]
    fn what_was_on_its_way_when_it_began_to_go_changes_nothing() {
        let habit = Habit::default();
        habit.keeps();
        habit.closes();
        habit.keeps();
        assert!(habit.is_going());
        habit.closes();
        assert!(habit.is_going());
    }

    #[test]
    fn one_that_goes_on_after_a_close_only_varies_until_it_has_gone() {
        let habit = Habit::default();
        habit.keeps();
        habit.closes();
        let habit = later(habit, Duration::from_millis(LATE_RESPONSE_LIMIT_MS));
        habit.keeps();
        habit.closes();
        assert!(!habit.is_going());
        habit.forget();
        habit.keeps();
        habit.closes();
        assert!(habit.is_going());
    }

    #[test]
    fn who_says_it_unasked_is_not_asked_and_who_never_says_it_not_for_ever() {
        let (node, go) = (KeepAlive::default(), KeepAlive::default());
        node.learn(Some(Duration::from_secs(5)));
        assert!(!node.is_asked() && !go.is_asked());
        for _ in 0..MAX_ASKED {
            go.learn(None);
            assert!(go.is_asked());
        }
        go.learn(None);
        assert!(!go.is_asked());
    }
}
