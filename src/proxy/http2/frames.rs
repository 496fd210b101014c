//! Follows HTTP/2 frames without taking part in the protocol (RFC 9113 §4.1, §6), and limits how many of them a
//! client may send. Pure; no sockets.

use crate::proxy::first_bytes::PREFACE;

const DATA: u8 = 0x0;
const HEADERS: u8 = 0x1;
const RST_STREAM: u8 = 0x3;
const CONTINUATION: u8 = 0x9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;

/// The direction of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sides {
    /// The client's frames, reported when they begin.
    FromClient,
    /// Our frames, reported when they end.
    ToClient,
}

/// What a frame means to the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Carries part of a message.
    Work,
    /// The last frame of this stream in its direction, or our reset of it.
    LastOf(u32),
    /// The client's reset of this stream.
    Reset(u32),
    /// Any other frame, empty DATA frames included.
    Control,
}

/// Follows frames by their headers and skips the payloads.
#[derive(Debug)]
pub struct Follower {
    sides: Sides,
    head: [u8; 9],
    /// Bytes of `head` read so far.
    have: usize,
    /// Bytes left of the payload, or of the preface.
    payload: usize,
    /// Reported once the payload is complete.
    then: Option<Frame>,
    /// The stream ends with the header block being sent.
    ends: bool,
}

impl Follower {
    /// At the start of a connection.
    pub fn new(sides: Sides) -> Self {
        let payload = if sides == Sides::FromClient { PREFACE.len() } else { 0 };
        Self { sides, head: [0; 9], have: 0, payload, then: None, ends: false }
    }

    /// Follows the next bytes and reports the frames in them.
    pub fn follow(&mut self, mut bytes: &[u8], mut report: impl FnMut(Frame)) {
        while !bytes.is_empty() {
            if self.payload > 0 {
                let skipped = self.payload.min(bytes.len());
                self.payload -= skipped;
                bytes = &bytes[skipped..];
            } else {
                let n = (self.head.len() - self.have).min(bytes.len());
                self.head[self.have..self.have + n].copy_from_slice(&bytes[..n]);
                self.have += n;
                bytes = &bytes[n..];
                if self.have < self.head.len() {
                    return;
                }
                self.have = 0;
                self.begin(&mut report);
            }
            if self.payload == 0
                && let Some(frame) = self.then.take()
            {
                report(frame);
            }
        }
    }

    fn begin(&mut self, report: &mut impl FnMut(Frame)) {
        let [a, b, c, kind, flags, id @ ..] = self.head;
        self.payload = u32::from_be_bytes([0, a, b, c]) as usize;
        let id = u32::from_be_bytes(id) & (u32::MAX >> 1);
        let ends = match kind {
            DATA => flags & END_STREAM > 0,
            HEADERS => {
                self.ends = flags & END_STREAM > 0;
                self.ends && flags & END_HEADERS > 0
            }
            CONTINUATION => self.ends && flags & END_HEADERS > 0,
            RST_STREAM => self.sides == Sides::ToClient,
            _ => false,
        };
        let frame = match kind {
            _ if ends => Frame::LastOf(id),
            DATA if self.payload == 0 => Frame::Control,
            DATA | HEADERS => Frame::Work,
            RST_STREAM => Frame::Reset(id),
            _ => Frame::Control,
        };
        match self.sides {
            Sides::FromClient => report(frame),
            Sides::ToClient => self.then = Some(frame),
        }
    }
}

/// Limits the frames that cause work and carry no data. Each kind has a budget that time and useful work refill; a
/// client that exceeds it gets ENHANCE_YOUR_CALM.
#[derive(Debug)]
pub struct Allowance {
    control: u32,
    resets: u32,
    at_ms: u64,
}

/// Budget for pings, settings, window updates, priorities and empty frames: burst, and refill per second. A browser
/// sends about ten when it connects, gRPC one ping per round trip while a response arrives.
const MAX_CONTROL: u32 = 1_000;
const CONTROL_PER_SECOND: u64 = 100;
/// Refill for each frame of a response: a window update for the stream and one for the connection, a ping, and one
/// spare.
const CONTROL_PER_FRAME: u32 = 4;
/// Budget for resets: enough for a browser to leave a page and all of its streams twice; then the refill per second,
/// and one for each complete response.
const MAX_RESETS: u32 = 200;
const RESETS_PER_SECOND: u64 = 20;

