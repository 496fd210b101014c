//! Chooses the lameduck binary to measure: the one that is shipped, a static musl build.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::server::Result;

/// The given binary, or else the musl build in that profile, built now, or else, with a note, the glibc build.
pub fn choose(given: Option<&Path>, profile: &str, notes: &mut Vec<String>) -> Result<PathBuf> {
    if let Some(path) = given {
        return path.canonicalize().map_err(|error| format!("{}: {error}", path.display()).into());
    }
    let musl = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    if is_installed(&musl) {
        return build(Some(&musl), profile);
    }
    notes.push(format!(
        "lameduck is the glibc build, which is not what is shipped; for that: rustup target add {musl}"
    ));
    build(None, profile)
}

fn is_installed(target: &str) -> bool {
    let output = Command::new("rustup").args(["target", "list", "--installed"]).output();
    output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).lines().any(|line| line == target))
}

fn build(target: Option<&str>, profile: &str) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.args(["build", "--bin", "lameduck", "--profile", profile]);
    command.args(target.map(|target| format!("--target={target}")));
    if !command.status()?.success() {
        return Err("lameduck could not be built".into());
    }
    // This benchmark's own binary is target/<profile>/lameduck; the musl one is target[/<target>]/<profile>/lameduck.
    let own = Path::new(env!("CARGO_BIN_EXE_lameduck"));
    let folder = own.ancestors().nth(2).ok_or("no target directory")?;
    Ok(folder.join(target.unwrap_or_default()).join(profile).join("lameduck"))
}
