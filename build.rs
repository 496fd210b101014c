//! Links the shim (`shim/`) as a shared object for the architecture of the program, which carries it (`inject/share.rs`).
//!
//! Cargo would build a member of the workspace for the program's own target and settings; a shared object without any
//! libc has others. Only what cargo uses for the program anyway is needed: its compiler, its `core`, its linker.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The architectures that the shim knows the system calls of.
const ARCHITECTURES: [&str; 2] = ["x86_64", "aarch64"];

fn main() {
    println!("cargo::rerun-if-changed=shim/src");
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    let shim = PathBuf::from(variable("OUT_DIR")).join("shim.so");
    let arch = variable("CARGO_CFG_TARGET_ARCH");
    if ARCHITECTURES.iter().any(|known| arch == *known) && variable("CARGO_CFG_TARGET_OS") == "linux" {
        link(&shim);
    } else {
        std::fs::write(shim, "").expect("OUT_DIR is written to");
    }
}

fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"))
}

fn link(shim: &Path) {
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--crate-name", "lameduck_shim", "--crate-type", "cdylib", "--edition", "2024"]);
    // Small, and without a path to code that panics: see `lameduck_shim_never_panics`.
    rustc.args(["-Cpanic=abort", "-Copt-level=z", "-Clto=fat", "-Ccodegen-units=1", "-Cstrip=symbols"]);
    // musl's targets make no shared object else.
    rustc.arg("-Ctarget-feature=-crt-static");
    rustc.arg("--target").arg(variable("TARGET")).arg("-o").arg(shim).arg("shim/src/lib.rs");
    let linker = env::var_os("RUSTC_LINKER").map(PathBuf::from);
    // The others are compilers, which take a linker's options after `-Wl,` and would add their own objects and libraries.
    let is_ld = |linker: &Path| linker.file_stem().is_some_and(|name| name.to_string_lossy().ends_with("ld"));
    let wl = if linker.as_deref().is_some_and(is_ld) {
        ""
    } else {
        rustc.args(["-Clink-arg=-nostdlib", "-Clink-arg=-nostartfiles"]);
        "-Wl,"
    };
    if let Some(linker) = linker {
        rustc.arg(format!("-Clinker={}", linker.display()));
    }
    // Nothing may be missing, every loader finds the names, and no page is wasted.
    for option in ["-zdefs", "--hash-style=both", "-znoseparate-code"] {
        rustc.arg(format!("-Clink-arg={wl}{option}"));
    }
    let linked = rustc.status().expect("rustc starts");
    assert!(linked.success(), "the shim was not linked: {rustc:?}");
}
