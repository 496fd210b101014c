//! The control socket: a file in a folder that belongs to this user alone, or an abstract name that needs no folder.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::process::{getegid, geteuid};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::{ControlAddr, ControlPlaces, MAX_SOCKETS};

/// Length of each listener's accept queue.
pub(super) const BACKLOG: i32 = 128;
/// A listening control socket; its file is removed on drop.
#[derive(Debug)]
pub(super) struct ControlSocket {
    pub(super) listener: UnixListener,
    pub(super) at: ControlAddr,
    /// None for an abstract socket, to which every user of the machine can connect.
    pub(super) file: Option<SocketFile>,
}

/// Binds the given socket, or the first usable default one. With `elsewhere`, the default ones are tried after the
/// given one, and next to a running proxy a numbered name is used.
///
/// # Errors
/// Says why each address is unusable.
pub(super) fn bind(places: &ControlPlaces, elsewhere: bool) -> io::Result<ControlSocket> {
    let mut refused: Vec<io::Error> = Vec::new();
    let defaults = places.defaults.iter().filter(|_| places.given.is_none() || elsewhere);
    for (place, own) in
        places.given.iter().map(|given| (given, false)).chain(defaults.map(|place| (place, true)))
    {
        // Any user could have taken an abstract name.
        let several = elsewhere || matches!(place, ControlAddr::Abstract(_));
        for number in 1..=if several { MAX_SOCKETS } else { 1 } {
            let at = place.numbered(number);
            match bind_at(&at, own) {
                Ok(socket) => {
                    let expected = match &places.given {
                        Some(given) => *given == at,
                        None => number == 1 && socket.file.is_some(),
                    };
                    if !expected {
                        let why: Vec<_> = refused.iter().map(ToString::to_string).collect();
                        tracing::warn!(control = %at, "using another control socket: {}", why.join("; "));
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
        .unwrap_or_else(|| io::Error::new(ErrorKind::NotFound, "no usable path for a control socket"))
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

/// Creates the directory, or makes sure that no other user can write to it: another user could have created it first,
/// even as a symlink.
fn own_directory(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(why) if why.kind() != ErrorKind::AlreadyExists => return Err(why),
        _ => {}
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(dir, flags, Mode::empty());
    let found = File::from(opened.map_err(|_| refusal(dir, "is not a folder that this user may read"))?)
        .metadata()?;
    let above = dir.parent().map_or_else(|| Ok(found.clone()), fs::metadata)?;
    // Users who may write to the parent folder decide who owns this one: /run/lameduck may be a mount for us.
    if found.uid() != geteuid().as_raw() && others_may_write(&above) {
        return Err(refusal(dir, &format!("belongs to another user (uid {})", found.uid())));
    }
    if others_may_write(&found) {
        return Err(refusal(dir, "can be written to by other users"));
    }
    Ok(())
}

/// A user's primary group has no other members where folders are group-writable by default (umask 002).
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
    // Before the bind: the file gets the socket's mode (unix_bind in Linux), so it is never accessible to others.
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

/// Removes the socket file of a dead process; a socket that accepts connections is an error.
fn remove_stale(path: &Path, addr: &SockAddr) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(ErrorKind::AlreadyExists, "the file exists and is not a socket"));
    }
    let caller = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // With a full accept queue connect would block; it fails instead, with another error than "refused".
    caller.set_nonblocking(true)?;
    match caller.connect(addr) {
        Err(why) if why.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(why) if why.kind() == ErrorKind::PermissionDenied => Err(why),
        Ok(()) | Err(_) => {
            Err(io::Error::new(ErrorKind::AddrInUse, "another lameduck uses this control socket"))
        }
    }
}

/// File of the control socket, removed on drop unless another process's file has replaced it.
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

/// Adds to the error what was tried and what would help.
pub(super) fn explain(what: &str, why: &io::Error) -> io::Error {
    let help = match why.kind() {
        ErrorKind::AddrInUse => ": use another one",
        ErrorKind::PermissionDenied => ": use one that this user has access to",
        _ => "",
    };
    io::Error::new(why.kind(), format!("{what}: {why}{help}"))
}
