//! Under `lameduck run` an app that binds one address of the machine is served on that one only; its shim needs no file
//! system that can be written to; and every user of the app can load it.

use crate::common;
use crate::{POD, POD_V6, in_pod};

use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use common::http::Client;
use common::process::{Lameduck, lameduck};
use common::wait_for;

const APP: &str = "
    const server = require('http').createServer((req, res) => res.end(server.address().address));
    server.listen(3000, process.argv[1]);";

fn at(ip: &str) -> SocketAddr {
    SocketAddr::new(ip.parse::<IpAddr>().expect("an address"), 3000)
}

#[test]
fn an_app_on_one_address_of_the_machine_is_served_there_only() {
    for (own, other) in [(POD, POD_V6), (POD_V6, POD)] {
        in_pod(|| {
            let run = Lameduck::run_at(lameduck(), at(own), &[], &["node", "-e", APP, own]);
            assert_ne!(Client::ask(run.listen, "/").text(), own, "it has moved");
            for refused in [other, "127.0.0.1", "::1"] {
                assert!(Client::try_connect(at(refused)).is_err(), "{own}: {refused}");
            }
            assert_eq!(run.status().expect("a status")["bypassed"], serde_json::json!([]));
        });
    }
}

#[test]
fn an_app_on_all_addresses_is_served_on_all() {
    in_pod(|| {
        let run = Lameduck::run_at(lameduck(), at(POD), &[], &["node", "-e", APP]);
        for ip in [POD, POD_V6, "127.0.0.1", "::1"] {
            assert_eq!(Client::ask(at(ip), "/").head.status, 200, "{ip}");
        }
        wait_for("all requests counted", || {
            (run.metric("lameduck_requests_total{code=\"2xx\"}") == 4.0).then_some(())
        });
    });
}

/// Runs `run` by a shell that has first changed what it sees of the file system.
fn with_mounts(mounts: &str) -> Option<Command> {
    let allowed = Command::new("unshare").args(["--mount", "sh", "-c", mounts]).output();
    if !allowed.as_ref().is_ok_and(|allowed| allowed.status.success()) {
        eprintln!("LEFT OUT: nothing may be mounted: {allowed:?}");
        return None;
    }
    let mut program = Command::new("unshare");
    let script = format!("{mounts} && exec \"$0\" \"$@\"");
    program.args(["--mount", "sh", "-c", &script, env!("CARGO_BIN_EXE_lameduck")]).env_remove("PORT");
    Some(program)
}

#[test]
fn on_a_read_only_file_system_the_app_moves_too() {
    let mounts = "for dir in /tmp /var/tmp /dev/shm; do mount --bind $dir $dir && mount -o remount,ro,bind $dir || exit; done";
    let Some(program) = with_mounts(mounts) else { return };
    in_pod(|| {
        let run = Lameduck::run_at(program, at(POD), &[], &["node", "-e", APP]);
        assert!(Client::ask(run.listen, "/").text().contains("127."), "it has moved");
    });
}

#[test]
fn where_files_may_not_be_executed_the_app_moves_too() {
    let Some(program) = with_mounts("mount -t tmpfs -o noexec none /dev/shm") else { return };
    in_pod(|| {
        let mut program = program;
        program.env("TMPDIR", "/dev/shm");
        let run = Lameduck::run_at(program, at(POD), &[], &["node", "-e", APP]);
        assert!(Client::ask(run.listen, "/").text().contains("127."), "it has moved");
    });
}

/// As `gosu` and `su-exec` do in an entrypoint.
#[test]
fn an_app_that_changes_its_user_moves_too() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("LEFT OUT: the user can only be changed by root");
    }
    in_pod(|| {
        let app = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "node", "-e", APP];
        let run = Lameduck::run_at(lameduck(), at(POD), &[], &app);
        assert!(Client::ask(run.listen, "/").text().contains("127."), "it has moved");
    });
}
