//! Which proxy a command talks to, and the connection to it.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::geteuid;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::terminal::{Failure, show_line};
use crate::config::{ControlAddr, ControlPlaces, SOCKETS};

/// A connection to a proxy's control.
pub(super) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// The control socket that was given; else the first of the default ones on which a proxy of this user answers. With
/// `tell` the others that run are named on stderr.
pub(super) fn locate(places: &ControlPlaces, tell: bool) -> ControlAddr {
    if let Some(given) = &places.given {
        return given.clone();
    }
    let numbered = |place: &ControlAddr| (1..=SOCKETS).map(|n| place.numbered(n)).collect::<Vec<_>>();
    let all: Vec<_> = places.defaults.iter().flat_map(numbered).collect();
    let (trusted, strangers): (Vec<_>, Vec<_>) = all
        .iter()
        .filter_map(|at| answers(at).map(|trusted| (at, trusted)))
        .partition(|(_, trusted)| *trusted);
    let found: Vec<_> = trusted.into_iter().chain(strangers).collect();
    for (other, _) in found.iter().skip(1).filter(|(_, trusted)| tell && *trusted) {
        show_line(&format!(
            "this is about the lameduck on {}; another one runs: --control {other}",
            found[0].0
        ));
    }
    // Where nobody answers, the best place is named in the error.
    let first = found.first().map(|(at, _)| *at).or(all.first());
    first.cloned().unwrap_or_else(|| ControlAddr::Path("/run/lameduck/control.sock".into()))
}

/// Whether somebody listens there, and whether we may believe that one.
fn answers(at: &ControlAddr) -> Option<bool> {
    let connect = || {
        let caller = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        // A full queue says so instead of blocking.
        caller.set_nonblocking(true)?;
        caller.connect(&SockAddr::unix(at.unix_path().ok_or(ErrorKind::InvalidInput)?)?)?;
        Ok::<_, io::Error>(rustix::net::sockopt::socket_peercred(&caller)?.uid.as_raw())
    };
    match connect() {
        Ok(uid) => Some(is_trusted(at, uid)),
        Err(why) => (why.kind() == ErrorKind::WouldBlock).then_some(true),
    }
}

/// A connection on which nothing was sent yet, to a proxy of this user or of root, or of the user whose folder its
/// socket is in.
///
/// # Errors
/// In words for the user.
pub(super) async fn connect(at: &ControlAddr) -> Result<Box<dyn Io>, Failure> {
    let failed = |why: io::Error| no_connection(at, &why);
    let path = match (at, at.unix_path()) {
        (ControlAddr::Tcp(addr), _) => return Ok(Box::new(TcpStream::connect(addr).await.map_err(failed)?)),
        (_, path) => path.unwrap_or_default(),
    };
    let stream = UnixStream::connect(path).await.map_err(failed)?;
    let uid = stream.peer_cred().map_err(failed)?.uid();
    match is_trusted(at, uid) {
        true => Ok(Box::new(stream)),
        false => Err(format!("{at}: another user (uid {uid}) listens there, and may be no lameduck at all")),
    }
}

/// Anybody could listen in a folder like /tmp, and tell us what isn't so.
fn is_trusted(at: &ControlAddr, uid: u32) -> bool {
    let owns = |dir: &Path| fs::symlink_metadata(dir).is_ok_and(|dir| dir.is_dir() && dir.uid() == uid);
    let others_may_write = |dir: &Path| fs::metadata(dir).map_or(true, |dir| dir.mode() & 0o022 != 0);
    let in_own_folder = || match at {
        // To whom a folder belongs says nothing where anybody may make one.
        ControlAddr::Path(path) => {
            let dir = path.parent();
            dir.zip(dir.and_then(Path::parent))
                .is_some_and(|(dir, above)| owns(dir) && !others_may_write(above))
        }
        ControlAddr::Abstract(_) | ControlAddr::Tcp(_) => false,
    };
    uid == geteuid().as_raw() || uid == 0 || in_own_folder()
}

fn no_connection(at: &ControlAddr, why: &io::Error) -> Failure {
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
        // A socket that was left behind.
        drop(std::os::unix::net::UnixListener::bind(&missing).unwrap());
        assert_eq!(connect(&at).await.err().unwrap(), told);
        fs::remove_file(&missing).unwrap();
    }
}
