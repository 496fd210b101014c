//! No other user of the machine can control a proxy or deceive its commands: sockets and state are in a folder that
//! belongs to the proxy's user alone, or are not used.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::common::app::RawApp;
use crate::common::http::Client;
use crate::common::process::{Lameduck, Node, Process, temporary_directory};
use crate::common::users::ForAll;
use serde_json::Value;

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";

/// A user to run lameduck as, and a copy of the program. Only root can run it as another user.
#[derive(Clone)]
struct User(Option<u32>, Rc<ForAll>);

fn this_user() -> User {
    User(None, Rc::new(ForAll::lameduck()))
}

fn users() -> Option<[User; 2]> {
    if !rustix::process::geteuid().is_root() {
        println!("LEFT OUT: only root can run programs as other users");
        return None;
    }
    // Unique per test, because paths in /tmp contain the user's id.
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = 1_000_000 + 16 * std::process::id() + 2 * NEXT.fetch_add(1, Ordering::Relaxed);
    let program = Rc::new(ForAll::lameduck());
    Some([User(Some(first), program.clone()), User(Some(first + 1), program)])
}

impl User {
    /// lameduck as this user, with this `XDG_RUNTIME_DIR`.
    fn lameduck(&self, runtime_dir: &Path) -> Command {
        let mut command = self.1.command(self.0);
        command.env("XDG_RUNTIME_DIR", runtime_dir);
        command
    }

    fn owns(&self, path: &Path) {
        chown(path, self.0, self.0).expect("root may");
    }

    fn proxy(&self, runtime_dir: &Path, args: &[&str]) -> Process {
        let mut program = self.lameduck(runtime_dir);
        program.args(["proxy", "--listen", "127.0.0.1:0", "--probe-listen", "off", "--log-format", "json"]);
        Process::start("lameduck", program.args(args))
    }
}

/// A directory that every user may write to, like /tmp.
fn shared() -> PathBuf {
    let dir = temporary_directory();
    fs::set_permissions(&dir, Permissions::from_mode(0o1777)).expect("ours");
    dir
}

fn listening(proxy: &Process) -> Value {
    proxy.wait_line("the addresses", |line| {
        serde_json::from_str::<Value>(line).ok().filter(|entry| entry["message"] == "listening")
    })
}

