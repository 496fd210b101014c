//! Bodies: where a message ends and where an event ends. Pure; no sockets.

use super::head::Framing;

/// Limit for one chunk's extension and for the trailer section, in bytes.
const MAX_EXTRA: u32 = 16 * 1024;

/// The rest of a body.
#[derive(Debug)]
pub enum Body {
    /// A number of bytes.
    Length(u64),
    /// Chunks and trailers.
    Chunked(Chunks),
    /// Until the connection closes.
    UntilClose,
}

/// The body violates the chunked coding (RFC 9112 §7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

impl Body {
    /// Returns a body of this framing, before its first byte.
    pub fn new(framing: Framing) -> Self {
        match framing {
            Framing::None => Self::Length(0),
            Framing::Length(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(Chunks::default()),
            Framing::UntilClose => Self::UntilClose,
        }
    }

    /// Returns how many of `bytes` belong to this body, and passes its content, without the coding, to `content`
    /// piece by piece.
    ///
    /// # Errors
    /// If the chunked coding is violated.
    pub fn take(&mut self, bytes: &[u8], mut content: impl FnMut(&[u8])) -> Result<usize, Broken> {
        match self {
            Self::Length(left) => {
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= taken as u64;
                content(&bytes[..taken]);
                Ok(taken)
            }
            Self::Chunked(chunks) => chunks.take(bytes, content),
            Self::UntilClose => {
                content(bytes);
                Ok(bytes.len())
            }
        }
    }

    /// Whether the last byte has been taken.
    pub fn is_done(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(chunks) => chunks.state == State::Done,
            Self::UntilClose => false,
        }
    }

    /// Returns the trailer section after the last chunk, without its empty line.
    pub fn trailers(&self) -> &[u8] {
        match self {
            Self::Chunked(chunks) => &chunks.trailers,
            Self::Length(_) | Self::UntilClose => b"",
        }
    }

    /// Whether the bytes taken so far end between two chunks, so where the sender ended a write. False for other
    /// framings, where that is not visible.
    pub fn is_between_chunks(&self) -> bool {
        match self {
            Self::Chunked(chunks) => chunks.state == State::Size && chunks.digits == 0,
            Self::Length(_) | Self::UntilClose => true,
        }
    }
}

/// Parses the chunked coding byte by byte and accepts nothing that two readers could interpret differently: only
/// CRLF, only hexadecimal digits, bounded extensions and trailers. What it accepts may be passed on unchanged.
#[derive(Debug, Default)]
pub struct Chunks {
    state: State,
    /// The chunk's size while it is parsed, then the bytes left of it.
    size: u64,
    digits: u8,
    extra: u32,
    trailers: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Size,
    SizeSpace,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    TrailerStart,
    TrailerName,
    TrailerValue,
    TrailerLf,
    EndLf,
    Done,
}

impl Chunks {
    fn take(&mut self, bytes: &[u8], mut content: impl FnMut(&[u8])) -> Result<usize, Broken> {
        let mut at = 0;
        while at < bytes.len() && self.state != State::Done {
            if self.state == State::Data {
                let piece = usize::try_from(self.size).unwrap_or(usize::MAX).min(bytes.len() - at);
                content(&bytes[at..at + piece]);
                at += piece;
                self.size -= piece as u64;
                if self.size == 0 {
                    self.state = State::DataCr;
                }
            } else {
                let next = self.step(bytes[at])?;
                if matches!(next, State::TrailerName | State::TrailerValue | State::TrailerLf)
                    || self.state == State::TrailerLf
                {
                    self.trailers.push(bytes[at]);
                }
                self.state = next;
                at += 1;
            }
        }
        Ok(at)
    }

    /// Processes one byte of the coding itself.
    fn step(&mut self, byte: u8) -> Result<State, Broken> {
        Ok(match (self.state, byte) {
            (State::Size, digit) if digit.is_ascii_hexdigit() => {
                // 15 digits are 2^60 bytes; a larger size could overflow in a reader behind us.
                self.digits += 1;
                let value = (digit as char).to_digit(16).ok_or(Broken)?;
                self.size = self.size << 4 | u64::from(value);
                if self.digits > 15 { return Err(Broken) } else { State::Size }
            }
            (State::Size | State::SizeSpace, b'\r') if self.digits > 0 => State::SizeLf,
            (State::Size | State::SizeSpace, b';') if self.digits > 0 => State::Extension,
            (State::Size | State::SizeSpace, b' ' | b'\t') if self.digits > 0 => {
                self.count(State::SizeSpace)?
            }
            (State::Extension, b'\r') => State::SizeLf,
            (State::Extension, byte) if is_text(byte) => self.count(State::Extension)?,
            (State::SizeLf, b'\n') => {
                (self.digits, self.extra) = (0, 0);
                if self.size == 0 { State::TrailerStart } else { State::Data }
            }
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => State::Size,
            (State::TrailerStart, b'\r') => State::EndLf,
            (State::TrailerStart | State::TrailerName, byte) if is_token(byte) => {
                self.count(State::TrailerName)?
            }
            (State::TrailerName, b':') => State::TrailerValue,
            (State::TrailerValue, b'\r') => State::TrailerLf,
            (State::TrailerValue, byte) if is_text(byte) => self.count(State::TrailerValue)?,
            (State::TrailerLf, b'\n') => State::TrailerStart,
            (State::EndLf, b'\n') => State::Done,
            _ => return Err(Broken),
        })
    }

