//! `lameduck switch`: new requests go to another upstream, and the old one finishes its requests.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::clock::now;
use super::data_plane::DataPlane;
use crate::config::{ControlAddr, Settings, UpstreamAddr};
use crate::readiness;
use crate::upstream;

/// Limit on the file that remembers the upstream, in bytes: more than any path or host name needs.
const MAX_FILE: u64 = 4096;
/// How often the new upstream is asked whether it is ready, and how often the old one is checked for requests.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// Sends new requests to `to`, or back to `--upstream` if it is `None`, once that answers within `timeout`. The choice
/// is remembered in a file beside the control socket. Returns once every new request goes there; [`Left::run_dry`]
/// waits for the requests of the old servers.
///
/// # Errors
/// A text that says why nothing was changed.
pub async fn switch(
    plane: &dyn DataPlane,
    to: Option<UpstreamAddr>,
    timeout: Duration,
) -> Result<Left, String> {
    let settings = plane.settings();
    if settings.capture.capture {
        return Err(
            "with --capture every port of the app is its own upstream: there is nothing to switch".to_owned()
        );
    }
    let back = to.is_none();
    let to = to.unwrap_or_else(|| plane.upstream().own());
    let addrs = once_ready(plane, &to, timeout).await?;
    let chosen = (!back && to != plane.upstream().own()).then_some(&to);
    match &settings.switched {
        Some(file) => remember(file, chosen)
            .map_err(|error| format!("can't remember the choice in {}: {error}", file.display()))?,
        None => tracing::info!("the choice lasts until this process ends: there is no file for it"),
    }
    tracing::info!(upstream = %to, "new requests go to another upstream");
    let old = plane.upstream().switch(to, &addrs);
    old.iter().for_each(|server| plane.end_streams_of(server, settings.drain.stream_spread));
    while !plane.upstream().is_seen_by_all() {
        tokio::time::sleep(CHECK_INTERVAL).await;
    }
    Ok(Left(old))
}

/// Waits until `to` answers and returns the addresses that it resolves to.
async fn once_ready(
    plane: &dyn DataPlane,
    to: &UpstreamAddr,
    timeout: Duration,
) -> Result<Vec<SocketAddr>, String> {
    let (settings, kept, began) = (plane.settings(), plane.upstream().addr(), now());
    let ready = &settings.ready;
    loop {
        let found = tokio::time::timeout(ready.timeout, upstream::locate(to)).await;
        let unknown = match found.unwrap_or_else(|late| Err(late.into())) {
            Ok(addrs) if addrs.iter().any(|addr| is_own(settings, *addr)) => {
                return Err(format!(
                    "{to} is this proxy itself: requests would go in circles; {kept} was kept"
                ));
            }
            Ok(addrs) if readiness::check_app(to, &ready.check, ready.timeout).await => return Ok(addrs),
            Ok(_) => String::new(),
            Err(error) => format!(" (it can't be looked up: {error})"),
        };
        if now().duration_since(began) >= timeout {
            return Err(format!("{to} did not become ready within {timeout:?}{unknown}: {kept} was kept"));
        }
        tokio::time::sleep(CHECK_INTERVAL).await;
    }
}

/// Whether the proxy itself listens on this address.
fn is_own(settings: &Settings, addr: SocketAddr) -> bool {
    let ip = addr.ip().to_canonical();
    let matches = |ours: SocketAddr| {
        let at = ours.ip().to_canonical();
        ours.port() == addr.port() && (at == ip || at.is_unspecified() && is_of_this_machine(ip))
    };
    settings.own_addresses().any(|(_, ours)| matches(ours))
}

/// Whether this machine has the address: only then can it be bound.
fn is_of_this_machine(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

/// The servers that new requests no longer go to.
pub struct Left(Vec<std::sync::Arc<upstream::Backend>>);

impl Left {
    /// Waits until the old servers have no requests left.
    pub async fn run_dry(self) {
        while self.0.iter().any(|server| server.in_flight() > 0) {
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }
}

/// The upstream that was chosen before this start, if any. A file that cannot be trusted or read is ignored, with a
/// warning in the log.
pub fn remembered(file: &Path) -> Option<UpstreamAddr> {
    let text = match read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(file = %file.display(), "the remembered upstream is left aside: {error}");
            return None;
        }
    };
    match text.trim().parse() {
        Ok(addr) => Some(addr),
        Err(error) => {
            tracing::warn!(%error, "the remembered upstream is left aside");
            None
        }
    }
}

/// The file that remembers the upstream, beside the control socket; `None` if the control socket has no file.
pub fn file(control: &ControlAddr) -> Option<PathBuf> {
    match control {
        ControlAddr::Path(path) => Some(path.with_extension("upstream")),
        ControlAddr::Abstract(_) | ControlAddr::Tcp(_) => None,
    }
}

/// Reads the file, which must belong to this user or root and must not be a link: anyone who can write it can redirect
/// our requests.
fn read(path: &Path) -> io::Result<String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = match rustix::fs::open(path, flags, Mode::empty()) {
        Err(Errno::LOOP) => return Err(io::Error::other("it is a link")),
        opened => File::from(opened?),
    };
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    if found.uid() != 0 && found.uid() != geteuid().as_raw() {
        return Err(io::Error::other(format!("it belongs to another user (uid {})", found.uid())));
    }
    if found.mode() & 0o022 != 0 {
        return Err(io::Error::other("other users can write to it"));
    }
    let mut text = String::new();
    (&mut file).take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

fn remember(file: &Path, chosen: Option<&UpstreamAddr>) -> io::Result<()> {
    let Some(addr) = chosen else {
        return match std::fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    };
    // Write a new file and rename it, so that a crash leaves the old or the new text. Remove the new file first, as it
    // could be a link to another file.
    let new = file.with_extension("new");
    let _ = std::fs::remove_file(&new);
    let mut written = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    writeln!(written, "{addr}")?;
    written.sync_all()?;
    std::fs::rename(new, file)
}
