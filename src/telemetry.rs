//! Logs to stdout, as JSON or for people, through a bounded buffer and a writer thread: a slow or blocked stdout never
//! delays the data plane.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tracing::{Metadata, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{self, MakeWriter, time::FormatTime};
use tracing_subscriber::layer::SubscriberExt;

use crate::cli::{LogFormat, LogSettings};

/// `tracing` target of access log lines. They depend on `--access-log` alone, not on `--log-level`.
pub const ACCESS: &str = "access";

/// Limit on the bytes that wait for stdout.
const MAX_WAITING: usize = 1 << 20;
/// Time limit for a line other than an access log line to wait for room in the buffer.
const PUSH_TIMEOUT: Duration = Duration::from_millis(100);
/// Time limit for the flush at exit; a native sidecar must exit within 1.5 s.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Number of log lines dropped so far because stdout was too slow.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Sets up logging for the process. Keep the guard: dropping it flushes the buffer, for at most half a second.
///
/// # Errors
/// The writer thread can't be started, or logging is already set up.
pub fn init(log: LogSettings) -> io::Result<Flush> {
    let terminal = io::stdout().is_terminal();
    let (queue, flush) = Queue::start(io::stdout())?;
    let human = match log.format {
        LogFormat::Auto => terminal,
        LogFormat::Json => false,
        LogFormat::Human => true,
    };
    let subscriber = subscriber(human, terminal, log.level, queue);
    tracing::subscriber::set_global_default(subscriber).map_err(io::Error::other)?;
    Ok(flush)
}

fn subscriber(
    human: bool,
    colours: bool,
    level: tracing::Level,
    queue: Queue,
) -> Box<dyn Subscriber + Send + Sync> {
    // Errors of clients are no warnings: clients could flood the log.
    let engine = if level > tracing::Level::INFO { level.into() } else { LevelFilter::ERROR };
    let levels = Targets::new().with_default(level).with_target(ACCESS, LevelFilter::INFO);
    let levels = levels.with_target("h2", engine);
    let registry = tracing_subscriber::registry().with(levels);
    let layer = fmt::layer().with_timer(Utc).with_writer(queue);
    if human {
        let layer = layer.with_target(false);
        // By default the layer uses colours unless NO_COLOR is set.
        return match colours {
            true => Box::new(registry.with(layer)),
            false => Box::new(registry.with(layer.with_ansi(false))),
        };
    }
    Box::new(registry.with(layer.json().flatten_event(true).with_current_span(false).with_span_list(false)))
}

/// RFC 3339 in UTC, with milliseconds.
struct Utc;

impl FormatTime for Utc {
    fn format_time(&self, out: &mut Writer<'_>) -> std::fmt::Result {
        write!(out, "{}", humantime::format_rfc3339_millis(SystemTime::now()))
    }
}

/// Queue of lines for stdout.
#[derive(Clone)]
struct Queue(Arc<QueueState>);

struct QueueState {
    backlog: Mutex<Backlog>,
    /// Signalled when there is something to write, or at the end.
    work: Condvar,
    /// Signalled when there is room again, or everything is written.
    room: Condvar,
}

#[derive(Default)]
struct Backlog {
    waiting: Vec<u8>,
    writing: bool,
    /// A line has waited in vain since stdout last accepted bytes: until it does again, no line waits.
    stuck: bool,
    ended: bool,
}

impl Queue {
    fn start(out: impl Write + Send + 'static) -> io::Result<(Self, Flush)> {
        let shared = QueueState { backlog: Mutex::default(), work: Condvar::new(), room: Condvar::new() };
        let queue = Self(Arc::new(shared));
        let writer = queue.clone();
        std::thread::Builder::new().name("log".to_owned()).spawn(move || writer.write_to(out))?;
        Ok((queue.clone(), Flush(queue)))
    }

    /// Runs on the writer thread: writes all waiting lines in one call.
    fn write_to(&self, mut out: impl Write) {
        let mut batch = Vec::new();
        let mut backlog = self.backlog();
        loop {
            if backlog.waiting.is_empty() {
                if backlog.ended {
                    return;
                }
                backlog = self.0.work.wait(backlog).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            batch.clear();
            std::mem::swap(&mut backlog.waiting, &mut batch);
            (backlog.writing, backlog.stuck) = (true, false);
            self.0.room.notify_all();
            drop(backlog);
            // A closed stdout only loses log lines.
            let _ = out.write_all(&batch).and_then(|()| out.flush());
            backlog = self.backlog();
            backlog.writing = false;
            self.0.room.notify_all();
        }
    }

    /// Queues one line; returns false if there was no room.
    fn push(&self, line: &[u8], may_wait: bool) -> bool {
        let full = |backlog: &mut Backlog| {
            !backlog.waiting.is_empty() && backlog.waiting.len() + line.len() > MAX_WAITING
        };
        let mut backlog = self.backlog();
        if full(&mut backlog) && may_wait && !backlog.stuck {
            let wait = self
                .0
                .room
                .wait_timeout_while(backlog, PUSH_TIMEOUT, |backlog| full(backlog) && !backlog.stuck);
            backlog = wait.unwrap_or_else(PoisonError::into_inner).0;
            backlog.stuck |= full(&mut backlog);
        }
        if full(&mut backlog) {
            return false;
        }
        backlog.waiting.extend_from_slice(line);
        drop(backlog);
        self.0.work.notify_one();
        true
    }

    fn backlog(&self) -> MutexGuard<'_, Backlog> {
        self.0.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { queue: self, may_wait: true }
    }

