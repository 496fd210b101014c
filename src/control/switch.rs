//! `lameduck switch`: new requests go to another upstream, and the one that was left runs dry.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::config::{ControlAddr, Settings, UpstreamAddr};
use crate::proxy::shared::Shared;
use crate::readiness;
use crate::upstream;

/// The most bytes that a remembered upstream can have: a path or a host's name, and more.
const LONGEST: u64 = 4096;
/// Between two questions to the new upstream, and between two looks at the old one.
const LOOK: Duration = Duration::from_millis(50);

/// Sends new requests to `to`, or back to `--upstream`, once it answers, for which it has `timeout`. The choice is
/// remembered beside the control socket. Returns when every new request goes there, and the old servers with what
/// they still have to do, for [`Left::run_dry`].
///
/// # Errors
/// Why nothing was changed, in words.
pub async fn switch(shared: &Shared, to: Option<UpstreamAddr>, timeout: Duration) -> Result<Left, String> {
    let settings = &shared.settings;
    let back = to.is_none();
    let to = to.unwrap_or_else(|| shared.upstream.own());
    let addrs = once_ready(shared, &to, timeout).await?;
    let chosen = (!back && to != shared.upstream.own()).then_some(&to);
    match &settings.switched {
        Some(file) => remember(file, chosen)
            .map_err(|error| format!("can't remember the choice in {}: {error}", file.display()))?,
        None => tracing::info!("the choice lasts until this process ends: there is no file for it"),
    }
    tracing::info!(upstream = %to, "new requests go to another upstream");
    let old = shared.upstream.switch(to, &addrs);
    old.iter().for_each(|server| shared.end_streams_of(server, settings.drain.stream_spread));
    while !shared.upstream.is_seen_by_all() {
        tokio::time::sleep(LOOK).await;
    }
    Ok(Left(old))
}

/// What `to` resolves to, once it answers.
async fn once_ready(
    shared: &Shared,
    to: &UpstreamAddr,
    timeout: Duration,
) -> Result<Vec<SocketAddr>, String> {
    let (settings, kept, began) = (&shared.settings, shared.upstream.addr(), Instant::now());
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
        if began.elapsed() >= timeout {
            return Err(format!("{to} did not become ready within {timeout:?}{unknown}: {kept} was kept"));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether this is an address that the proxy itself listens on.
fn is_own(settings: &Settings, addr: SocketAddr) -> bool {
    let ip = addr.ip().to_canonical();
    let met = |ours: SocketAddr| {
        let at = ours.ip().to_canonical();
        ours.port() == addr.port() && (at == ip || at.is_unspecified() && is_of_this_machine(ip))
    };
    settings.own_addresses().any(|(_, ours)| met(ours))
}

/// Only its own addresses can be bound.
fn is_of_this_machine(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

/// The servers that were left.
pub struct Left(Vec<std::sync::Arc<upstream::Backend>>);

impl Left {
    /// Waits until the old servers have nothing more to do.
    pub async fn run_dry(self) {
        while self.0.iter().any(|server| server.in_flight() > 0) {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// The upstream that was chosen before this start, if one was.
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

/// Beside the control socket; none for one without a file.
pub fn file(control: &ControlAddr) -> Option<PathBuf> {
    match control {
        ControlAddr::Path(path) => Some(path.with_extension("upstream")),
        ControlAddr::Abstract(_) | ControlAddr::Tcp(_) => None,
    }
}

/// A file of this user's or of root's, and no link to one: whoever else could write it would steer our requests.
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
    (&mut file).take(LONGEST).read_to_string(&mut text)?;
    Ok(text)
}

fn remember(file: &Path, chosen: Option<&UpstreamAddr>) -> io::Result<()> {
    let Some(addr) = chosen else {
        return match std::fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    };
    // Whole or not at all, whenever the machine stops. A link that somebody put there would lead to another file.
    let new = file.with_extension("new");
    let _ = std::fs::remove_file(&new);
    let mut written = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    writeln!(written, "{addr}")?;
    written.sync_all()?;
    std::fs::rename(new, file)
}
