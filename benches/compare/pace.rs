//! An open-loop client: sends requests on a fixed schedule, whether or not earlier ones have been answered.
//!
//! Latency counts from the moment a request was due, so that a stalled proxy can't hide the time that requests waited.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::app::HELLO;
use crate::server::Result;

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n";

/// Time limit for outstanding responses after the last request.
const LAST_RESPONSES_TIMEOUT: Duration = Duration::from_secs(5);

/// Latency, in µs from the moment a request was due to the last byte of its response.
pub struct Paced {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
}

struct Line {
    stream: TcpStream,
    /// When the request in progress was due.
    due: Option<Instant>,
    answer: Vec<u8>,
}

/// Sends `rate` requests per second over this number of kept-alive connections.
pub fn run(address: SocketAddr, rate: u32, connections: usize, time: Duration) -> Result<Paced> {
    // Our own timer must not affect the result; where this can't be set, all proxies are measured with the same slack.
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
        if now > began + time + LAST_RESPONSES_TIMEOUT {
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
    /// Reads available bytes; returns the latency in µs once the response is complete.
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
