//! A WebSocket client (RFC 6455) that sends and returns single frames.

use std::net::SocketAddr;

use super::http::{Client, Fill, Head};

/// The opcodes that the tests use (RFC 6455, 5.2).
pub const TEXT: u8 = 1;
/// A Close frame.
pub const CLOSE: u8 = 8;

/// A received frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Whether it is the last frame of its message.
    pub fin: bool,
    /// Opcode.
    pub opcode: u8,
    /// Whether it is masked, which only a client's frames may be.
    pub masked: bool,
    /// Payload, unmasked.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A Close frame's status code (RFC 6455, 7.4).
    pub fn close_code(&self) -> Option<u16> {
        let code = self.payload.first_chunk().filter(|_| self.opcode == CLOSE)?;
        Some(u16::from_be_bytes(*code))
    }

    /// The payload as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }
}

/// A connection that is, or becomes, a WebSocket.
pub struct WebSocket {
    /// The underlying connection.
    pub client: Client,
}

impl WebSocket {
    /// Connects and sends the handshake, without reading the response.
    pub fn begin(addr: SocketAddr, target: &str) -> Self {
        Self::begin_over(Client::connect(addr), target)
    }

    /// The same over an existing connection.
    pub fn begin_over(mut client: Client, target: &str) -> Self {
        // The key and the expected response are the example in RFC 6455 (1.3).
        client.request(
            "GET",
            target,
            &[
                "Connection: keep-alive, Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            ],
        );
        Self { client }
    }

    /// Reads the response to the handshake and checks it.
    pub fn accepted(&mut self) -> Head {
        let head = self.client.head();
        assert_eq!(head.status, 101, "{head:?}");
        assert!(head.has("upgrade", "websocket") && head.has("connection", "upgrade"), "{head:?}");
        assert!(!head.has("connection", "close"), "{head:?}");
        assert_eq!(head.header("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        head
    }

    /// Connects and completes the handshake.
    pub fn open(addr: SocketAddr, target: &str) -> Self {
        let mut socket = Self::begin(addr, target);
        socket.accepted();
        socket
    }

    /// Sends one masked frame with a payload of at most 125 bytes.
    pub fn send(&mut self, opcode: u8, payload: &[u8]) {
        let length =
            u8::try_from(payload.len()).ok().filter(|length| *length < 126).expect("a short payload");
        let mask = [0x5a, 0xc3, 0x0f, 0x99];
        let mut frame = vec![0x80 | opcode, 0x80 | length];
        frame.extend(mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        self.client.send(frame);
    }

    /// Reads one frame.
    pub fn receive(&mut self) -> Frame {
        let head = self.client.take(2);
        let length = match head[1] & 0x7f {
            126 => self.number(2),
            127 => self.number(8),
            short => short.into(),
        };
        let masked = head[1] & 0x80 != 0;
        let mask = if masked { self.client.take(4) } else { vec![0; 4] };
        let payload = self.client.take(length);
        let payload = payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
        Frame { fin: head[0] & 0x80 != 0, opcode: head[0] & 0x0f, masked, payload }
    }

    fn number(&mut self, bytes: usize) -> usize {
        self.client.take(bytes).iter().fold(0, |number, byte| number << 8 | usize::from(*byte))
    }

    /// Reads a Close frame with this code, replies to it, and checks that the connection then ends cleanly.
    pub fn expect_close(&mut self, code: u16) {
        let frame = self.receive();
        assert_eq!((frame.close_code(), frame.masked), (Some(code), false), "{frame:?}");
        self.send(CLOSE, &code.to_be_bytes());
        let (rest, end) = self.client.read_to_end();
        assert_eq!((rest, end), (Vec::new(), Fill::Fin));
    }
}
