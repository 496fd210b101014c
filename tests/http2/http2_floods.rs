//! Malicious HTTP/2 clients: their connection ends or is limited, memory stays bounded, and other clients are served.

use crate::common;

use std::sync::mpsc::TryRecvError;
use std::thread;
use std::time::{Duration, Instant};

use common::http2::{
    CANCEL, CONTINUATION, DATA, END_HEADERS, ENHANCE_YOUR_CALM, GOAWAY, HEADERS, PING, PRIORITY, Peer,
    RST_STREAM, Raw, SETTINGS, WINDOW_UPDATE, block, frame, run,
};
use common::process::{Lameduck, Node};

/// Limit on how much a flood may raise the peak memory of the process.
const KIB: u64 = 24 * 1024;

/// Runs an attack against a proxy. Meanwhile another client must be served, each request within three seconds.
fn flood(args: &[&str], attack: impl FnOnce(&Lameduck, &Node)) {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, args);
    let listen = proxy.listen;
    run(async { assert_eq!(Peer::connect(listen).await.get("/").await.expect("whole").status, 200) });
    let before = proxy.peak_memory();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let other = thread::spawn(move || {
        run(async {
            let (peer, mut slowest) = (Peer::connect(listen).await, Duration::ZERO);
            while stopped.try_recv() == Err(TryRecvError::Empty) {
                let begun = Instant::now();
                assert_eq!(peer.get("/").await.expect("whole").status, 200);
                slowest = slowest.max(begun.elapsed());
            }
            slowest
        })
    });
    attack(&proxy, &app);
    drop(stop);
    let slowest = other.join().expect("another client is served all the time");
    let grown = proxy.peak_memory() - before;
    eprintln!("grown by {grown} KiB; the other client waited {slowest:?} at most");
    assert!(grown < KIB, "{grown} KiB");
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    proxy.wait_in_flight(0);
    let output = proxy.process.output();
    assert!(!output.contains("WARN"), "a client's errors must not fill the log: {output}");
}

/// Sends the frames `times` times, or until the peer accepts no more; returns the code of its GOAWAY.
fn send_until_told(raw: &mut Raw, frames: &[u8], times: usize) -> Option<u32> {
    for _ in 0..times {
        if !raw.send(frames) {
            break;
        }
    }
    raw.wait(GOAWAY).map(|goaway| goaway.code())
}

#[test]
fn rapid_resets_end_the_connection() {
    flood(&[], |proxy, app| {
        let mut raw = Raw::connect(proxy.listen);
        let code = (0..5000u32).find_map(|n| {
            let pair = [
                frame(HEADERS, 5, 2 * n + 1, &block("/hang", &[])),
                frame(RST_STREAM, 0, 2 * n + 1, &CANCEL.to_be_bytes()),
            ];
            (!raw.send(&pair.concat()) || n == 4999).then(|| raw.wait(GOAWAY).map(|goaway| goaway.code()))
        });
        // A reset of the socket may take the GOAWAY with it.
        assert!(matches!(code, Some(None | Some(ENHANCE_YOUR_CALM))), "{code:?}");
        app.wait_active(0);
    });
}

#[test]
fn resets_one_by_one_are_bounded_too() {
    flood(&[], |proxy, _| {
        let mut raw = Raw::connect(proxy.listen);
        // The ping's response shows that the stream was accepted and is not in the engine's own queue any more.
        let mut reset = 0;
        for n in 0..900u32 {
            let id = 2 * n + 1;
            raw.frame(HEADERS, 5, id, &block("/hang", &[]));
            raw.frame(PING, 0, 0, &[0; 8]);
            if raw.wait(PING).is_none() || !raw.frame(RST_STREAM, 0, id, &CANCEL.to_be_bytes()) {
                break;
            }
            reset += 1;
        }
        assert!((200..900).contains(&reset), "{reset} resets were accepted");
        assert!(raw.ends_within(Duration::from_secs(5)));
    });
}

#[test]
fn frames_that_carry_nothing_end_the_connection() {
    let open = frame(HEADERS, END_HEADERS, 1, &block("/hang", &[]));
    for (name, one) in [
        ("PING", frame(PING, 0, 0, &[0; 8])),
        ("answers to no PING", frame(PING, 1, 0, &[0; 8])),
        ("SETTINGS", frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0])),
        ("empty SETTINGS", frame(SETTINGS, 0, 0, b"")),
        ("PRIORITY", frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1])),
        ("empty DATA", frame(DATA, 0, 1, b"")),
        ("padding only", frame(DATA, 8, 1, &[3, 0, 0, 0])),
        ("WINDOW_UPDATE", frame(WINDOW_UPDATE, 0, 1, &1u32.to_be_bytes())),
        ("an unknown type", frame(0xbb, 0, 0, &[0; 8])),
    ] {
        flood(&[], |proxy, _| {
            let mut raw = Raw::connect(proxy.listen);
            raw.send(&open);
            let code = send_until_told(&mut raw, &one.repeat(50), 2000);
            eprintln!("{name}: {code:?}");
            assert!(matches!(code, None | Some(ENHANCE_YOUR_CALM)), "{name}: {code:?}");
            assert!(raw.ends_within(Duration::from_secs(5)), "{name}");
        });
    }
}