    fn count(&mut self, next: State) -> Result<State, Broken> {
        self.extra += 1;
        if self.extra > MAX_EXTRA { Err(Broken) } else { Ok(next) }
    }
}

/// Visible, space, tab or above ASCII (RFC 9110 §5.5).
fn is_text(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}

/// Characters of a field name (RFC 9110 §5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Finds where events end in an event stream: after an empty line, with any of the three line ends
/// (HTML standard, "Parsing an event stream").
#[derive(Debug)]
pub struct Events {
    /// Nothing has arrived since the last empty line.
    at_boundary: bool,
    line_empty: bool,
    after_cr: bool,
}

impl Default for Events {
    fn default() -> Self {
        Self { at_boundary: true, line_empty: true, after_cr: false }
    }
}

impl Events {
    /// Returns how many bytes of `content` precede its last event boundary; `None` if there is none.
    pub fn last_boundary(&mut self, content: &[u8]) -> Option<usize> {
        let mut last = None;
        for (at, &byte) in content.iter().enumerate() {
            match byte {
                // The second half of a CRLF: a boundary just before it moves behind it.
                b'\n' if self.after_cr => {}
                b'\r' | b'\n' => {
                    self.at_boundary = self.line_empty;
                    self.line_empty = true;
                }
                _ => {
                    self.line_empty = false;
                    self.at_boundary = false;
                }
            }
            self.after_cr = byte == b'\r';
            if self.at_boundary {
                last = Some(at + 1);
            }
        }
        last
    }

    /// Whether nothing of the next event has arrived.
    pub fn at_boundary(&self) -> bool {
        self.at_boundary
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunked(bytes: &[u8]) -> Result<(usize, Vec<u8>, bool), Broken> {
        let (mut body, mut content) = (Body::new(Framing::Chunked), Vec::new());
        let taken = body.take(bytes, |piece| content.extend_from_slice(piece))?;
        Ok((taken, content, body.is_done()))
    }

    #[test]
    fn chunks_end_after_their_trailers_and_not_a_byte_later() {
        let bytes = b"4;name=\"v\"\r\nWiki\r\n5\r\npedia\r\n0\r\nChecksum: abc\r\n\r\nGET / HTTP/1.1";
        let end = bytes.len() - b"GET / HTTP/1.1".len();
        assert_eq!(chunked(bytes), Ok((end, b"Wikipedia".to_vec(), true)));
        let mut body = Body::new(Framing::Chunked);
        body.take(bytes, |_| ()).unwrap();
        assert_eq!(body.trailers(), b"Checksum: abc\r\n");
    }

    #[test]
    fn chunks_may_be_split_anywhere() {
        let bytes = b"4\r\nWiki\r\n1a\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\nA: b\r\n\r\n";
        for cut in 0..bytes.len() {
            let (mut body, mut content) = (Body::new(Framing::Chunked), Vec::new());
            for part in [&bytes[..cut], &bytes[cut..]] {
                assert_eq!(body.take(part, |piece| content.extend_from_slice(piece)), Ok(part.len()));
            }
            assert!(body.is_done());
            assert_eq!(content, b"Wikiabcdefghijklmnopqrstuvwxyz");
        }
    }

    #[test]
    fn chunks_that_two_readers_could_see_differently_are_refused() {
        let long = format!("{}\r\n", "1".repeat(16));
        let extension = format!("1;{}\r\n", "x".repeat(MAX_EXTRA as usize + 1));
        let broken: [&[u8]; 12] = [
            b"\r\n",
            b"-1\r\n",
            b"+1\r\n",
            b"0x1\r\n",
            b"1\nX",
            b"1\r\nXY",
            b"1\r\nX\n",
            b"0\r\nno colon\r\n",
            b"0\r\n folded: x\r\n",
            b"1;\x00\r\n",
            long.as_bytes(),
            extension.as_bytes(),
        ];
        for bytes in broken {
            assert_eq!(
                chunked(bytes),
                Err(Broken),
                "{}",
                String::from_utf8_lossy(&bytes[..bytes.len().min(20)])
            );
        }
    }

    #[test]
    fn an_event_ends_after_an_empty_line_of_any_kind() {
        for (content, boundary) in [
            (&b"data: 1\n\ndata: 2"[..], Some(9)),
            (b"data: 1\r\n\r\n", Some(11)),
            (b"data: 1\r\rdata", Some(9)),
            (b"data: 1\n", None),
            (b"a\n\nb\n\nc\n", Some(6)),
        ] {
            assert_eq!(Events::default().last_boundary(content), boundary);
        }
        let mut split = Events::default();
        assert!(split.at_boundary(), "before the first event");
        assert_eq!(split.last_boundary(b"data: 1\n"), None);
        assert!(!split.at_boundary());
        assert_eq!(split.last_boundary(b"\n"), Some(1));
        assert!(split.at_boundary());
    }
}
