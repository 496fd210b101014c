//! The PROXY protocol's header, versions 1 and 2, in which a load balancer names the client (HAProxy, "The PROXY
//! protocol"). Pure; no sockets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Maximum length of a version 1 header with its line end, in bytes (§2.1).
pub const MAX_V1: usize = 107;
/// Maximum length of a version 2 header, in bytes. The largest addresses (unix) take 232 of them; the rest is for
/// additional fields, which are ignored.
pub const MAX_V2: usize = 4096;

const START_V1: &[u8] = b"PROXY ";
/// The 12 bytes that begin version 2 (§2.2).
const START_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Length of the signature, version and command, family and protocol, and the length field, in bytes.
const FIXED_V2: usize = 16;

/// A complete header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its length in bytes.
    pub len: usize,
    /// The client that it names; `None` if the peer connects for itself (a health check) or the client has no IP
    /// address.
    pub client: Option<SocketAddr>,
}

/// Why these bytes begin no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadHeader(pub &'static str);

/// Parses the header at the start of a connection; `None` if `bytes` are an incomplete one.
///
/// # Errors
/// If they begin no header, or one that is too long.
pub fn header(bytes: &[u8]) -> Result<Option<Header>, BadHeader> {
    if begins(bytes, START_V2) {
        version_2(bytes)
    } else if begins(bytes, START_V1) {
        version_1(bytes)
    } else {
        Err(BadHeader("it does not begin with a PROXY protocol header"))
    }
}

/// Whether `bytes` match `start` as far as they go.
fn begins(bytes: &[u8], start: &[u8]) -> bool {
    let n = bytes.len().min(start.len());
    bytes[..n] == start[..n]
}

/// Parses one line: `PROXY TCP4 client proxy port port`.
fn version_1(bytes: &[u8]) -> Result<Option<Header>, BadHeader> {
    const BAD: BadHeader = BadHeader("its PROXY protocol line is invalid");
    let within = &bytes[..bytes.len().min(MAX_V1)];
    let Some(end) = within.windows(2).position(|two| two == b"\r\n") else {
        return if bytes.len() < MAX_V1 {
            Ok(None)
        } else {
            Err(BadHeader("its PROXY protocol line is too long"))
        };
    };
    let (line, len) = (&within[..end], end + 2);
    // The rest of the line must be ignored (§2.1).
    if line == b"PROXY UNKNOWN" || line.starts_with(b"PROXY UNKNOWN ") {
        return Ok(Some(Header { len, client: None }));
    }
    let words: Vec<_> = std::str::from_utf8(line).map_err(|_| BAD)?.split(' ').collect();
    let client = match words[..] {
        [_, family, client, proxy, port, proxy_port] => {
            let (client, proxy) = match family {
                "TCP4" => (ip::<Ipv4Addr>(client), ip::<Ipv4Addr>(proxy)),
                "TCP6" => (ip::<Ipv6Addr>(client), ip::<Ipv6Addr>(proxy)),
                _ => return Err(BAD),
            };
            match (client, proxy, port_number(port), port_number(proxy_port)) {
                (Some(ip), Some(_), Some(port), Some(_)) => Some(SocketAddr::new(ip, port)),
                _ => return Err(BAD),
            }
        }
        _ => return Err(BAD),
    };
    Ok(Some(Header { len, client }))
}

fn ip<A: std::str::FromStr + Into<IpAddr>>(text: &str) -> Option<IpAddr> {
    text.parse::<A>().ok().map(Into::into)
}

/// Parses a port without a sign or leading zeros (§2.1).
fn port_number(text: &str) -> Option<u16> {
    let plain = text == "0" || !text.starts_with('0');
    text.parse().ok().filter(|_| plain && text.bytes().all(|b| b.is_ascii_digit()))
}

/// Parses the binary header: the fixed part, the addresses, additional fields.
fn version_2(bytes: &[u8]) -> Result<Option<Header>, BadHeader> {
    let Some((fixed, rest)) = bytes.split_at_checked(FIXED_V2) else { return Ok(None) };
    let len = FIXED_V2 + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    let (version, command) = (fixed[12] >> 4, fixed[12] & 0xf);
    let (family, protocol) = (fixed[13] >> 4, fixed[13] & 0xf);
    // Unassigned values must be refused (§2.2).
    if version != 2 || command > 1 || family > 3 || protocol > 2 {
        return Err(BadHeader("its PROXY protocol header has an unknown version, command or family"));
    }
    if len > MAX_V2 {
        return Err(BadHeader("its PROXY protocol header is too long"));
    }
    let Some(body) = rest.get(..len - FIXED_V2) else { return Ok(None) };
    // LOCAL: the peer connects for itself, whatever the rest says.
    let client = match (command, family, protocol) {
        (1, 1, 1) => Some(address::<4>(body)?),
        (1, 2, 1) => Some(address::<16>(body)?),
        _ => None,
    };
    Ok(Some(Header { len, client }))
}

