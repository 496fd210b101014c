//! Runs programs as other users.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::process::{lameduck, temporary_directory};

/// A copy of a program that every user may execute, wherever the original is; removed on drop.
pub struct ForAll(PathBuf);

impl ForAll {
    /// The built lameduck.
    pub fn lameduck() -> Self {
        Self::copy(Path::new(env!("CARGO_BIN_EXE_lameduck")))
    }

    /// Any program.
    pub fn copy(program: &Path) -> Self {
        let dir = temporary_directory();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).expect("ours");
        // Copied by another process: exec fails with ETXTBSY while this process, or a child that another test has just
        // forked, has the file open for writing.
        let copied = Command::new("cp").arg(program).arg(dir.join("program")).status().expect("cp starts");
        assert!(copied.success(), "{copied}");
        Self(dir)
    }

    /// The program as this user, without lameduck settings; none means the user of the test run.
    pub fn command(&self, user: Option<u32>) -> Command {
        let mut command = Command::new(self.0.join("program"));
        for (name, _) in lameduck().get_envs() {
            command.env_remove(name);
        }
        if let Some(id) = user {
            command.uid(id).gid(id);
        }
        command
    }
}

impl Drop for ForAll {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
