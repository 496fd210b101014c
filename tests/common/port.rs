//! Ports of 127.0.0.1 that are a test's own for as long as it wants, whether somebody listens on them or not.

use std::net::{Ipv4Addr, SocketAddr};

use socket2::{Domain, Socket, Type};

/// A port that is bound, but not listened on. So a connection is refused, and the kernel gives the port to nobody who asks
/// for any. Who asks for this one and sets SO_REUSEADDR, as lameduck, Node, Go and Rust do, may listen on it (socket(7)).
pub struct Port {
    /// Where it is.
    pub addr: SocketAddr,
    _bound: Socket,
}

impl Port {
    /// Takes one that nobody has.
    pub fn reserve() -> Self {
        let bound = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        bound.set_reuse_address(true).expect("an option");
        bound.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
        let addr = bound.local_addr().expect("its address").as_socket().expect("of IPv4");
        Self { addr, _bound: bound }
    }

    /// The argument with a port of this kind instead of each `127.0.0.1:0` in it.
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

    /// Its number.
    pub fn number(&self) -> u16 {
        self.addr.port()
    }
}
