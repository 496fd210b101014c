//! The probe and control listeners: bound before anything is served, so that a clash is known at start-up.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use socket2::{Domain, Socket, Type};

use super::control_socket::{self, BACKLOG, ControlSocket, explain};
use crate::config::{ControlAddr, Settings};

/// How often another port is asked for: one is in use already if the kernel gives the app's own.
const TRIES: u32 = 3;

/// The probe and control listeners; callers wait in the kernel's queue until `serve`.
#[derive(Debug)]
pub struct Bound {
    pub(super) probe: Option<TcpListener>,
    pub(super) control: ControlSocket,
    pub(super) control_tcp: Option<TcpListener>,
    pub(super) token: Option<String>,
}

/// Binds what the settings name. With `elsewhere` a listener that can't be where they say is somewhere else, or left out,
/// and the log says so: the app of `run` matters more.
///
/// # Errors
/// Names the flag and says what to do: the address or the control socket is in use, or may not be made.
pub fn bind(settings: &Settings, elsewhere: bool) -> io::Result<Bound> {
    let tcp = |flag: &str, addr: Option<SocketAddr>| {
        let Some(addr) = addr else { return Ok(None) };
        match bind_tcp(addr).map_err(|why| explain(&format!("{flag} {addr}"), &why)) {
            Err(why) if elsewhere => Ok(bind_elsewhere(addr, settings, &why)),
            bound => bound.map(Some),
        }
    };
    let probe = tcp("--probe-listen", settings.probe_listen)?;
    let control_tcp = tcp("--control-listen", settings.control_listen)?;
    let control = control_socket::bind(&settings.control, elsewhere)?;
    Ok(Bound { probe, control, control_tcp, token: settings.token.clone() })
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

    /// Where the control socket is.
    pub fn control(&self) -> &ControlAddr {
        &self.control.at
    }
}

/// Another port of the same address; none if it has none, either.
fn bind_elsewhere(addr: SocketAddr, settings: &Settings, why: &io::Error) -> Option<TcpListener> {
    let app = settings.upstream.host_and_port().map(|(_, port)| port);
    for _ in 0..TRIES {
        let Ok(listener) = bind_tcp(SocketAddr::new(addr.ip(), 0)) else { break };
        let Ok(instead) = listener.local_addr() else { break };
        if Some(instead.port()) != app {
            tracing::warn!(%instead, "{why}; listening on another port, which `lameduck status` shows");
            return Some(listener);
        }
    }
    tracing::warn!("{why}; this listener is left out");
    None
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
