//! Servers of a benchmark: found, started on free ports, awaited, and ended by pid.

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Result of a step; the error says what went wrong.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Token for `GET /drain` on the probe port of every lameduck started here.
pub const TOKEN: &str = "bench-token";

/// Temporary directory for one run, removed on drop.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Creates it in the system's temporary directory.
    pub fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("lameduck-{name}-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    /// Creates a subdirectory.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A loopback address on which nothing listened a moment ago.
pub fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// Flags of a proxy that listens here, in front of this app.
pub fn route(listen: SocketAddr, upstream: &str) -> Vec<String> {
    ["--listen", &listen.to_string(), "--upstream", upstream].map(str::to_owned).to_vec()
}

/// `lameduck proxy` as run by every benchmark, with its own probe address.
pub fn lameduck(binary: &Path, dir: &Path, route: &[String], probe: SocketAddr, grace: &str) -> Command {
    let mut command = Command::new(binary);
    command.arg("proxy");
    command.args(route);
    command.args(["--probe-listen", &probe.to_string(), "--token", TOKEN]);
    command.arg("--control").arg(dir.join("control.sock"));
    command.args(["--lame-duck", "0s", "--grace", grace, "--reserve", "5s", "--log-format", "json"]);
    command
}

/// A server in the foreground as a child process; ended with all its descendants on drop.
pub struct Server {
    child: Child,
    started: Instant,
    log: PathBuf,
}

impl Server {
    /// Starts it with an empty environment; its output goes to `dir/log`.
    pub fn start(mut command: Command, dir: &Path) -> Result<Self> {
        let log = dir.join("log");
        let file = File::create(&log)?;
        command.env_clear().current_dir(dir);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let started = Instant::now();
        let program = command.get_program().to_owned();
        let child = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
        Ok(Self { child, started, log })
    }

    /// Repeats `GET path` until it gets a 200; returns the time since the server was started.
    pub fn wait_for_answer(&mut self, address: SocketAddr, path: &str) -> Result<Duration> {
        loop {
            if let Ok(mut stream) = TcpStream::connect(address)
                && let Ok(200) = get(&mut stream, path, "")
            {
                return Ok(self.started.elapsed());
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("ended ({status}) before it answered{}", self.last_words()).into());
            }
            if self.started.elapsed() > Duration::from_secs(10) {
                return Err(format!("did not answer within 10 s{}", self.last_words()).into());
            }
            thread::sleep(Duration::from_micros(50));
        }
    }

    /// Its pid and those of its descendants.
    pub fn pids(&self) -> Vec<u32> {
        let parents = parents();
        let mut tree = vec![self.child.id()];
        let mut next = 0;
        while let Some(&parent) = tree.get(next) {
            tree.extend(parents.iter().filter(|(_, ppid)| *ppid == parent).map(|(pid, _)| *pid));
            next += 1;
        }
        tree
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Last lines of its log, newest first.
    fn last_words(&self) -> String {
        self.log().lines().rev().take(3).map(|line| format!("\n  {line}")).collect()
    }
}

impl Server {
    /// Sends SIGTERM, so that a parent reaps its workers, and SIGKILL after `patience`.
    pub fn stop(&mut self, patience: Duration) {
        let pids = self.pids();
        signal(self.child.id(), Signal::TERM);
        let asked = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if asked.elapsed() > patience {
                pids.iter().for_each(|pid| signal(*pid, Signal::KILL));
                let _ = self.child.wait();
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A drain that takes longer is cut off.
        if matches!(self.child.try_wait(), Ok(None)) {
            self.stop(Duration::from_secs(1));
        }
    }
}

fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
        let _ = kill_process(pid, signal);
    }
}

/// All processes of the machine, each with its parent.
fn parents() -> Vec<(u32, u32)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| Some((pid, stat(pid).ok()?.get(1)?.parse().ok()?))).collect()
}

/// Fields of `/proc/<pid>/stat` after the command's name: state, parent, … (number 3 onwards in proc(5)).
pub fn stat(pid: u32) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name is in brackets and may contain brackets.
    let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    Ok(rest.split_whitespace().map(str::to_owned).collect())
}

/// Sends one `GET` on a kept-alive connection and reads the whole response; returns its status. `header` is one more
/// header line with its CRLF, or empty.
pub fn get(stream: &mut TcpStream, path: &str, header: &str) -> io::Result<u16> {
    stream.set_nodelay(true)?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: bench\r\n{header}\r\n").as_bytes())?;
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let n = stream.read(&mut chunk)?;
        if n == 0 {
            return Err(bad("the answer ended early"));
        }
        answer.extend_from_slice(&chunk[..n]);
        let Some(end) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length: usize = length.and_then(|value| value.trim().parse().ok()).unwrap_or(0);
        if answer.len() >= end + 4 + length {
            return head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(|| bad("no status"));
        }
    }
}
