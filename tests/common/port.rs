//! Reserved ports of 127.0.0.1: they belong to one test, whether or not a process listens on them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::{Domain, Socket, Type};

/// A port that is bound but not listening, so connections are refused, and the kernel assigns it to no other socket. A
/// program that binds this port with SO_REUSEADDR, as lameduck, Node, Go and Rust do, may listen on it (socket(7)).
pub struct Port {
    /// Address.
    pub addr: SocketAddr,
    _bound: Socket,
}

impl Port {
    /// Reserves a free port.
    pub fn reserve() -> Self {
        Self::reserve_at(Ipv4Addr::LOCALHOST.into())
    }

    /// Reserves a port that is free on all addresses, for a program that listens on more than 127.0.0.1.
    pub fn reserve_everywhere() -> Self {
        Self::reserve_at(Ipv6Addr::UNSPECIFIED.into())
    }

    fn reserve_at(ip: IpAddr) -> Self {
        let wanted = SocketAddr::new(ip, 0);
        let bound = Socket::new(Domain::for_address(wanted), Type::STREAM, None).expect("a socket");
        bound.set_reuse_address(true).expect("an option");
        bound.bind(&wanted.into()).expect("a port");
        let port = bound.local_addr().expect("its address").as_socket().expect("of IP").port();
        Self { addr: (Ipv4Addr::LOCALHOST, port).into(), _bound: bound }
    }

    /// The argument with every `127.0.0.1:0` replaced by a newly reserved port.
    pub fn reserve_in(arg: &str, reserved: &mut Vec<Self>) -> String {
        let mut parts = arg.split("127.0.0.1:0");
        let mut given = parts.next().unwrap_or_default().to_owned();
        for rest in parts {
            let port = Self::reserve();
            given += &format!("{}{rest}", port.addr);
            reserved.push(port);
        }
        given
    }

    /// Port number.
    pub fn number(&self) -> u16 {
        self.addr.port()
    }
}
