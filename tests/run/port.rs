//! `lameduck run` and the app's port: another process takes it, the app ignores it, and errors name the port to use.

use crate::common;

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use common::http::Client;
use common::port::Port;
use common::process::{Lameduck, lameduck, temporary_directory};
use common::{MOMENT, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use socket2::{Domain, Socket, Type};

fn wait_line<T>(run: &Lameduck, what: &str, find: impl FnMut(&str) -> Option<T>) -> T {
    run.process.wait_line(what, find)
}

/// Listens once the file exists, and exits with 1 if the port is in use, which is Node's default.
const LATE: &str = "
    console.log(`my port is ${process.env.PORT}`);
    const timer = setInterval(() => {
      if (!require('fs').existsSync(process.argv[1])) return;
      clearInterval(timer);
      require('http').createServer((req, res) => res.end(`on ${process.env.PORT}`)).listen(process.env.PORT, '127.0.0.1');
    }, 10);";

#[test]
fn a_chosen_port_that_another_process_takes_is_replaced() {
    let dir = temporary_directory();
    let file = dir.join("go");
    let run = Lameduck::run(&[], &["node", "-e", LATE, file.to_str().expect("UTF-8")]);
    let port: u16 = wait_line(&run, "its port", |line| line.strip_prefix("my port is ")?.parse().ok());
    // The app may boot for a while before it listens.
    thread::sleep(Duration::from_millis(3500));
    let somebody = TcpListener::bind(("127.0.0.1", port)).expect("free until now");
    thread::sleep(MOMENT);
    fs::write(&file, "").expect("written");
    let new = run.wait_log("the app listens")["port"].as_u64().expect("a number");
    assert_ne!(new, u64::from(port));
    assert_eq!(Client::ask(run.listen, "/").text(), format!("on {new}"));
    let status = run.status().expect("a status");
    assert_eq!(
        (&status["upstream"], &status["switched"]),
        (&format!("localhost:{new}").into(), &false.into())
    );
    let taken = run.wait_log("another process took the app's port; trying another port");
    assert_eq!(taken["taken"], port);
    drop(somebody);
    let _ = fs::remove_dir_all(dir);
}

/// The kernel may give the port to any connection.
#[test]
fn a_chosen_port_from_which_another_process_is_connected_is_replaced() {
    let dir = temporary_directory();
    let file = dir.join("go");
    let run = Lameduck::run(&[], &["node", "-e", LATE, file.to_str().expect("UTF-8")]);
    let port: u16 = wait_line(&run, "its port", |line| line.strip_prefix("my port is ")?.parse().ok());
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    let somebody = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    somebody.bind(&SocketAddr::from(([127, 0, 0, 1], port)).into()).expect("free until now");
    somebody.connect(&server.local_addr().expect("its address").into()).expect("connected");
    fs::write(&file, "").expect("written");
    let taken = run.wait_log("another process took the app's port; trying another port");
    assert_eq!(taken["taken"], port);
    let new = run.wait_log("the app listens")["port"].as_u64().expect("a number");
    assert_ne!(new, u64::from(port));
    assert_eq!(Client::ask(run.listen, "/").text(), format!("on {new}"));
    let _ = fs::remove_dir_all(dir);
}

/// Goes to the background once it listens.
const DAEMON: &str = "
    const server = \"require('http').createServer().listen(process.env.PORT, '127.0.0.1', () => process.send('up'))\";
    const options = { detached: true, stdio: ['ignore', 'ignore', 'ignore', 'ipc'] };
    const child = require('child_process').spawn(process.execPath, ['-e', server], options);
    console.log(`daemon ${child.pid}`);
    child.on('message', () => process.exit(0));";

#[test]
fn an_app_that_goes_to_the_background_is_not_started_again_and_again() {
    let (code, output) = Lameduck::run_to_its_end(&[], &["node", "-e", DAEMON]);
    let daemons: Vec<i32> =
        output.lines().filter_map(|line| line.strip_prefix("daemon ")?.parse().ok()).collect();
    for pid in daemons.iter().filter_map(|pid| Pid::from_raw(*pid)) {
        let _ = kill_process(pid, Signal::KILL);
    }
    assert_eq!(daemons.len(), 1, "{code} {output}");
    assert!(!output.contains("another process took"), "{output}");
}

#[test]
fn a_port_of_the_users_choice_is_never_replaced() {
    let somebody = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = somebody.local_addr().expect("its address").port().to_string();
    let (code, output) = Lameduck::run_to_its_end(&["--app-port", &port], &["node", "-e", "0"]);
    assert_eq!(code, 1);
    assert!(
        output.contains("give the app another port") && !output.contains("another process took"),
        "{output}"
    );
}

#[test]
fn an_app_that_listens_elsewhere_than_on_its_app_port_is_reported_early() {
    let (own, reserved) = (Port::reserve(), Port::reserve());
    let (own, other) = (own.number().to_string(), reserved.number().to_string());
    let app = "
        const server = require('http').createServer((req, res) => res.end('ok')).listen(process.argv[1], '127.0.0.1');
        process.on('SIGUSR2', () => server.close(() => server.listen(process.env.PORT, '127.0.0.1')));";
    // Behind a shell, because the server is seldom the process that lameduck started.
    let run = Lameduck::run(
        &["--start-timeout", "300s", "--app-port", &own],
        &["sh", "-c", "node -e \"$0\" \"$1\"; exit $?", app, &other],
    );
    let advice = format!("it listens on {other} instead: start lameduck with --app-port {other}");
    let line = wait_line(&run, "the advice", |line| line.contains(&advice).then(|| line.to_owned()));
    assert!(line.contains("WARN") && line.contains("after 3s"), "{line}");
    // The app may still listen on its own port later.
    run.process.signal(Signal::USR2);
    run.wait_log("the app listens");
}

#[test]
fn the_log_has_the_url_to_open() {
    let serve = "require('http').createServer((q, a) => a.end('ok')).listen(process.env.PORT, '127.0.0.1')";
    let run = Lameduck::run(&[], &["node", "-e", serve]);
    assert_eq!(run.wait_log("serving")["url"], format!("http://{}", run.listen));
    let everywhere = Lameduck::run(&["--listen", ":0"], &["node", "-e", serve]);
    let url = format!("http://localhost:{}", everywhere.listen.port());
    assert_eq!(everywhere.wait_log("serving")["url"], url);
}

#[test]
fn the_apps_command_needs_no_dashes_before_it() {
    let dir = temporary_directory();
    let control = dir.join("control.sock");
    let mut program = lameduck();
    program.args(["run", "--listen", "127.0.0.1:0", "--probe-listen", "127.0.0.1:0", "--log-format", "json"]);
    program.arg("--control").arg(&control);
    program.args(["node", "-e", "console.log(process.argv.slice(1).join(' '))", "--", "--port", "3"]);
    let mut process = common::process::Process::start("lameduck", &mut program);
    assert_eq!(process.wait_exit(), 0);
    assert!(process.output().lines().any(|line| line == "--port 3"), "{}", process.output());
    wait_for("the end", || process.exited());
    let _ = fs::remove_dir_all(dir);
}
