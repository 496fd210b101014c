//! Whatever bytes arrive as a PROXY protocol header: no panic, no byte too many consumed, the same result however they
//! are split, and a result within the size limit. A failure prints the seed that replays it.

use lameduck::proxy::accept::proxy_protocol::{MAX_V1, MAX_V2, header};

const SEEDS: u64 = 100_000;

/// xorshift64*: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % most
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn noise(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most)).map(|_| self.below(256) as u8).collect()
    }

    /// Changes, removes or inserts a few bytes.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..self.below(4) {
            let at = self.below(bytes.len());
            match self.below(3) {
                0 => bytes[at] = self.below(256) as u8,
                1 if bytes.len() > 1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, self.pick(b"\0\r\n 0:.\xff")),
            }
        }
    }

    fn line(&mut self) -> Vec<u8> {
        const WORDS: [&str; 12] = [
            "PROXY",
            "TCP4",
            "TCP6",
            "UNKNOWN",
            "192.0.2.7",
            "::1",
            "2001:db8::7",
            "1",
            "65535",
            "65536",
            "",
            "x",
        ];
        let family = self.pick(&WORDS[1..4]);
        let mut words = vec!["PROXY", family];
        words.extend((0..self.below(6)).map(|_| self.pick(&WORDS)));
        format!("{}\r\n", words.join(" ")).into_bytes()
    }

    fn binary(&mut self) -> Vec<u8> {
        let body = self.noise(300);
        let claimed = if self.below(4) == 0 { self.below(1 << 16) } else { body.len() };
        let kind =
            [self.pick(&[0x20, 0x21, 0x21, 0x22, 0x11]), self.pick(&[0, 0x11, 0x21, 0x31, 0x12, 0x41])];
        let claimed = u16::try_from(claimed).unwrap_or(u16::MAX).to_be_bytes();
        [b"\r\n\r\n\0\r\nQUIT\n", &kind[..], &claimed, &body].concat()
    }
}

#[test]
fn any_bytes_are_a_header_a_part_of_one_or_none() {
    let mut whole = 0;
    for seed in 0..SEEDS {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut bytes = match random.below(8) {
            0 => random.noise(200),
            1..=3 => random.line(),
            _ => random.binary(),
        };
        if random.below(2) == 0 && !bytes.is_empty() {
            random.mutate(&mut bytes);
        }
        let tail = random.noise(40);
        let all = [&bytes[..], &tail].concat();
        let read = header(&all);
        if let Ok(Some(found)) = read {
            whole += 1;
            assert!(found.len <= all.len() && found.len <= MAX_V2, "seed {seed}: {found:?}");
            // Bytes after the header change nothing, and no shorter input is a header.
            assert_eq!(header(&all[..found.len]), read, "seed {seed}");
            let cut = random.below(found.len);
            assert_eq!(header(&all[..cut]), Ok(None), "seed {seed}: {cut} bytes");
        } else if read == Ok(None) {
            assert!(all.len() < MAX_V2, "seed {seed}: waits beyond the size limit");
            assert!(
                all.len() < MAX_V1 || all.starts_with(b"\r\n"),
                "seed {seed}: waits beyond the longest line"
            );
        } else {
            // Input that was rejected stays rejected with more bytes.
            let longer = [&all[..], b"\r\n"].concat();
            assert!(header(&longer).is_err(), "seed {seed}");
        }
    }
    assert!(whole > SEEDS / 10, "only {whole} headers: the generator is wrong");
}
