//! Removes the unix socket file that a dead app left behind, since the app could not bind it again.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::net::UnixStream;

use crate::config::UpstreamAddr;

/// Interval between checks of the file. The kubelet takes longer than this to restart an app.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// Interval between checks whether the app has moved to a unix socket.
const MOVED_INTERVAL: Duration = Duration::from_secs(1);
/// A socket that refuses connections for this long is stale: far longer than an app takes from bind to listen.
const STALE_TIMEOUT: Duration = Duration::from_secs(2);

/// Device, inode and modification time: inode numbers are reused soon.
type Identity = (u64, u64, i64, i64);

/// The file at the last check.
struct Seen {
    identity: Identity,
    /// Whether the socket accepted a connection: if it refuses one now, its listener is gone for good.
    alive: bool,
    since: Instant,
}

/// Removes the app's socket file whenever no process listens on it any more. Never returns.
pub async fn keep_away(app: impl Fn() -> UpstreamAddr) {
    let mut last = None;
    loop {
        match app() {
            UpstreamAddr::Unix(path) => {
                last = look(&path, last).await;
                tokio::time::sleep(CHECK_INTERVAL).await;
            }
            UpstreamAddr::Tcp { .. } | UpstreamAddr::Tls { .. } => tokio::time::sleep(MOVED_INTERVAL).await,
        }
    }
}

async fn look(path: &Path, last: Option<Seen>) -> Option<Seen> {
    let identity = identity(path)?;
    match UnixStream::connect(path).await {
        Ok(_) => Some(Seen { identity, alive: true, since: Instant::now() }),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            let seen = last.filter(|seen| seen.identity == identity);
            let seen = seen.unwrap_or_else(|| Seen { identity, alive: false, since: Instant::now() });
            if seen.alive || seen.since.elapsed() >= STALE_TIMEOUT {
                remove(path, identity);
                return None;
            }
            Some(seen)
        }
        // For example, its accept queue is full.
        Err(_) => last,
    }
}

/// Moves the file away and checks it again before deleting it: the app may just have created a new one.
fn remove(path: &Path, dead: Identity) {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}", std::process::id()));
    let aside = Path::new(&aside);
    if let Err(error) = fs::rename(path, aside) {
        tracing::warn!(path = %path.display(), "can't remove the socket that the app left behind: {error}");
        return;
    }
    if identity(aside) == Some(dead) {
        tracing::info!(path = %path.display(), "removed the socket that the app left behind");
    } else {
        let _ = fs::hard_link(aside, path);
    }
    let _ = fs::remove_file(aside);
}

fn identity(path: &Path) -> Option<Identity> {
    let file = fs::symlink_metadata(path).ok().filter(|file| file.file_type().is_socket())?;
    Some((file.dev(), file.ino(), file.mtime(), file.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A unique path for each test.
    fn path(test: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("lameduck-stale-{}-{test}.sock", std::process::id()));
        let _ = fs::remove_file(&path);
        path
    }

    #[tokio::test]
    async fn a_socket_whose_listener_has_gone_is_removed_at_the_next_look() {
        let path = path("gone");
        let app = UnixListener::bind(&path).unwrap();
        let seen = look(&path, None).await;
        assert!(seen.as_ref().is_some_and(|seen| seen.alive));
        drop(app);
        assert!(look(&path, seen).await.is_none());
        assert!(!path.exists());
    }

    /// Between bind and listen, connections are refused.
    #[tokio::test]
    async fn a_socket_that_nobody_was_seen_to_listen_on_has_time() {
        let path = path("young");
        drop(UnixListener::bind(&path).unwrap());
        let seen = look(&path, None).await;
        assert!(seen.as_ref().is_some_and(|seen| !seen.alive) && path.exists());
        let long_ago = seen.map(|seen| Seen { since: seen.since - STALE_TIMEOUT, ..seen });
        assert!(look(&path, long_ago).await.is_none());
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_new_socket_in_the_place_of_the_dead_one_stays() {
        let path = path("new");
        let dead = UnixListener::bind(&path).unwrap();
        let seen = look(&path, None).await.unwrap();
        drop(dead);
        fs::remove_file(&path).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        assert_ne!(identity(&path), Some(seen.identity));
        assert!(look(&path, Some(seen)).await.is_some_and(|seen| !seen.alive));
        // A file created between check and removal.
        remove(&path, (0, 0, 0, 0));
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
    }

    #[tokio::test]
    async fn what_is_no_socket_is_left_alone() {
        let path = path("file");
        fs::write(&path, "").unwrap();
        assert!(look(&path, None).await.is_none());
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
    }
}
