//! On a terminal: Ctrl-C drains; an app that needs the terminal has it as it would without lameduck; a stopped job can
//! be continued; and closing the terminal ends a proxy. Each on a real terminal, opened by `script`.

use crate::common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::http::{Client, End};
use common::process::{Node, temporary_directory};
use common::{LIMIT, MOMENT, wait_for};
use serde_json::Value;

const CTRL_C: &str = "\x03";
const CTRL_Z: &str = "\x1a";

/// Reads the terminal and exits at the end of its input, like dev servers; prints what it reads.
const READS: &str = "
    process.stdin.on('data', (text) => console.log(`read ${text.toString().trim()}`));
    process.stdin.on('end', () => process.exit(0));
    process.on('SIGINT', () => { console.log('heard SIGINT'); setTimeout(() => process.exit(5), 300) });
    process.on('SIGTERM', () => { console.log('heard SIGTERM'); process.exit(6) });
    console.log(`a terminal: ${process.stdin.isTTY}`);
    require('http').createServer((req, res) => res.end('ok')).listen(process.env.PORT, '127.0.0.1');";

/// Does not use the terminal.
const WAITS: &str = "
    let waiting;
    process.on('SIGINT', () => { console.log('heard SIGINT'); process.exit(5) });
    process.on('SIGTERM', () => { console.log('heard SIGTERM'); process.exit(6) });
    require('http').createServer((req, res) => {
      if (req.url === '/wait') return console.log(`${(waiting = res) && 1} waiting`);
      if (req.url === '/release') waiting.end('released');
      res.end('ok');
    }).listen(process.env.PORT, '127.0.0.1');";

/// A terminal to type into, and what it shows.
struct Terminal {
    script: Child,
    shown: Arc<Mutex<String>>,
    dir: PathBuf,
}

impl Terminal {
    /// Runs a shell command on a new terminal. Its variables `LAMEDUCK`, `APP` and `CONTROL` hold the program, the
    /// app's script and the path of the control socket.
    fn open(line: &str, app: &str) -> Self {
        let dir = temporary_directory();
        let mut command = Command::new("script");
        command.args(["-qefc", line, "/dev/null"]).env_remove("PORT").env("SHELL", "/bin/bash");
        command.env("LAMEDUCK", env!("CARGO_BIN_EXE_lameduck")).env("APP", app);
        command.env("CONTROL", dir.join("control.sock")).env("HOME", &dir);
        command.env("RUN", format!("exec {RUN}"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut script = command.spawn().expect("script is installed");
        let shown = Arc::<Mutex<String>>::default();
        let (mut output, all) = (script.stdout.take().expect("piped"), shown.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = std::io::Read::read(&mut output, &mut bytes) {
                all.lock().expect("not poisoned").push_str(&String::from_utf8_lossy(&bytes[..n]));
            }
        });
        Self { script, shown, dir }
    }

    /// Runs `lameduck run` on a new terminal, in place of the shell.
    fn run(app: &str) -> Self {
        let this = Self::open(&format!("exec {RUN}"), app);
        this.wait_log("the app listens");
        this
    }

    fn type_in(&mut self, text: &str) {
        let stdin = self.script.stdin.as_mut().expect("piped");
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).expect("typed");
    }

    fn shown(&self) -> String {
        self.shown.lock().expect("not poisoned").clone()
    }

    fn count(&self, text: &str) -> usize {
        self.shown().matches(text).count()
    }

    fn wait(&self, text: &str) {
        self.wait_times(text, 1);
    }