impl Allowance {
    /// The full budget of a new client.
    pub fn new(now_ms: u64) -> Self {
        Self { control: MAX_CONTROL, resets: MAX_RESETS, at_ms: now_ms }
    }

    /// A frame with part of a response was sent.
    pub fn worked(&mut self) {
        self.control = (self.control + CONTROL_PER_FRAME).min(MAX_CONTROL);
    }

    /// The last frame of a response was sent.
    pub fn answered(&mut self) {
        self.worked();
        self.resets = (self.resets + 1).min(MAX_RESETS);
    }

    /// Takes one control frame from the budget. Returns false if it is used up.
    pub fn control(&mut self, now_ms: u64) -> bool {
        if self.control == 0 {
            self.refill(now_ms);
        }
        let left = self.control > 0;
        self.control = self.control.saturating_sub(1);
        left
    }

    /// Takes one reset from the budget. Returns false if it is used up.
    pub fn reset(&mut self, now_ms: u64) -> bool {
        if self.resets == 0 {
            self.refill(now_ms);
        }
        let left = self.resets > 0;
        self.resets = self.resets.saturating_sub(1);
        left
    }

    fn refill(&mut self, now_ms: u64) {
        let ms = now_ms.saturating_sub(self.at_ms).min(10_000);
        self.at_ms = now_ms;
        self.control = (self.control + (ms * CONTROL_PER_SECOND / 1_000) as u32).min(MAX_CONTROL);
        self.resets = (self.resets + (ms * RESETS_PER_SECOND / 1_000) as u32).min(MAX_RESETS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, id: u32, payload: usize) -> Vec<u8> {
        let length = (payload as u32).to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags];
        frame.extend(id.to_be_bytes());
        frame.resize(9 + payload, 0xaa);
        frame
    }

    #[test]
    fn a_streams_last_frame_is_told_with_its_last_byte_however_it_is_split() {
        let bytes = [
            frame(HEADERS, END_HEADERS, 1, 10),
            frame(DATA, 0, 1, 300),
            frame(DATA, END_STREAM, 1, 5),
            frame(HEADERS, END_STREAM, 3, 4),
            frame(CONTINUATION, END_HEADERS, 3, 4),
            frame(RST_STREAM, 0, 5, 4),
        ]
        .concat();
        let whole =
            vec![Frame::Work, Frame::Work, Frame::LastOf(1), Frame::Work, Frame::LastOf(3), Frame::LastOf(5)];
        for cut in 0..bytes.len() {
            let (mut follower, mut reported) = (Follower::new(Sides::ToClient), vec![]);
            follower.follow(&bytes[..cut], |frame| reported.push(frame));
            assert_eq!(reported.contains(&Frame::LastOf(1)), cut >= 19 + 309 + 14, "after {cut} bytes");
            follower.follow(&bytes[cut..], |frame| reported.push(frame));
            assert_eq!(reported, whole, "cut at {cut}");
        }
    }

    #[test]
    fn what_asks_for_work_and_carries_none_is_counted() {
        let bytes = [
            PREFACE.to_vec(),
            frame(4, 0, 0, 0),
            frame(6, 0, 0, 8),
            frame(DATA, 0, 1, 0),
            frame(RST_STREAM, 0, 1, 4),
            frame(HEADERS, END_STREAM | END_HEADERS, 3, 9),
        ]
        .concat();
        let (mut follower, mut reported) = (Follower::new(Sides::FromClient), vec![]);
        follower.follow(&bytes, |frame| reported.push(frame));
        assert_eq!(
            reported,
            [Frame::Control, Frame::Control, Frame::Control, Frame::Reset(1), Frame::LastOf(3)]
        );
    }

    #[test]
    fn an_allowance_comes_back_with_time_and_with_work() {
        let mut allowance = Allowance::new(0);
        assert!((0..MAX_RESETS).all(|_| allowance.reset(0)), "a page that is left, twice");
        assert!(!allowance.reset(40), "all at once");
        assert!(allowance.reset(1_040) && allowance.reset(1_040));
        assert!((0..MAX_CONTROL).all(|_| allowance.control(1_040)));
        assert!(!allowance.control(1_040));
        allowance.worked();
        assert!((0..CONTROL_PER_FRAME).all(|_| allowance.control(1_040)));
        assert!(!allowance.control(1_040));
    }
}
