//! bind(2) under the shim: what moves, and that everything else is as without it, under glibc and musl. `sockets.c` binds.

use std::path::Path;
use std::process::Command;

use crate::{POD, POD_V6, in_pod, output, preloaded, with_each_libc};

const V4: &str = "127.77.0.1:3000";
const V6: &str = "[::ffff:127.77.0.1]:3000";

/// What each of these sockets reports, in a fresh process with the shim.
fn bound(program: &Path, sockets: &[&str]) -> Vec<String> {
    output(preloaded(program).args(sockets)).lines().map(str::to_owned).collect()
}

fn without_shim(program: &Path, sockets: &[&str]) -> Vec<String> {
    output(Command::new(program).args(sockets)).lines().map(str::to_owned).collect()
}

/// For every libc, in a pod of its own.
fn with_each(test: impl Fn(&Path) + Sync) {
    for program in with_each_libc("sockets") {
        in_pod(|| test(&program));
    }
}

#[test]
fn what_others_can_reach_moves() {
    let listening = |name: &str| format!("bind 0 -, listen 0 -, name {name}");
    with_each(|program| {
        for (socket, name) in [
            ("tcp4,0.0.0.0,3000,listen", V4),
            (&format!("tcp4,{POD},3000,listen"), V4),
            ("tcp6,::,3000,listen", V6),
            (&format!("tcp6,{POD_V6},3000,listen"), V6),
            (&format!("tcp6,::ffff:{POD},3000,listen"), V6),
            ("tcp4,0.0.0.0,3000,listen,reuseaddr", V4),
            ("tcp4,0.0.0.0,3000,listen,fork", V4),
            ("mptcp,0.0.0.0,3000,listen", V4),
            ("tcp4,0.0.0.0,3000,listen,edge", V4),
            // The shortest that the kernel takes.
            ("tcp6,::,3000,listen,len=24", V6),
            ("tcp6,::,3000,listen,len=128", V6),
        ] {
            assert_eq!(bound(program, &[socket]), [listening(name)], "{socket}");
        }
    });
}

#[test]
fn everything_else_is_as_without_the_shim() {
    with_each(|program| {
        for socket in [
            "tcp4,127.0.0.1,3000,listen",
            "tcp4,127.1.2.3,3000,listen",
            "tcp6,::1,3000,listen",
            "tcp6,::ffff:127.0.0.1,3000,listen",
            // Its clients would have no other way to it.
            "tcp6,::,3000,listen,v6only",
            &format!("tcp6,{POD_V6},3000,listen,v6only"),
            "tcp4,0.0.0.0,3000,listen,device=lo",
            "udp4,0.0.0.0,3000",
            &format!("udp4,{POD},3000"),
            "udp6,::,3000",
            &format!("unix,{}/capture.sock,0", crate::folder().display()),
        ] {
            let asked = socket.strip_prefix("unix,").and_then(|rest| rest.split(',').next());
            asked.map(std::fs::remove_file);
            let without = without_shim(program, &[socket]);
            asked.map(std::fs::remove_file);
            assert_eq!(bound(program, &[socket]), without, "{socket}");
            assert!(without[0].starts_with("bind 0 -"), "{socket}: {without:?}");
        }
        // Port 0: any port, but nobody has a name for it.
        let [any] = &bound(program, &["tcp4,0.0.0.0,0,listen"])[..] else { panic!("one line") };
        assert!(any.starts_with("bind 0 -, listen 0 -, name 0.0.0.0:"), "{any}");
    });
}