    fn make_writer_for(&'a self, about: &Metadata<'_>) -> Line<'a> {
        Line { queue: self, may_wait: about.target() != ACCESS }
    }
}

/// Writer for one event; `fmt` passes the whole line in one call.
struct Line<'a> {
    queue: &'a Queue,
    may_wait: bool,
}

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !self.queue.push(line, self.may_wait) {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// On drop, waits until stdout has everything, for at most half a second.
#[must_use]
pub struct Flush(Queue);

impl Drop for Flush {
    fn drop(&mut self) {
        let mut backlog = self.0.backlog();
        backlog.ended = true;
        self.0.0.work.notify_one();
        let unwritten = |backlog: &mut Backlog| backlog.writing || !backlog.waiting.is_empty();
        drop(self.0.0.room.wait_timeout_while(backlog, FLUSH_TIMEOUT, unwritten));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use tracing::{Level, info};

    use super::*;

    /// A stdout that accepts a batch only on command, or everything once the sender is dropped.
    struct Gated {
        go: mpsc::Receiver<()>,
        taken: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Gated {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.go.recv();
            self.taken.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn gated() -> (mpsc::Sender<()>, Arc<Mutex<Vec<u8>>>, Queue, Flush) {
        let (open, go) = mpsc::channel();
        let taken = Arc::default();
        let (queue, flush) = Queue::start(Gated { go, taken: Arc::clone(&taken) }).unwrap();
        (open, taken, queue, flush)
    }

    /// Fills the buffer while stdout is blocked by an earlier line.
    fn fill(queue: &Queue) {
        assert!(queue.push(b"first\n", false));
        while !queue.backlog().writing {
            std::thread::yield_now();
        }
        while queue.push(&[b'x'; 1000], false) {}
    }

    fn lines(human: bool, level: Level, log: impl FnOnce()) -> Vec<String> {
        let (open, taken, queue, flush) = gated();
        drop(open);
        tracing::subscriber::with_default(subscriber(human, false, level, queue), log);
        drop(flush);
        let taken = taken.lock().unwrap();
        String::from_utf8(taken.clone()).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_json_line_has_timestamp_level_message_and_its_fields_at_the_top() {
        let lines = lines(false, Level::INFO, || info!(in_flight = 3, why = "SIGTERM", "drain began"));
        let line: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!((&line["level"], &line["message"]), (&"INFO".into(), &"drain began".into()));
        assert_eq!((&line["in_flight"], &line["why"]), (&3.into(), &"SIGTERM".into()));
        let time = line["timestamp"].as_str().unwrap();
        let age = SystemTime::now().duration_since(humantime::parse_rfc3339(time).unwrap()).unwrap();
        assert!(time.ends_with('Z') && age < Duration::from_secs(60), "{time}");
    }

    #[test]
    fn a_human_line_has_no_escapes_outside_a_terminal() {
        let lines = lines(true, Level::INFO, || info!(in_flight = 3, "drain began"));
        assert!(lines[0].contains(" INFO drain began in_flight=3"), "{lines:?}");
        assert!(!lines[0].contains('\x1b'));
    }

    #[test]
    fn the_level_rules_all_lines_but_the_access_log() {
        let lines = lines(true, Level::WARN, || {
            info!("hidden");
            info!(target: ACCESS, "GET /");
            tracing::warn!("shown");
        });
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].contains("GET /") && lines[1].contains("shown"));
    }

    #[test]
    fn access_lines_are_dropped_and_counted_at_once_when_stdout_is_stuck() {
        let (open, _taken, queue, flush) = gated();
        fill(&queue);
        let before = dropped();
        tracing::subscriber::with_default(subscriber(false, false, Level::INFO, queue.clone()), || {
            for n in 0..100 {
                info!(target: ACCESS, n, pad = "x".repeat(1000), "GET /");
            }
        });
        assert!(dropped() - before >= 100);
        assert!(!queue.backlog().stuck, "an access line waited");
        assert!(queue.backlog().waiting.len() <= MAX_WAITING);
        drop(open);
        drop(flush);
    }

    #[test]
    fn other_lines_wait_for_room() {
        let (open, taken, queue, flush) = gated();
        fill(&queue);
        let line = std::thread::spawn(move || queue.push(&[b'y'; 2000], true));
        open.send(()).unwrap();
        assert!(line.join().unwrap());
        drop(open);
        drop(flush);
        assert!(taken.lock().unwrap().ends_with(&[b'y'; 2000]));
    }

    #[test]
    fn a_stuck_stdout_costs_patience_once_and_not_per_line() {
        let (open, _taken, queue, flush) = gated();
        fill(&queue);
        let start = Instant::now();
        let kept = (0..50).filter(|_| queue.push(&[b'y'; 2000], true)).count();
        assert_eq!(kept, 0);
        assert!((PUSH_TIMEOUT..PUSH_TIMEOUT * 10).contains(&start.elapsed()), "{:?}", start.elapsed());
        drop(open);
        drop(flush);
    }

    #[test]
    fn the_end_writes_everything_out_but_does_not_hang_on_a_stuck_stdout() {
        let (open, taken, queue, flush) = gated();
        fill(&queue);
        let waiting = queue.backlog().waiting.len();
        open.send(()).unwrap();
        open.send(()).unwrap();
        drop(flush);
        assert_eq!(taken.lock().unwrap().len(), waiting + b"first\n".len());

        let (_open, _taken, queue, flush) = gated();
        fill(&queue);
        let start = Instant::now();
        drop(flush);
        assert!((FLUSH_TIMEOUT..FLUSH_TIMEOUT * 4).contains(&start.elapsed()), "{:?}", start.elapsed());
    }
}
