//! The termination log, which the kubelet shows as the container's termination message: `kubectl describe pod`.

use std::path::Path;

/// Replaces its content. The kubelet creates the file; if it does not exist, nothing would read it.
pub fn write(path: &Path, text: &str) {
    if path.is_file()
        && let Err(error) = std::fs::write(path, text)
    {
        tracing::debug!(%error, "no termination message");
    }
}