fn answer(proxy: &Process) -> String {
    let addr = listening(proxy)["listen"].as_str().expect("an address").parse().expect("an address");
    Client::ask(addr, "/").text()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_state_file_from_another_user_or_behind_a_link_redirects_no_request() {
    let (app, evil) = (Node::held(), RawApp::start().answer_all(OK));
    let (dir, elsewhere) = (shared(), temporary_directory());
    let (control, state) = (dir.join("c.sock"), dir.join("c.upstream"));
    let planted = elsewhere.join("planted");
    fs::write(&planted, format!("{}\n", evil.addr)).expect("ours");
    let upstream = app.addr.to_string();
    let args = ["--upstream", &upstream, "--control", control.to_str().expect("UTF-8")];

    symlink(&planted, &state).expect("a link");
    let mut proxy = this_user().proxy(&dir, &args);
    assert!(answer(&proxy).starts_with("hello"), "{}", proxy.output());
    assert!(proxy.output().contains("left aside: it is a link"), "{}", proxy.output());
    proxy.kill();
    fs::remove_file(&state).expect("ours");

    if let Some([_, other]) = users() {
        fs::write(&state, format!("{}\n", evil.addr)).expect("ours");
        other.owns(&state);
        let proxy = this_user().proxy(&dir, &args);
        assert!(answer(&proxy).starts_with("hello"), "{}", proxy.output());
        assert!(proxy.output().contains("left aside: it belongs to another user"), "{}", proxy.output());
    }
    [dir, elsewhere].iter().for_each(|dir| drop(fs::remove_dir_all(dir)));
}

#[test]
fn what_a_switch_remembers_is_not_written_through_a_link() {
    let (app, other) = (Node::held(), Node::held());
    let proxy = Lameduck::proxy(app.addr, &[]);
    let victim = proxy.dir.join("victim");
    fs::write(&victim, "mine").expect("ours");
    symlink(&victim, proxy.control.with_extension("new")).expect("a link");
    let switched = proxy.command_output(&["switch", &other.addr.to_string()]);
    assert!(switched.status.success(), "{switched:?}");
    assert_eq!(fs::read_to_string(victim).expect("ours"), "mine");
    let state = proxy.control.with_extension("upstream");
    assert_eq!(fs::read_to_string(&state).expect("remembered"), format!("{}\n", other.addr));
    assert_eq!(fs::symlink_metadata(&state).expect("it is there").mode() & 0o777, 0o600);
}

#[test]
fn a_folder_that_another_user_made_first_is_not_used() {
    let Some([user, other]) = users() else { return };
    let (app, evil) = (Node::held(), RawApp::start().answer_all(OK));
    let upstream = app.addr.to_string();
    let id = user.0.unwrap_or_default();
    let last = PathBuf::from(format!("/tmp/lameduck-{id}"));
    let own = temporary_directory();
    user.owns(&own);
    let plants: [&dyn Fn(&Path); 3] = [
        &|folder| {
            fs::create_dir(folder).expect("shared");
            fs::write(folder.join("control.upstream"), format!("{}\n", evil.addr)).expect("ours");
            other.owns(folder);
        },
        // The directory belongs to the proxy's user, but the link to it was made by the other user.
        &|folder| symlink(&own, folder).expect("a link"),
        &|folder| {
            fs::create_dir(folder).expect("shared");
            user.owns(folder);
            fs::set_permissions(folder, Permissions::from_mode(0o777)).expect("ours");
        },
    ];
    for plant in plants {
        let runtime_dir = shared();
        plant(&runtime_dir.join("lameduck"));
        let proxy = user.proxy(&runtime_dir, &["--upstream", &upstream]);
        assert!(answer(&proxy).starts_with("hello"), "{}", proxy.output());
        assert_eq!(listening(&proxy)["control"], last.join("control.sock").display().to_string());
        let folder = fs::symlink_metadata(&last).expect("made");
        assert_eq!((folder.uid(), folder.mode() & 0o777), (id, 0o700));
        let status = user.lameduck(&runtime_dir).args(["status", "--json"]).output().expect("lameduck");
        assert!(status.status.success(), "{}", text(&status));
        drop(proxy);
        fs::remove_dir_all(&last).expect("ours");
        let _ = fs::remove_dir_all(runtime_dir);
    }
    let _ = fs::remove_dir_all(own);
}

#[test]
fn without_a_usable_folder_an_abstract_socket_serves_only_its_user() {
    let Some([user, other]) = users() else { return };
    let app = Node::held();
    let upstream = app.addr.to_string();
    let id = user.0.unwrap_or_default();
    let nowhere = Path::new("/nowhere");
    let planted = PathBuf::from(format!("/tmp/lameduck-{id}"));
    fs::create_dir(&planted).expect("shared");
    let proxy = user.proxy(nowhere, &["--upstream", &upstream]);
    let name = format!("@lameduck-{id}");
    assert_eq!(listening(&proxy)["control"], name);
    let warnings =
        proxy.output().lines().filter(|line| line.contains("using another control socket")).count();
    assert_eq!(warnings, 1, "{}", proxy.output());
    assert!(proxy.output().contains(&format!("{} belongs to another user (uid 0)", planted.display())));

    let status = user.lameduck(nowhere).arg("status").output().expect("lameduck");
    assert!(status.status.success() && text(&status).contains("serving"), "{}", text(&status));
    let stranger = other.lameduck(nowhere).args(["status", "--control", &name]).output().expect("lameduck");
    assert!(!stranger.status.success(), "{}", text(&stranger));
    // A plain client, which does not check the proxy's user: here the proxy itself must refuse.
    let tests = ForAll::copy(&std::env::current_exe().expect("a path"));
    let asked = |who: &User| {
        let mut ask = tests.command(who.0);
        ask.args(["--exact", "control_socket_is_our_own::asks_for_the_status", "--ignored", "--nocapture"]);
        text(&ask.env("ASK_AT", &name[1..]).output().expect("it starts"))
    };
    assert!(asked(&user).contains("200 OK"), "{}", asked(&user));
    assert!(asked(&other).contains("answered: \"\""), "{}", asked(&other));
    let status = user.lameduck(nowhere).arg("status").output().expect("lameduck");
    assert!(text(&status).contains("serving"), "{}", text(&status));
    let _ = fs::remove_dir(planted);
}

#[test]
#[ignore = "run by the test above, as other users"]
fn asks_for_the_status() {
    let Ok(name) = std::env::var("ASK_AT") else { return };
    let addr = SocketAddr::from_abstract_name(name).expect("a name");
    let mut control = UnixStream::connect_addr(&addr).expect("any user can connect");
    let mut answer = String::new();
    // The proxy may already have closed the connection.
    let _ = control.write_all(b"GET /status HTTP/1.0\r\n\r\n");
    let _ = control.read_to_string(&mut answer);
    println!("answered: {answer:?}");
}

#[test]
fn a_command_trusts_only_its_user_and_root() {
    let Some([user, other]) = users() else { return };
    let (app, runtime_dir) = (Node::held(), shared());
    let upstream = app.addr.to_string();
    let stranger = other.proxy(&runtime_dir, &["--upstream", &upstream]);
    let control = listening(&stranger)["control"].as_str().expect("a path").to_owned();
    assert_eq!(control, runtime_dir.join("lameduck/control.sock").display().to_string());
    // Root can connect in any case; with these modes, which the owner may set, every user can.
    fs::set_permissions(&control, Permissions::from_mode(0o666)).expect("root may");
    fs::set_permissions(runtime_dir.join("lameduck"), Permissions::from_mode(0o755)).expect("root may");
    let given = ["--control", control.as_str()];
    // Root is tested only with an explicit path: its default paths may belong to a real proxy.
    for (user, given) in [(&user, &given[..]), (&user, &[]), (&this_user(), &given)] {
        let swap = ["swap"].into_iter().chain(given.iter().copied()).chain(["--", "echo", "swapped"]);
        let output = user.lameduck(&runtime_dir).args(swap).output().expect("lameduck");
        assert!(!output.status.success() && !text(&output).contains("swapped"), "{}", text(&output));
        assert!(text(&output).contains("another user (uid"), "{}", text(&output));
    }
    let own = other.lameduck(&runtime_dir).arg("status").output().expect("lameduck");
    assert!(own.status.success(), "{}", text(&own));
    drop(stranger);
    let _ = fs::remove_dir_all(runtime_dir);
}
