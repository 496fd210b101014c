//! Follows WebSocket frames (RFC 6455 §5.2) to find where messages end, without looking at their contents. Pure; no
//! sockets.

use std::hash::{BuildHasher, RandomState};

/// Status 1001, "going away" (RFC 6455 §7.4.1).
const GOING_AWAY: [u8; 2] = 1001u16.to_be_bytes();

/// Follows one direction of a WebSocket.
#[derive(Debug, Default)]
pub struct Frames {
    /// The header bytes of the current frame.
    header: [u8; 10],
    have: usize,
    /// Bytes of the masking key and payload still to come.
    left: u64,
    /// The last frame of the current message is still to come (RFC 6455 §5.4).
    open: bool,
    closed: bool,
}

impl Frames {
    /// Follows `bytes`; returns how many of them precede the end of the last complete message.
    pub fn follow(&mut self, bytes: &[u8]) -> usize {
        let (mut at, mut boundary) = (0, 0);
        while at < bytes.len() {
            if self.left > 0 {
                let skip = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len() - at);
                at += skip;
                self.left -= skip as u64;
            } else {
                self.header[self.have] = bytes[at];
                self.have += 1;
                at += 1;
                if self.have < self.header_len() {
                    continue;
                }
                self.note_opcode();
                self.left = self.payload_len();
                self.have = 0;
            }
            if self.left == 0 && !self.open {
                boundary = at;
            }
        }
        boundary
    }

    /// Whether the next byte begins a message, or a control frame between two.
    pub fn at_boundary(&self) -> bool {
        self.have == 0 && self.left == 0 && !self.open
    }

    /// Whether a Close frame has begun to pass.
    pub fn closed(&self) -> bool {
        self.closed
    }

    fn note_opcode(&mut self) {
        match self.header[0] & 0x0f {
            // Nothing follows a Close, not even the rest of a message.
            8 => (self.closed, self.open) = (true, false),
            // Control frames may come between the frames of a message.
            9.. => {}
            _ => self.open = self.header[0] & 0x80 == 0,
        }
    }

    fn header_len(&self) -> usize {
        match (self.have, self.header[1] & 0x7f) {
            (1, _) => 2,
            (_, 126) => 4,
            (_, 127) => 10,
            _ => 2,
        }
    }

    /// Returns the bytes of the payload and the masking key.
    fn payload_len(&self) -> u64 {
        let key = if self.header[1] & 0x80 != 0 { 4 } else { 0 };
        let length = match self.header[1] & 0x7f {
            126 => u64::from(u16::from_be_bytes([self.header[2], self.header[3]])),
            127 => self.header[2..10].iter().fold(0, |length, byte| length << 8 | u64::from(*byte)),
            short => u64::from(short),
        };
        length.saturating_add(key)
    }
}

/// A Close frame with status 1001 for the client.
pub fn close_to_client() -> [u8; 4] {
    [0x88, 2, GOING_AWAY[0], GOING_AWAY[1]]
}

/// A Close frame with status 1001 for the app, masked as a client's frames must be (RFC 6455 §5.3).
pub fn close_to_app() -> [u8; 8] {
    let key = RandomState::new().hash_one(0).to_ne_bytes();
    [0x88, 0x82, key[0], key[1], key[2], key[3], GOING_AWAY[0] ^ key[0], GOING_AWAY[1] ^ key[1]]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(opcode: u8, masked: bool, length: usize) -> Vec<u8> {
        let mask = if masked { 0x80 } else { 0 };
        let mut bytes = vec![0x80 | opcode];
        match length {
            0..126 => bytes.push(mask | length as u8),
            126..65536 => {
                bytes.push(mask | 126);
                bytes.extend((length as u16).to_be_bytes());
            }
            _ => {
                bytes.push(mask | 127);
                bytes.extend((length as u64).to_be_bytes());
            }
        }
        bytes.extend(std::iter::repeat_n(0x88, length + if masked { 4 } else { 0 }));
        bytes
    }

    #[test]
    fn boundaries_are_found_wherever_the_bytes_are_split() {
        for (length, masked) in
            [(0, false), (1, true), (125, false), (126, true), (65535, true), (65536, false)]
        {
            let bytes = frame(2, masked, length);
            let cuts = [0, 1, 2, 3, bytes.len() / 2, bytes.len() - 1];
            for cut in cuts.into_iter().filter(|cut| *cut < bytes.len()) {
                let mut frames = Frames::default();
                frames.follow(&bytes[..cut]);
                assert_eq!(frames.at_boundary(), cut == 0, "length {length} cut at {cut}");
                assert_eq!(frames.follow(&bytes[cut..]), bytes.len() - cut);
                assert!(frames.at_boundary() && !frames.closed());
            }
        }
    }

    #[test]
    fn the_last_boundary_is_before_an_unfinished_frame() {
        let mut bytes = frame(1, true, 300);
        let whole = bytes.len();
        bytes.extend(&frame(1, true, 10)[..5]);
        let mut frames = Frames::default();
        assert_eq!(frames.follow(&bytes), whole);
        assert!(!frames.at_boundary());
    }

    #[test]
    fn a_message_in_several_frames_ends_with_its_last_one() {
        let mut first = frame(1, true, 3);
        first[0] &= 0x7f;
        let (ping, last) = (frame(9, true, 4), frame(0, true, 2));
        let mut frames = Frames::default();
        for part in [&first, &ping] {
            assert_eq!(frames.follow(part), 0);
            assert!(!frames.at_boundary());
        }
        assert_eq!(frames.follow(&[&last[..], &ping].concat()), last.len() + ping.len());
        assert!(frames.at_boundary());
        frames.follow(&first);
        frames.follow(&close_to_app());
        assert!(frames.closed() && frames.at_boundary(), "the rest of the message never comes");
    }

    #[test]
    fn a_close_frame_is_seen() {
        let mut frames = Frames::default();
        frames.follow(&close_to_app());
        assert!(frames.closed() && frames.at_boundary());
    }
}
