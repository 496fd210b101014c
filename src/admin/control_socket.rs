//! The control socket: in a folder that belongs to this user alone, or a name that needs no folder.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::process::{getegid, geteuid};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::{ControlAddr, ControlPlaces, SOCKETS};

/// Connections that may wait in the kernel's queue of each listener.
pub(super) const BACKLOG: i32 = 128;
/// A control socket that listens; its file is removed in the end.
#[derive(Debug)]
pub(super) struct ControlSocket {
    pub(super) listener: UnixListener,
    pub(super) at: ControlAddr,
    /// None for an abstract one, to which every user of the machine can connect.
    pub(super) file: Option<SocketFile>,
}

/// Binds the socket that was given, or one at the first default place that will do. With `elsewhere` one that was given
/// is only the first to be tried, and a place where another proxy runs has room for more.
///
/// # Errors
/// Says why each place won't do.
pub(super) fn bind(places: &ControlPlaces, elsewhere: bool) -> io::Result<ControlSocket> {
    let mut refused: Vec<io::Error> = Vec::new();
    let defaults = places.defaults.iter().filter(|_| places.given.is_none() || elsewhere);
    for (place, own) in
        places.given.iter().map(|given| (given, false)).chain(defaults.map(|place| (place, true)))
    {
        // Any user could have taken an abstract name.
        let several = elsewhere || matches!(place, ControlAddr::Abstract(_));
        for number in 1..=if several { SOCKETS } else { 1 } {
            let at = place.numbered(number);
            match bind_at(&at, own) {
                Ok(socket) => {
                    let expected = match &places.given {
                        Some(given) => *given == at,
                        None => number == 1 && socket.file.is_some(),
                    };
                    if !expected {
                        let why: Vec<_> = refused.iter().map(ToString::to_string).collect();
                        tracing::warn!(control = %at, "the control socket is elsewhere: {}", why.join("; "));
                    }
                    return Ok(socket);
                }
                Err(why) => {
                    let in_use = why.kind() == ErrorKind::AddrInUse;
                    refused.push(explain(&format!("--control {at}"), &why));
                    if in_use && !several {
                        return Err(last(refused));
                    }
                    if !in_use {
                        break;
                    }
                }
            }
        }
    }
    Err(last(refused))
}

fn last(mut refused: Vec<io::Error>) -> io::Error {
    refused
        .pop()
        .unwrap_or_else(|| io::Error::new(ErrorKind::NotFound, "there is no place for a control socket"))
}

fn bind_at(at: &ControlAddr, own: bool) -> io::Result<ControlSocket> {
    let path = at.unix_path().ok_or(ErrorKind::InvalidInput)?;
    let file = match at {
        ControlAddr::Path(path) => path.parent().filter(|dir| !dir.as_os_str().is_empty()),
        ControlAddr::Abstract(_) | ControlAddr::Tcp(_) => None,
    };
    match file {
        Some(dir) if own => own_directory(dir)?,
        Some(dir) => DirBuilder::new().recursive(true).mode(0o700).create(dir)?,
        None => {}
    }
    let listener = listen(&path)?;
    let file = match at {
        ControlAddr::Path(path) => Some(SocketFile::of(path)?),
        ControlAddr::Abstract(_) | ControlAddr::Tcp(_) => None,
    };
    Ok(ControlSocket { listener, at: at.clone(), file })
}

/// Makes the directory, or makes sure that nobody else can put anything into it: another user could have made it first,
/// as a link even.
fn own_directory(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(why) if why.kind() != ErrorKind::AlreadyExists => return Err(why),
        _ => {}
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(dir, flags, Mode::empty());
    let found =
        File::from(opened.map_err(|_| refusal(dir, "is no folder that this user may read"))?).metadata()?;
    let above = dir.parent().map_or_else(|| Ok(found.clone()), fs::metadata)?;
    // Who may write to the folder above decides to whom this one belongs: /run/lameduck may be mounted for us.
    if found.uid() != geteuid().as_raw() && others_may_write(&above) {
        return Err(refusal(dir, &format!("belongs to another user (uid {})", found.uid())));
    }
    if others_may_write(&found) {
        return Err(refusal(dir, "can be written to by other users"));
    }
    Ok(())
}

/// A user's own group has no other members where folders are made group-writable by default (umask 002).
fn others_may_write(dir: &Metadata) -> bool {
    let own_group = dir.gid() == getegid().as_raw();
    dir.mode() & 0o002 != 0 || (dir.mode() & 0o020 != 0 && !own_group)
}

fn refusal(dir: &Path, why: &str) -> io::Error {
    io::Error::other(format!("{} {why}", dir.display()))
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let addr = SockAddr::unix(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Before the bind: the file takes the socket's own mode (unix_bind in Linux), so it is never open to others.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    match socket.bind(&addr) {
        Err(why) if why.kind() == ErrorKind::AddrInUse && addr.as_pathname().is_some() => {
            remove_stale(path, &addr)?;
            socket.bind(&addr)?;
        }
        bound => bound?,
    }
    socket.set_nonblocking(true)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Removes a socket that a process left behind; one on which somebody answers is an error.
fn remove_stale(path: &Path, addr: &SockAddr) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(ErrorKind::AlreadyExists, "there is a file, and it is no socket"));
    }
    let caller = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Else a full queue would block; then somebody listens, and the error is another one than "refused".
    caller.set_nonblocking(true)?;
    match caller.connect(addr) {
        Err(why) if why.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(why) if why.kind() == ErrorKind::PermissionDenied => Err(why),
        Ok(()) | Err(_) => {
            Err(io::Error::new(ErrorKind::AddrInUse, "another lameduck runs with this control socket"))
        }
    }
}

/// The control socket's file, removed in the end unless somebody else's has taken its place.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// The same error with what was tried, and what would help.
pub(super) fn explain(what: &str, why: &io::Error) -> io::Error {
    let help = match why.kind() {
        ErrorKind::AddrInUse => ": give another one",
        ErrorKind::PermissionDenied => ": give one that this user may use",
        _ => "",
    };
    io::Error::new(why.kind(), format!("{what}: {why}{help}"))
}