/// Parses the client's address of `N` bytes; the proxy's address and both ports follow it.
fn address<const N: usize>(body: &[u8]) -> Result<SocketAddr, BadHeader>
where
    IpAddr: From<[u8; N]>,
{
    let short = BadHeader("its PROXY protocol header is too short for its addresses");
    let (ip, rest) = body.split_first_chunk::<N>().ok_or(short)?;
    let (_, ports) = rest.split_first_chunk::<N>().ok_or(short)?;
    let (ports, _) = ports.split_first_chunk::<4>().ok_or(short)?;
    Ok(SocketAddr::new(IpAddr::from(*ip), u16::from_be_bytes([ports[0], ports[1]])))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let len = u16::try_from(body.len()).unwrap().to_be_bytes();
        [START_V2, &[command, family], &len, body].concat()
    }

    fn client(bytes: &[u8]) -> Result<Option<String>, BadHeader> {
        let header = header(bytes)?.unwrap();
        assert_eq!(header.len, bytes.len());
        Ok(header.client.map(|client| client.to_string()))
    }

    #[test]
    fn version_1_names_the_client() {
        assert_eq!(
            client(b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n"),
            Ok(Some("192.0.2.7:56324".into()))
        );
        assert_eq!(
            client(b"PROXY TCP6 2001:db8::7 2001:db8::1 0 65535\r\n"),
            Ok(Some("[2001:db8::7]:0".into()))
        );
        let longest = format!("PROXY TCP6 {0} {0} 65535 65535\r\n", ["ffff"; 8].join(":"));
        assert!(longest.len() <= MAX_V1 && client(longest.as_bytes()).is_ok());
    }

    #[test]
    fn a_peer_that_speaks_for_itself_stays_the_peer() {
        let addresses = [1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 0, 2];
        for bytes in [
            b"PROXY UNKNOWN\r\n".to_vec(),
            b"PROXY UNKNOWN ffff::1 whatever \xff 2\r\n".to_vec(),
            v2(0x20, 0x00, b""),
            v2(0x20, 0x11, &addresses),
            v2(0x21, 0x00, b""),
            v2(0x21, 0x31, &[b'/'; 216]),
            v2(0x21, 0x12, &addresses),
        ] {
            assert_eq!(client(&bytes), Ok(None), "{bytes:?}");
        }
    }

    #[test]
    fn version_2_names_the_client_and_its_fields_are_skipped() {
        let v4 = [192, 0, 2, 7, 198, 51, 100, 1, 0xdc, 0x04, 0x01, 0xbb];
        assert_eq!(client(&v2(0x21, 0x11, &v4)), Ok(Some("192.0.2.7:56324".into())));
        let with_fields = [&v4[..], &[0x03, 0, 4, 1, 2, 3, 4]].concat();
        assert_eq!(client(&v2(0x21, 0x11, &with_fields)), Ok(Some("192.0.2.7:56324".into())));
        let mut v6 = [0; 36];
        (v6[0], v6[1], v6[15], v6[33]) = (0x20, 0x01, 7, 80);
        assert_eq!(client(&v2(0x21, 0x21, &v6)), Ok(Some("[2001::7]:80".into())));
    }

    #[test]
    fn what_follows_a_header_is_not_its_own() {
        for head in [b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2\r\n".to_vec(), v2(0x20, 0, b"xx")] {
            let bytes = [&head[..], b"\r\nGET /"].concat();
            assert_eq!(header(&bytes).unwrap().unwrap().len, head.len());
            for cut in 0..head.len() {
                assert_eq!(header(&head[..cut]), Ok(None), "{cut} bytes of {head:?}");
            }
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(MAX_V1));
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"PROXY\r\n",
            b"proxy TCP4 1.2.3.4 1.2.3.4 1 2\r\n",
            b"PROXY  TCP4 1.2.3.4 1.2.3.4 1 2\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 \r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1 65536\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 +1 2\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 01 2\r\n",
            b"PROXY TCP4 01.2.3.4 1.2.3.4 1 2\r\n",
            b"PROXY TCP4 ::1 ::1 1 2\r\n",
            b"PROXY TCP6 1.2.3.4 1.2.3.4 1 2\r\n",
            b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n",
            b"PROXY TCP4 \xff\xff 1.2.3.4 1 2\r\n",
            long.as_bytes(),
            b"\r\n\r\nGET",
            &v2(0x11, 0x11, &[0; 12]),
            &v2(0x22, 0x11, &[0; 12]),
            &v2(0x21, 0x41, &[0; 12]),
            &v2(0x21, 0x13, &[0; 12]),
            &v2(0x21, 0x11, &[0; 11]),
            &v2(0x21, 0x21, &[0; 35]),
            &v2(0x21, 0x00, &[0; MAX_V2]),
        ] {
            assert!(header(bytes).is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
