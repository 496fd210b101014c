//! The file that `LD_PRELOAD` of the app names, for as long as the app runs.

use std::fs::{self, File, Permissions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, StatVfsMountFlags, memfd_create, statvfs};

/// Name of the object in its directory.
const NAME: &str = "lameduck.so";

/// A shared object that every process of the app can load. Its file is removed on drop.
#[derive(Debug)]
pub struct Preload {
    path: PathBuf,
    dir: Option<PathBuf>,
    _memory: Option<File>,
}

impl Preload {
    /// Writes the object to a new directory, where a file may be mapped to be executed and every user can read it: the
    /// app may change its user. On a read-only file system it stays in memory, where only our own user can read it.
    ///
    /// # Errors
    /// None of that works.
    pub fn write(object: &[u8]) -> io::Result<Self> {
        let places = [std::env::temp_dir(), "/dev/shm".into(), "/var/tmp".into()];
        let written = places.iter().find_map(|place| in_directory(place, object).ok());
        written.map_or_else(|| in_memory(object), Ok)
    }

    /// Returns the path for `LD_PRELOAD`.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn in_directory(place: &Path, object: &[u8]) -> io::Result<Preload> {
    if statvfs(place)?.f_flag.contains(StatVfsMountFlags::NOEXEC) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    // The loader splits the variable at spaces and colons.
    if place.as_os_str().as_encoded_bytes().iter().any(|byte| b" :".contains(byte)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let dir = place.join(format!("lameduck-run-{:016x}", RandomState::new().hash_one(std::process::id())));
    // Fails if anything is there. Nobody else may write in it, whatever the umask is.
    fs::DirBuilder::new().mode(0o700).create(&dir)?;
    let preload = Preload { path: dir.join(NAME), dir: Some(dir.clone()), _memory: None };
    let mut file = File::create_new(&preload.path)?;
    file.write_all(object)?;
    // The umask may have removed permissions of group and others.
    file.set_permissions(Permissions::from_mode(0o644))?;
    fs::set_permissions(dir, Permissions::from_mode(0o755))?;
    Ok(preload)
}

fn in_memory(object: &[u8]) -> io::Result<Preload> {
    let memory = memfd_create("lameduck.so", MemfdFlags::CLOEXEC)?;
    let mut file = File::from(memory);
    file.write_all(object)?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into();
    Ok(Preload { path, dir: None, _memory: Some(file) })
}

impl Drop for Preload {
    fn drop(&mut self) {
        if let Some(dir) = &self.dir {
            let _ = fs::remove_dir_all(dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_can_be_read_from_memory_too() {
        let preload = in_memory(b"object").unwrap();
        assert_eq!(fs::read(preload.path()).unwrap(), b"object");
    }

    #[test]
    fn nothing_is_left_of_it() {
        let preload = Preload::write(b"object").unwrap();
        let path = preload.path().to_owned();
        assert_eq!(fs::read(&path).unwrap(), b"object");
        drop(preload);
        assert!(!path.parent().unwrap().exists());
    }

    #[test]
    fn every_user_can_read_it_and_only_we_can_change_it() {
        let dir = std::env::temp_dir();
        let preload = in_directory(&dir, b"object").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(preload.path()), mode(preload.path().parent().unwrap())), (0o644, 0o755));
    }
}