    fn wait_times(&self, text: &str, times: usize) {
        let end = Instant::now() + LIMIT;
        while self.count(text) < times {
            assert!(Instant::now() < end, "no '{text}' in:\n{}", self.shown());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn wait_log(&self, message: &str) -> Value {
        self.wait(&format!("\"message\":\"{message}\""));
        let shown = self.shown();
        // A shell's escape codes may precede the JSON.
        let entry = |line: &str| serde_json::from_str::<Value>(line.get(line.find('{')?..)?.trim()).ok();
        let mut entries = shown.lines().filter_map(entry);
        entries.find(|entry| entry["message"] == message).expect("a whole line")
    }

    fn client(&self) -> Client {
        let listen = self.wait_log("listening")["listen"].as_str().expect("an address").to_owned();
        Client::connect(listen.parse().expect("an address"))
    }

    fn wait_exit(&mut self) -> i32 {
        let code = wait_for("the end", || self.script.try_wait().expect("our child")).code();
        code.expect("script ends by itself")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.script.kill();
        let _ = self.script.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
        if std::thread::panicking() {
            eprintln!("--- the terminal shows:\n{}\n---", self.shown());
        }
    }
}

const RUN: &str = "\"$LAMEDUCK\" run --listen 127.0.0.1:0 --probe-listen 127.0.0.1:0 --control \"$CONTROL\" \
                   --log-format json node -e \"$APP\"";

#[test]
fn an_app_that_reads_the_terminal_has_it_and_hears_ctrl_c_once() {
    let mut terminal = Terminal::run(READS);
    terminal.wait("a terminal: true");
    terminal.type_in("first\n");
    terminal.wait("read first");
    terminal.type_in("second\n");
    terminal.wait("read second");
    terminal.type_in(CTRL_C);
    assert_eq!(terminal.wait_exit(), 5);
    assert_eq!((terminal.count("heard SIGINT"), terminal.count("heard SIGTERM")), (1, 0));
    assert!(!terminal.shown().contains("ERROR"), "{}", terminal.shown());
}

#[test]
fn ctrl_c_drains_first_and_the_app_hears_it_once() {
    let mut terminal = Terminal::run(WAITS);
    let mut client = terminal.client();
    client.get("/wait");
    terminal.wait("1 waiting");
    terminal.type_in(CTRL_C);
    terminal.wait_log("new connections are refused");
    assert!(client.is_quiet_for(MOMENT));
    assert_eq!(terminal.count("heard"), 0);
    let port = terminal.wait_log("the app listens")["port"].as_u64().expect("a number");
    let mut release = Client::connect(([127, 0, 0, 1], port.try_into().expect("a port")).into());
    release.get("/release");
    let answer = client.answer();
    assert_eq!((answer.text().as_str(), answer.end), ("released", End::Whole));
    assert_eq!(terminal.wait_exit(), 5);
    assert_eq!((terminal.count("heard SIGINT"), terminal.count("heard SIGTERM")), (1, 0));
}

/// Earlier, two requests in the last 30 s made Ctrl-C wait for 8 s.
#[test]
fn ctrl_c_with_nothing_in_flight_ends_at_once() {
    let mut terminal = Terminal::run(WAITS);
    for _ in 0..2 {
        let mut client = terminal.client();
        client.get("/");
        assert_eq!(client.answer().head.status, 200);
        // A gap between connections, from which the drain computes its quiet window.
        std::thread::sleep(Duration::from_secs(1));
    }
    let began = Instant::now();
    terminal.type_in(CTRL_C);
    assert_eq!(terminal.wait_exit(), 5);
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

#[test]
fn a_job_that_is_stopped_goes_on_in_the_foreground_and_reads_again() {
    let mut terminal = Terminal::open("bash --norc -i", READS);
    terminal.type_in("sh -c \"$RUN\"\n");
    terminal.wait("a terminal: true");
    terminal.wait_log("the app listens");
    terminal.type_in("first\n");
    terminal.wait("read first");
    terminal.type_in(CTRL_Z);
    terminal.wait("Stopped");
    let named = terminal.count("sh -c \"$RUN\"");
    terminal.type_in("fg\n");
    terminal.wait_times("sh -c \"$RUN\"", named + 1);
    terminal.type_in("second\n");
    terminal.wait("read second");
    let mut client = terminal.client();
    client.get("/");
    assert_eq!(client.answer().head.status, 200);
    terminal.type_in(CTRL_C);
    terminal.wait_times("heard SIGINT", 1);
    terminal.wait_log("the app has ended");
    // The shell has the terminal again.
    terminal.type_in("echo the end is $?\n");
    terminal.wait("the end is 5");
    terminal.type_in("exit\n");
    terminal.wait_exit();
}

/// In a script no shell takes the terminal back, so lameduck must return it to the commands that follow.
#[test]
fn what_comes_after_it_in_a_script_reads_the_terminal() {
    let mut terminal = Terminal::open(&format!("{RUN}; echo is over; read line; echo \"got $line\""), READS);
    terminal.wait_log("the app listens");
    terminal.type_in("first\n");
    terminal.wait("read first");
    let control = terminal.dir.join("control.sock");
    let pid = pid_of(&control);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("lameduck is there");
    terminal.wait("is over");
    terminal.type_in("words\n");
    terminal.wait("got words");
    assert_eq!(terminal.wait_exit(), 0);
}

#[test]
fn a_proxy_whose_terminal_is_closed_ends() {
    let app = Node::held();
    let line = format!(
        "exec \"$LAMEDUCK\" proxy --upstream {} --listen 127.0.0.1:0 --probe-listen 127.0.0.1:0 --control \"$CONTROL\" \
         --log-format json",
        app.addr
    );
    let mut terminal = Terminal::open(&line, "");
    terminal.wait_log("listening");
    let control = terminal.dir.join("control.sock");
    let pid = pid_of(&control);
    terminal.script.kill().expect("killed");
    wait_for("the proxy's end", || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
}

/// Pid of the process that listens on this socket.
fn pid_of(control: &Path) -> rustix::process::Pid {
    let stream = std::os::unix::net::UnixStream::connect(control).expect("lameduck is there");
    let credentials = rustix::net::sockopt::socket_peercred(&stream).expect("its credentials");
    credentials.pid
}
