//! Finds the proxy that a command talks to, and connects to it.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::geteuid;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::terminal::{CommandError, show_line};
use crate::config::{ControlAddr, ControlPlaces, MAX_SOCKETS};

/// A connection to a proxy's control listener.
pub(super) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// The given control socket, or else the first default one on which a proxy of this user answers. With `tell`, other
/// running proxies are named on stderr.
pub(super) fn locate(places: &ControlPlaces, tell: bool) -> ControlAddr {
    if let Some(given) = &places.given {
        return given.clone();
    }
    let numbered = |place: &ControlAddr| (1..=MAX_SOCKETS).map(|n| place.numbered(n)).collect::<Vec<_>>();
    let all: Vec<_> = places.defaults.iter().flat_map(numbered).collect();
    let (trusted, strangers): (Vec<_>, Vec<_>) = all
        .iter()
        .filter_map(|at| answers(at).map(|trusted| (at, trusted)))
        .partition(|(_, trusted)| *trusted);
    let found: Vec<_> = trusted.into_iter().chain(strangers).collect();
    for (other, _) in found.iter().skip(1).filter(|(_, trusted)| tell && *trusted) {
        show_line(&format!(
            "using the lameduck on {}; another one is running: --control {other}",
            found[0].0
        ));
    }
    // If none answers, the error names the preferred address.
    let first = found.first().map(|(at, _)| *at).or(all.first());
    first.cloned().unwrap_or_else(|| ControlAddr::Path("/run/lameduck/control.sock".into()))
}

/// Whether a process listens there; the value says whether it is trusted.
fn answers(at: &ControlAddr) -> Option<bool> {
    let connect = || {
        let caller = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        // With a full accept queue, connect fails instead of blocking.
        caller.set_nonblocking(true)?;
        caller.connect(&SockAddr::unix(at.unix_path().ok_or(ErrorKind::InvalidInput)?)?)?;
        Ok::<_, io::Error>(rustix::net::sockopt::socket_peercred(&caller)?.uid.as_raw())
    };
    match connect() {
        Ok(uid) => Some(is_trusted(at, uid)),
        Err(why) => (why.kind() == ErrorKind::WouldBlock).then_some(true),
    }
}

/// Connects, without sending anything yet, to a proxy of this user or of root, or of the owner of the socket's folder.
///
/// # Errors
/// A text for the user.
pub(super) async fn connect(at: &ControlAddr) -> Result<Box<dyn Io>, CommandError> {
    let failed = |why: io::Error| no_connection(at, &why);
    let path = match (at, at.unix_path()) {
        (ControlAddr::Tcp(addr), _) => return Ok(Box::new(TcpStream::connect(addr).await.map_err(failed)?)),
        (_, path) => path.unwrap_or_default(),
    };
    let stream = UnixStream::connect(path).await.map_err(failed)?;
    let uid = stream.peer_cred().map_err(failed)?.uid();
    match is_trusted(at, uid) {
        true => Ok(Box::new(stream)),
        false => Err(format!("{at}: another user (uid {uid}) listens there; it may not be lameduck")),
    }
}

/// Any user could listen in a folder like /tmp and send false data.
fn is_trusted(at: &ControlAddr, uid: u32) -> bool {
    let owns = |dir: &Path| fs::symlink_metadata(dir).is_ok_and(|dir| dir.is_dir() && dir.uid() == uid);
    let others_may_write = |dir: &Path| fs::metadata(dir).map_or(true, |dir| dir.mode() & 0o022 != 0);
    let in_own_folder = || match at {
        // The folder's owner proves nothing if any user may create folders next to it.
        ControlAddr::Path(path) => {
            let dir = path.parent();
            dir.zip(dir.and_then(Path::parent))
                .is_some_and(|(dir, above)| owns(dir) && !others_may_write(above))
        }
        ControlAddr::Abstract(_) | ControlAddr::Tcp(_) => false,
    };
    uid == geteuid().as_raw() || uid == 0 || in_own_folder()
}

fn no_connection(at: &ControlAddr, why: &io::Error) -> CommandError {
    match why.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            format!("no lameduck answers on {at}: is it running? give its --control path")
        }
        ErrorKind::PermissionDenied => {
            format!("{at}: {why}: only the user that lameduck runs as may use it")
        }
        _ => format!("{at}: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_without_a_lameduck_is_told_with_what_to_do() {
        let missing = std::env::temp_dir().join(format!("lameduck-none-{}.sock", std::process::id()));
        let at = ControlAddr::Path(missing.clone());
        let told = connect(&at).await.err().unwrap();
        assert_eq!(told, format!("no lameduck answers on {at}: is it running? give its --control path"));
        // A socket file without a listener.
        drop(std::os::unix::net::UnixListener::bind(&missing).unwrap());
        assert_eq!(connect(&at).await.err().unwrap(), told);
        fs::remove_file(&missing).unwrap();
    }
}
