//! The probe and control sockets: bound before anything is served, so that a clash is known at start-up.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::Settings;

/// Connections that may wait in the kernel's queue of each socket.
const BACKLOG: i32 = 128;

/// The probe and control sockets, listening; callers wait in the kernel's queue until `serve`.
#[derive(Debug)]
pub struct Bound {
    pub(super) probe: Option<TcpListener>,
    pub(super) control: UnixListener,
    pub(super) control_tcp: Option<TcpListener>,
    pub(super) token: Option<String>,
    pub(super) file: SocketFile,
}

/// Binds what the settings name.
///
/// # Errors
/// Names the flag and says what to do: the address or the control socket is in use, or may not be made.
pub fn bind(settings: &Settings) -> io::Result<Bound> {
    let tcp = |flag: &str, addr: Option<SocketAddr>| {
        let listener =
            addr.map(|addr| bind_tcp(addr).map_err(|why| explain(&format!("{flag} {addr}"), &why)));
        listener.transpose()
    };
    let probe = tcp("--probe-listen", settings.probe_listen)?;
    let control_tcp = tcp("--control-listen", settings.control_listen)?;
    let path = &settings.control;
    let control = bind_unix(path).map_err(|why| explain(&format!("--control {}", path.display()), &why))?;
    let file = SocketFile::of(path)?;
    Ok(Bound { probe, control, control_tcp, token: settings.token.clone(), file })
}

impl Bound {
    /// Where the kubelet may ask; a port 0 has become a real one.
    pub fn probe_addr(&self) -> Option<SocketAddr> {
        self.probe.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Where control answers by TCP; a port 0 has become a real one.
    pub fn control_addr(&self) -> Option<SocketAddr> {
        self.control_tcp.as_ref().and_then(|listener| listener.local_addr().ok())
    }
}

fn explain(what: &str, why: &io::Error) -> io::Error {
    let help = match why.kind() {
        ErrorKind::AddrInUse => ": give another one",
        ErrorKind::PermissionDenied => ": give one that this user may use",
        _ => "",
    };
    io::Error::new(why.kind(), format!("{what}: {why}{help}"))
}

fn bind_tcp(addr: SocketAddr) -> io::Result<TcpListener> {
    let bind = |addr: SocketAddr| {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
        if addr.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&addr.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    match bind(addr) {
        // A kernel without IPv6: everywhere means everywhere in IPv4 then.
        Err(why) if addr.ip().is_unspecified() && no_ipv6(&why) => {
            bind((Ipv4Addr::UNSPECIFIED, addr.port()).into())
        }
        bound => bound,
    }
}

fn no_ipv6(why: &io::Error) -> bool {
    let code = why.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
    matches!(code, Some(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL))
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let addr = SockAddr::unix(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Before the bind: the file takes the socket's own mode (unix_bind in Linux), so it is never open to others.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    match socket.bind(&addr) {
        Err(why) if why.kind() == ErrorKind::AddrInUse => {
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
