//! Files that the sidecar writes into the pod's shared directory for the app's container.

use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use super::names::{PRELOAD, PROGRAM, SHIM};

const SCRIPT: &str = include_str!("preload.js");
/// The shim for this program's architecture; empty if there is none (`build.rs`).
const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shim.so"));

/// Writes the shim, the preload and the program into this directory, readable by every user, each atomically. A file that
/// is the same already stays: the app's processes have the shim mapped.
///
/// # Errors
/// The directory can't be written, or this program can't be read.
pub fn write(dir: &Path) -> io::Result<()> {
    for (name, content) in [(SHIM, OBJECT), (PRELOAD, SCRIPT.as_bytes())] {
        if !content.is_empty() && !is_there(&dir.join(name), content) {
            put(dir, name, 0o644, &mut &*content)?;
        }
    }
    put(dir, PROGRAM, 0o755, &mut File::open("/proc/self/exe")?)
}

/// Marks this program as running with a lock on its file (flock(2)). The lock lasts as long as the returned file,
/// survives an exec, and is visible in every container that shares the directory.
///
/// # Errors
/// This program's file can't be locked.
pub fn mark_running() -> io::Result<File> {
    let program = File::open("/proc/self/exe")?;
    program.lock_shared()?;
    rustix::io::fcntl_setfd(&program, rustix::io::FdFlags::empty())?;
    Ok(program)
}

/// Whether any process holds that lock on the program in this directory.
pub fn is_running(dir: &Path) -> bool {
    let tried = File::open(dir.join(PROGRAM)).map(|program| program.try_lock());
    matches!(tried, Ok(Err(TryLockError::WouldBlock)))
}

/// Whether the file has this content, for every user.
fn is_there(path: &Path, content: &[u8]) -> bool {
    let mode = fs::symlink_metadata(path).map(|file| file.mode());
    mode.is_ok_and(|mode| mode == libc::S_IFREG | 0o644) && fs::read(path).is_ok_and(|there| there == content)
}

fn put(dir: &Path, name: &str, mode: u32, from: &mut impl io::Read) -> io::Result<()> {
    let new = dir.join(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_file(&new);
    let mut file = File::create_new(&new)?;
    io::copy(from, &mut file)?;
    // The umask may have removed permissions of group and others.
    file.set_permissions(Permissions::from_mode(mode))?;
    // A program that is open for writing can't be executed (ETXTBSY).
    drop(file);
    fs::rename(new, dir.join(name))
}
