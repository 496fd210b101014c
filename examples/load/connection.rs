//! One HTTP/1.1 connection, read byte by byte, so that every way of ending is distinguished.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::report::Loss;

/// Time without a single byte after which a request is lost.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// An open connection.
pub struct Connection {
    stream: TcpStream,
    read: Vec<u8>,
    /// Number of requests sent on it.
    pub used: u32,
    /// Both addresses, to find the connection in a log.
    pub name: String,
}

/// Head of a response.
pub struct Head {
    pub status: u16,
    /// Whether the connection ends with this response.
    pub close: bool,
    length: Length,
}

#[derive(Clone, Copy)]
enum Length {
    Bytes(usize),
    Chunked,
    ToEnd,
}

/// Part of a body.
pub enum Part {
    Data(Vec<u8>),
    End,
}

impl Connection {
    pub async fn open(addr: SocketAddr, from: Option<IpAddr>) -> Result<Self, Loss> {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let socket = socket.map_err(Loss::Refused)?;
        if let Some(from) = from {
            socket.bind(SocketAddr::new(from, 0)).map_err(Loss::Refused)?;
        }
        let stream = match timeout(IDLE_TIMEOUT, socket.connect(addr)).await {
            Ok(connected) => connected.map_err(Loss::Refused)?,
            Err(_) => return Err(Loss::TimedOut),
        };
        let _ = stream.set_nodelay(true);
        let local = stream.local_addr().map_or(0, |addr| addr.port());
        Ok(Self { stream, read: Vec::new(), used: 0, name: format!(":{local} to {addr}") })
    }

    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), Loss> {
        match timeout(IDLE_TIMEOUT, self.stream.write_all(bytes)).await {
            Ok(sent) => sent.map_err(|error| loss(&error)),
            Err(_) => Err(Loss::TimedOut),
        }
    }

    /// Waits for this time; false if the peer ends the connection or sends unexpected bytes.
    pub async fn rest(&mut self, time: Duration) -> io::Result<bool> {
        match timeout(time, self.stream.read_buf(&mut self.read)).await {
            Err(_) => Ok(self.read.is_empty()),
            Ok(Ok(_)) => Ok(false),
            Ok(Err(error)) => Err(error),
        }
    }

    /// Reads the head of a response, skipping interim ones (except 101).
    pub async fn head(&mut self) -> Result<Head, Loss> {
        loop {
            let text = String::from_utf8_lossy(&self.until(b"\r\n\r\n").await?).into_owned();
            let head = parse_head(&text).ok_or_else(|| Loss::Wrong(format!("head {text:?}")))?;
            if head.status == 101 || head.status >= 200 {
                return Ok(head);
            }
        }
    }

    /// Reads the whole body.
    pub async fn body(&mut self, head: &Head) -> Result<Vec<u8>, Loss> {
        let mut body = Vec::new();
        match head.length {
            Length::Bytes(length) => body = self.take(length).await?,
            Length::Chunked => {
                while let Part::Data(data) = self.part(head).await? {
                    body.extend(data);
                }
            }
            Length::ToEnd => loop {
                match self.fill().await {
                    Ok(()) => body.append(&mut self.read),
                    Err(Loss::Cut) => break,
                    Err(loss) => return Err(loss),
                }
            },
        }
        Ok(body)
    }

    /// Reads the next chunk.
    pub async fn part(&mut self, head: &Head) -> Result<Part, Loss> {
        if !matches!(head.length, Length::Chunked) {
            return Err(Loss::Wrong("a stream that isn't chunked".to_owned()));
        }
        let line = self.until(b"\r\n").await?;
        let size = String::from_utf8_lossy(&line).trim().to_owned();
        let size =
            usize::from_str_radix(&size, 16).map_err(|_| Loss::Wrong(format!("chunk size {size:?}")))?;
        let data = self.take(size).await?;
        self.until(b"\r\n").await?;
        Ok(if size == 0 { Part::End } else { Part::Data(data) })
    }

    /// Reads exactly this number of bytes.
    pub async fn take(&mut self, length: usize) -> Result<Vec<u8>, Loss> {
        while self.read.len() < length {
            self.fill().await?;
        }
        Ok(self.read.drain(..length).collect())
    }

    async fn until(&mut self, mark: &[u8]) -> Result<Vec<u8>, Loss> {
        loop {
            if let Some(at) = self.read.windows(mark.len()).position(|window| window == mark) {
                return Ok(self.read.drain(..at + mark.len()).collect());
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> Result<(), Loss> {
        match timeout(IDLE_TIMEOUT, self.stream.read_buf(&mut self.read)).await {
            Err(_) => Err(Loss::TimedOut),
            Ok(Ok(0)) => Err(Loss::Cut),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(loss(&error)),
        }
    }
}

fn loss(error: &io::Error) -> Loss {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted => Loss::Reset,
        _ => Loss::Wrong(error.to_string()),
    }
}

fn parse_head(text: &str) -> Option<Head> {
    let mut lines = text.split("\r\n");
    let status: u16 = lines.next()?.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    let bodiless = matches!(status, 100..=199 | 204 | 304);
    let mut head =
        Head { status, close: false, length: if bodiless { Length::Bytes(0) } else { Length::ToEnd } };
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "connection" => head.close |= value.eq_ignore_ascii_case("close"),
            "content-length" if !bodiless => head.length = Length::Bytes(value.parse().ok()?),
            "transfer-encoding" if !bodiless => head.length = Length::Chunked,
            _ => {}
        }
    }
    head.close |= matches!(head.length, Length::ToEnd);
    Some(head)
}