#[test]
fn answers_that_are_not_read_do_not_gather() {
    flood(&["--body-timeout", "2s", "--idle-timeout", "2s"], |proxy, _| {
        let mut raw = Raw::connect(proxy.listen);
        // The windows are as large as possible, requests never stop, and the client reads nothing.
        raw.frame(SETTINGS, 0, 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff]);
        raw.frame(WINDOW_UPDATE, 0, 0, &0x7fff_0000u32.to_be_bytes());
        for n in 0..100u32 {
            raw.frame(HEADERS, 5, 2 * n + 1, &block("/download?bytes=100000000", &[]));
        }
        proxy.wait_in_flight(0);
    });
}

#[test]
fn a_window_of_zero_holds_nothing_for_ever() {
    flood(&["--body-timeout", "2s"], |proxy, app| {
        let mut raw = Raw::connect(proxy.listen);
        raw.frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
        for n in 0..100u32 {
            raw.frame(HEADERS, 5, 2 * n + 1, &block("/download?bytes=100000000", &[]));
        }
        let mut reset = 0;
        while reset < 100 {
            let frame = raw.wait(RST_STREAM).expect("the connection stays");
            assert_eq!(frame.code(), CANCEL);
            reset += 1;
        }
        app.wait_active(0);
    });
}

#[test]
fn a_refusal_that_the_client_does_not_read_is_given_up() {
    flood(&["--body-timeout", "2s", "--max-uri", "30"], |proxy, _| {
        let mut raw = Raw::connect(proxy.listen);
        raw.frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
        // The response is a 414, and there is no window for its body.
        raw.frame(HEADERS, 5, 1, &block("/a-path-of-more-than-twenty-bytes", &[]));
        assert!(raw.ends_within(Duration::from_secs(8)), "in flight for ever");
    });
}

#[test]
fn a_head_without_end_ends_the_connection() {
    flood(&[], |proxy, _| {
        // Empty CONTINUATION frames.
        let mut raw = Raw::connect(proxy.listen);
        raw.frame(HEADERS, 0, 1, &block("/", &[]));
        let empty = frame(CONTINUATION, 0, 1, b"");
        let code = send_until_told(&mut raw, &empty.repeat(50), 2000);
        eprintln!("empty: {code:?}");
        assert!(raw.ends_within(Duration::from_secs(5)));
        // Large CONTINUATION frames.
        let mut raw = Raw::connect(proxy.listen);
        raw.frame(HEADERS, 0, 1, &block("/", &[]));
        let fields: Vec<u8> = (0..100).flat_map(|_| block("/", &[])[2..].to_vec()).collect();
        let code = send_until_told(&mut raw, &frame(CONTINUATION, 0, 1, &fields), 20_000);
        eprintln!("large: {code:?}");
        assert!(raw.ends_within(Duration::from_secs(5)));
    });
}

#[test]
fn a_compressed_head_is_bounded_by_what_it_unpacks_to() {
    flood(&[], |proxy, _| {
        let mut raw = Raw::connect(proxy.listen);
        // One field of 4000 bytes is added to the table (RFC 7541 §6.2.1); each following byte refers to it.
        let mut bomb = block("/", &[]);
        bomb.extend([0x40, 1, b'x', 127, 0xa1, 0x1e]);
        bomb.extend([b'a'; 127 + 0x21 + 0x1e * 128]);
        bomb.extend([0x80 | 62; 12_000]);
        for n in 0..50u32 {
            if !raw.frame(HEADERS, 5, 2 * n + 1, &bomb) {
                break;
            }
        }
        let answered = raw.wait(GOAWAY).map(|goaway| goaway.code());
        eprintln!("the bomb: {answered:?}");
        assert!(raw.ends_within(Duration::from_secs(5)));
    });
}

#[test]
fn a_client_that_begins_and_says_nothing_is_closed_in_time() {
    flood(&["--head-timeout", "2s", "--idle-timeout", "2s"], |proxy, _| {
        for begin in [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], b"PRI * HT"] {
            let mut raw = Raw::bare(proxy.listen);
            raw.send(begin);
            assert!(raw.ends_within(Duration::from_secs(8)), "{begin:?}");
        }
        // A head that is begun and never continued.
        let mut raw = Raw::connect(proxy.listen);
        raw.frame(HEADERS, 0, 1, &block("/", &[]));
        assert!(raw.ends_within(Duration::from_secs(8)), "half a head");
    });
}
