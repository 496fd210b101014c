//! The file that lets Node hear SIGTERM as PID 1, and how it gets into the pod's shared directory.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Its name.
pub const FILE: &str = "preload.js";

const SCRIPT: &str = include_str!("preload.js");

/// Writes the preload into this directory, readable by every user and never half of it.
///
/// # Errors
/// When the directory can't be written.
pub fn write(dir: &Path) -> io::Result<()> {
    let new = dir.join(format!(".{FILE}.{}", std::process::id()));
    let _ = std::fs::remove_file(&new);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&new)?;
    file.write_all(SCRIPT.as_bytes())?;
    // The umask may have taken the others' right to read.
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    std::fs::rename(new, dir.join(FILE))
}