/// The kernel refuses these, whatever the shim thinks of them.
#[test]
fn what_fails_fails_with_the_same_error() {
    with_each(|program| {
        for socket in [
            "tcp4,0.0.0.0,3000,null",
            "tcp4,0.0.0.0,3000,unmapped",
            "tcp4,0.0.0.0,3000,edge,len=128",
            "tcp4,0.0.0.0,3000,early",
            "tcp4,0.0.0.0,3000,len=0",
            "tcp4,0.0.0.0,3000,len=2",
            "tcp4,0.0.0.0,3000,len=15",
            "tcp4,0.0.0.0,3000,len=129",
            "tcp4,0.0.0.0,3000,len=-1",
            "tcp6,::,3000,len=16",
            "tcp6,::,3000,len=23",
            "tcp4,0.0.0.0,3000,closed",
            "tcp4,0.0.0.0,3000,pipe",
            // Addresses that the pod does not have.
            "tcp4,198.18.9.9,3000",
            "tcp6,2001:db8::9,3000",
            "udp4,198.18.9.9,3000",
        ] {
            let without = without_shim(program, &[socket]);
            assert!(without[0].starts_with("bind -1 "), "{socket}: {without:?}");
            assert_eq!(bound(program, &[socket]), without, "{socket}");
        }
        // An address that the pod may get later isn't one that the proxy could take.
        let later = ["tcp4,198.18.9.9,3000,listen,freebind"];
        assert_eq!(bound(program, &later), without_shim(program, &later));
    });
}

#[test]
fn two_on_one_port_are_as_many_as_without_the_shim() {
    with_each(|program| {
        for pair in [
            ["tcp4,0.0.0.0,3000,listen", "tcp4,0.0.0.0,3000,listen"],
            ["tcp4,0.0.0.0,3000,listen,reuseaddr", "tcp4,0.0.0.0,3000,listen,reuseaddr"],
            ["tcp6,::,3000,listen", "tcp4,0.0.0.0,3000,listen"],
            ["tcp4,0.0.0.0,3000,listen,reuseport", "tcp4,0.0.0.0,3000,listen,reuseport"],
            // As nginx, Apache and Redis have them: the second one joins the first.
            ["tcp4,0.0.0.0,3000,listen", "tcp6,::,3000,listen,v6only"],
            // Two addresses: the first one moves.
            [&format!("tcp4,{POD},3000,listen"), &format!("tcp6,{POD_V6},3000,listen")],
            ["tcp4,127.0.0.1,3000,listen", &format!("tcp4,{POD},3000,listen")],
        ] {
            let verdict = |lines: Vec<String>| {
                lines.iter().map(|line| line.split(", name").next().unwrap().to_owned()).collect::<Vec<_>>()
            };
            let (with, without) = (bound(program, &pair), without_shim(program, &pair));
            assert_eq!(verdict(with.clone()), verdict(without), "{pair:?}");
            assert!(with.iter().any(|line| line.contains("127.77.0.1")), "{pair:?}: {with:?}");
        }
    });
}

#[test]
fn a_socket_is_inherited_where_it_was_bound() {
    with_each(|program| {
        let lines = bound(program, &["tcp4,0.0.0.0,3000,exec"]);
        assert_eq!(lines, [format!("bind 0 -, name {V4}"), format!("passed: listen 0, name {V4}")]);
    });
}

/// A pod whose loopback is 127.0.0.1 and no more.
#[test]
fn where_127_77_0_1_does_not_exist_nothing_moves() {
    with_each(|program| {
        let narrow = "ip addr del 127.0.0.1/8 dev lo && ip addr add 127.0.0.1/32 dev lo";
        output(Command::new("sh").args(["-c", narrow]));
        let lines = bound(program, &["tcp4,0.0.0.0,3000,listen", "tcp6,::,3001,listen"]);
        assert_eq!(
            lines,
            ["bind 0 -, listen 0 -, name 0.0.0.0:3000", "bind 0 -, listen 0 -, name [::]:3001"]
        );
    });
}

#[test]
fn switched_off_nothing_moves() {
    with_each(|program| {
        let mut off = preloaded(program);
        let line = output(off.env("LAMEDUCK_CAPTURE", "off").arg("tcp4,0.0.0.0,3000,listen"));
        assert_eq!(line, "bind 0 -, listen 0 -, name 0.0.0.0:3000\n");
    });
}
