//! The probe and control listeners, bound before anything is served, so that a conflict is found at start-up.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use socket2::{Domain, Socket, Type};

use super::control_socket::{self, BACKLOG, ControlSocket, explain};
use crate::config::{ControlAddr, Settings};

/// Number of attempts to get another port: one fails if the kernel returns the app's own port.
const MAX_ATTEMPTS: u32 = 3;

/// The bound probe and control listeners; clients wait in the accept queue until `serve`.
#[derive(Debug)]
pub struct Bound {
    pub(super) probe: Option<TcpListener>,
    pub(super) control: ControlSocket,
    pub(super) control_tcp: Option<TcpListener>,
    pub(super) token: Option<String>,
}

/// Binds the listeners of the settings. With `elsewhere`, a listener whose address is unavailable moves to another
/// address or is left out, with a log line: `run` must start its app.
///
/// # Errors
/// Names the flag and the fix: the address or the control socket is in use or not permitted.
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
    /// Address of the probe listener, with its real port if 0 was requested.
    pub fn probe_addr(&self) -> Option<SocketAddr> {
        self.probe.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Address of control over TCP, with its real port if 0 was requested.
    pub fn control_addr(&self) -> Option<SocketAddr> {
        self.control_tcp.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Address of the control socket.
    pub fn control(&self) -> &ControlAddr {
        &self.control.at
    }
}

/// Another port of the same address; none if there is none either.
fn bind_elsewhere(addr: SocketAddr, settings: &Settings, why: &io::Error) -> Option<TcpListener> {
    let app = settings.upstream.host_and_port().map(|(_, port)| port);
    for _ in 0..MAX_ATTEMPTS {
        let Ok(listener) = bind_tcp(SocketAddr::new(addr.ip(), 0)) else { break };
        let Ok(instead) = listener.local_addr() else { break };
        if Some(instead.port()) != app {
            tracing::warn!(%instead, "{why}; listening on another port, which `lameduck status` shows");
            return Some(listener);
        }
    }
    tracing::warn!("{why}; this listener is disabled");
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
        // A kernel without IPv6: listen on all IPv4 addresses instead.
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
