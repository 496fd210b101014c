//! The object loads into anything or nothing: other preloaded objects come first, and a loader that can't use it goes on.

use std::fs;
use std::process::Command;

use crate::{compile, folder, in_pod, output, preloaded, shim, with_each_libc};

const SOCKET: &str = "tcp4,0.0.0.0,3000,listen";
const MOVED: &str = "bind 0 -, listen 0 -, name 127.77.0.1:3000\n";
const LEFT: &str = "bind 0 -, listen 0 -, name 0.0.0.0:3000\n";

#[test]
fn another_object_that_stands_in_for_bind_is_called_too() {
    for (cc, program) in ["cc", "musl-gcc"].into_iter().zip(with_each_libc("sockets")) {
        let other = compile(cc, "other", &["-shared", "-fPIC"]).unwrap();
        in_pod(|| {
            let both = format!("{}:{}", other.display(), shim().display());
            let mut command = Command::new(&program);
            assert_eq!(
                output(command.arg(SOCKET).env("LD_PRELOAD", both)),
                format!("the other one\n{MOVED}")
            );
        });
    }
}

#[test]
fn one_of_another_architecture_is_passed_over() {
    let mut object = fs::read(shim()).unwrap();
    // e_machine: RISC-V.
    object[18..20].copy_from_slice(&243_u16.to_le_bytes());
    let path = folder().join("other-architecture.so");
    fs::write(&path, object).unwrap();
    // musl doesn't look.
    let program = compile("cc", "sockets", &["-pthread"]).unwrap();
    in_pod(|| assert_eq!(output(preloaded(&program).arg(SOCKET).env("LD_PRELOAD", &path)), LEFT));
}

#[test]
fn one_that_may_not_be_executed_is_passed_over() {
    for program in with_each_libc("sockets") {
        in_pod(|| {
            let dir = folder().join("noexec");
            fs::create_dir_all(&dir).unwrap();
            let script = "mount -t tmpfs -o noexec none $2 && cp $1 $2 && LD_PRELOAD=$2/shim.so exec $3 $4";
            let mut command = Command::new("unshare");
            command
                .args(["--mount", "sh", "-c", script, "sh"])
                .arg(shim())
                .arg(&dir)
                .arg(&program)
                .arg(SOCKET);
            let left = command.output().unwrap();
            if !left.status.success() {
                return eprintln!(
                    "LEFT OUT: nothing may be mounted: {}",
                    String::from_utf8_lossy(&left.stderr)
                );
            }
            assert_eq!(String::from_utf8_lossy(&left.stdout), LEFT);
        });
    }
}

#[test]
fn a_program_without_a_libc_starts() {
    let options = ["-nostdlib", "-fPIE", "-pie", "-Wl,-dynamic-linker,/lib64/ld-linux-x86-64.so.2"];
    if !cfg!(target_arch = "x86_64") {
        return eprintln!("LEFT OUT: the loader's path is x86_64's");
    }
    let program = compile("cc", "nothing", &options).unwrap();
    assert_eq!(preloaded(&program).status().unwrap().code(), Some(5));
}

/// Whatever it needed or exported, an app could lack or get.
#[test]
fn it_needs_nothing_and_exports_four_functions() {
    let Ok(read) = Command::new("readelf").args(["-dW", "--dyn-syms", "-l"]).arg(shim()).output() else {
        return eprintln!("LEFT OUT: readelf is not installed (binutils)");
    };
    let text = String::from_utf8(read.stdout).unwrap();
    for none in ["(NEEDED)", "TLS", "RWE", "TEXTREL"] {
        assert!(!text.contains(none), "{none}: {text}");
    }
    let symbols: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let named = |of: &dyn Fn(&[&str]) -> bool| {
        let mut names: Vec<_> =
            symbols.iter().filter(|fields| fields.len() == 8 && of(fields)).map(|f| f[7]).collect();
        names.sort_unstable();
        names
    };
    assert_eq!(named(&|fields| fields[4] == "GLOBAL"), ["bind", "listen", "sigaction", "signal"]);
    let weak = ["__errno_location", "__sigaction", "bsd_signal", "dlsym", "environ"];
    assert_eq!(named(&|fields| fields[4] == "WEAK" && fields[6] == "UND"), weak);
    let size = fs::metadata(shim()).unwrap().len();
    assert!(size < 16 << 10, "{size} bytes");
}
