//! An open-loop client: requests on a fixed schedule, whether or not the earlier ones have been answered.
//!
//! Latency counts from the moment a request was due, so that a proxy which stalls can't hide what waited meanwhile.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::app::HELLO;
use crate::server::Result;

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n";

/// After the last request was due, this long for what is still unanswered.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// What came of it, in µs from the moment a request was due to its answer's last byte.
pub struct Paced {
    /// The median.
    pub p50: f64,
    /// The slowest hundredth begins here.
    pub p99: f64,
}

struct Line {
    stream: TcpStream,
    /// When the request was due that is on its way.
    due: Option<Instant>,
    answer: Vec<u8>,
}

/// `rate` requests a second over so many kept connections.
pub fn run(address: SocketAddr, rate: u32, connections: usize, time: Duration) -> Result<Paced> {
    // Our own timer must not be what is measured; where this can't be set, both proxies have the same slack.
    let _ = std::fs::write("/proc/self/timerslack_ns", "1000");
    let mut lines = Vec::new();
    for _ in 0..connections {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        lines.push(Line { stream, due: None, answer: Vec::new() });
    }
    let gap = Duration::from_secs(1) / rate;
    let total = (time.as_secs_f64() * f64::from(rate)) as u32;
    let (mut sent, mut took) = (0, Vec::with_capacity(total as usize));
    let began = Instant::now() + gap;
    while took.len() < total as usize {
        let next = began + gap * sent;
        let now = Instant::now();
        if now > began + time + LAST_ANSWERS {
            return Err(
                format!("{} of {total} requests were not answered", total as usize - took.len()).into()
            );
        }
        if sent < total
            && next <= now
            && let Some(line) = lines.iter_mut().find(|line| line.due.is_none())
        {
            line.stream.write_all(REQUEST)?;
            line.due = Some(next);
            // Connections take turns.
            let at = lines.iter().position(|line| line.due == Some(next)).unwrap_or(0);
            lines[at..].rotate_left(1);
            sent += 1;
            continue;
        }
        let until = if sent < total && next > now { next - now } else { Duration::from_millis(1) };
        wait(&lines, until)?;
        for line in lines.iter_mut().filter(|line| line.due.is_some()) {
            took.extend(line.read()?);
        }
    }
    took.sort_by(f64::total_cmp);
    let at = |share: f64| took[((took.len() as f64 * share).ceil() as usize).clamp(1, took.len()) - 1];
    Ok(Paced { p50: at(0.5), p99: at(0.99) })
}

fn wait(lines: &[Line], time: Duration) -> Result<()> {
    let mut fds: Vec<_> = lines.iter().map(|line| PollFd::new(&line.stream, PollFlags::IN)).collect();
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() }))?;
    Ok(())
}

impl Line {
    /// Reads what has come; how long the answer took, in µs, once it is whole.
    fn read(&mut self) -> Result<Option<f64>> {
        let mut room = [0; 1024];
        match self.stream.read(&mut room) {
            Ok(0) => return Err("a connection was closed under the open loop".into()),
            Ok(n) => self.answer.extend_from_slice(&room[..n]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        if !self.answer.ends_with(HELLO.as_bytes()) {
            return Ok(None);
        }
        if !self.answer.starts_with(b"HTTP/1.1 200") {
            return Err("an answer other than 200 in the open loop".into());
        }
        self.answer.clear();
        Ok(self.due.take().map(|due| due.elapsed().as_secs_f64() * 1e6))
    }
}
