//! Files that the sidecar writes into the pod's shared directory for the app's container.

use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use super::names::{PRELOAD, PROGRAM, SHIM};
use crate::capture::object::OBJECT;

const SCRIPT: &str = include_str!("preload.js");

/// Writes the shim, the preload and the program into this directory, readable by every user, each atomically. A file that
/// is the same already stays: the app's processes have the shim mapped.
///
/// # Errors
/// The directory can't be written, or this program can't be read.
pub fn write(dir: &Path) -> io::Result<()> {
    if !OBJECT.is_empty() {
        put_if_new(dir, SHIM, OBJECT)?;
    }
    put_if_new(dir, PRELOAD, SCRIPT.as_bytes())?;
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

/// Puts a file in place unless it is there with the same content and mode.
fn put_if_new(dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let path = dir.join(name);
    let mode = fs::symlink_metadata(&path).map(|file| file.mode());
    let same = mode.is_ok_and(|mode| mode == libc::S_IFREG | 0o644)
        && fs::read(path).is_ok_and(|there| there == content);
    if same { Ok(()) } else { put(dir, name, 0o644, &mut &*content) }
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_in_use_is_replaced_by_another_one_and_only_if_it_differs() {
        let dir = std::env::temp_dir().join(format!("lameduck-share-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join(SHIM);
        let write = |content: &[u8]| {
            put_if_new(&dir, SHIM, content).unwrap();
            fs::symlink_metadata(&path).unwrap().ino()
        };
        let first = write(b"one");
        assert_eq!(write(b"one"), first);
        // An app has the first one mapped.
        let mapped = File::open(&path).unwrap();
        assert_ne!(write(b"two"), first);
        assert_eq!(io::read_to_string(mapped).unwrap(), "one");
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        write(b"two");
        fs::rename(&path, dir.join("elsewhere")).unwrap();
        symlink("elsewhere", &path).unwrap();
        write(b"two");
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode(), libc::S_IFREG | 0o644);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2, "nothing is left over");
        fs::remove_dir_all(dir).unwrap();
    }
}
