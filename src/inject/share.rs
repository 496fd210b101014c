//! What the sidecar puts into the pod's shared directory for the app's container.

use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::names::{PRELOAD, PROGRAM};

const SCRIPT: &str = include_str!("preload.js");

/// Writes both into this directory, for every user, and never half of one.
///
/// # Errors
/// When the directory can't be written, or this program can't be read.
pub fn write(dir: &Path) -> io::Result<()> {
    put(dir, PRELOAD, 0o644, &mut SCRIPT.as_bytes())?;
    put(dir, PROGRAM, 0o755, &mut File::open("/proc/self/exe")?)
}

/// Keeps this program marked as running for as long as the file lives: across an exec, and seen from every container
/// that shares the directory (flock(2)).
///
/// # Errors
/// When this program's file can't be locked.
pub fn mark_running() -> io::Result<File> {
    let program = File::open("/proc/self/exe")?;
    program.lock_shared()?;
    rustix::io::fcntl_setfd(&program, rustix::io::FdFlags::empty())?;
    Ok(program)
}

/// Whether the program of this directory is marked as running by anybody.
pub fn is_running(dir: &Path) -> bool {
    let tried = File::open(dir.join(PROGRAM)).map(|program| program.try_lock());
    matches!(tried, Ok(Err(TryLockError::WouldBlock)))
}

fn put(dir: &Path, name: &str, mode: u32, from: &mut impl io::Read) -> io::Result<()> {
    let new = dir.join(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_file(&new);
    let mut file = File::create_new(&new)?;
    io::copy(from, &mut file)?;
    // The umask may have taken the others' rights.
    file.set_permissions(Permissions::from_mode(mode))?;
    // A program that is open for writing can't be run.
    drop(file);
    fs::rename(new, dir.join(name))
}
