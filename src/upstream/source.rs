//! Connects from a chosen address of this host.

use std::io;
use std::mem::size_of_val;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

use tokio::net::{TcpSocket, TcpStream};

/// Where connections begin if this host has no address that is better.
pub const LOOPBACK_SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 77, 0, 3));

/// Connects over TCP from `source` to an address of the same family; from [`LOOPBACK_SOURCE`] if this host has lost its
/// address, but not from 127.0.0.1, which an app may trust.
///
/// # Errors
/// Those of bind(2) and connect(2).
pub async fn connect(source: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    choose_port_late(&socket)?;
    let bound = socket.bind(SocketAddr::new(source, 0));
    if bound.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable) && to.is_ipv4() {
        socket.bind(SocketAddr::new(LOOPBACK_SOURCE, 0))?;
    } else {
        bound?;
    }
    socket.connect(to).await
}

/// Lets connect(2) choose the port instead of bind(2) (ip(7), `IP_BIND_ADDRESS_NO_PORT`). bind(2) doesn't know the
/// destination, so it takes no port that any closed connection of the last minute has used: 28,000 a minute at most.
fn choose_port_late(socket: &impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    #[expect(unsafe_code, reason = "no crate of ours offers this option")]
    // SAFETY: the option is one C int, which `on` is until the call has returned.
    let done = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn the_server_sees_the_source() {
        let source = Ipv4Addr::new(127, 9, 8, 7);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let client = connect(source.into(), listener.local_addr().unwrap()).await.unwrap();
        assert_eq!(listener.accept().unwrap().1, client.local_addr().unwrap());
        assert_eq!(client.local_addr().unwrap().ip(), source);
    }

    #[tokio::test]
    async fn an_address_that_is_gone_costs_no_connection() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let gone = Ipv4Addr::new(203, 0, 113, 7);
        let client = connect(gone.into(), listener.local_addr().unwrap()).await.unwrap();
        assert_eq!(client.local_addr().unwrap().ip(), LOOPBACK_SOURCE);
    }
}
