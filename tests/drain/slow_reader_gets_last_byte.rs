//! A slow reader gets the last byte, although the proxy and the app have exited by then.

use crate::common;

use common::http::{Client, End};
use common::process::{Lameduck, Node};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Upper bound on the unread bytes in the kernel of a client that requested a receive buffer of 4 KiB.
const CLIENTS_KERNEL: usize = 64 * 1024;

#[test]
fn the_process_stays_until_a_slow_reader_has_everything() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = Client::connect_narrow(proxy.listen);
    // It fits into the proxy's socket buffer, but not into the reader's.
    let length = 400_000;
    client.get(&format!("/download?bytes={length}"));
    let head = client.head();
    proxy.terminate();
    proxy.wait_log("drained");

    // In a pod, the network disappears with the process: bytes that the client's kernel lacks by then are lost.
    let read = Arc::new(AtomicUsize::new(0));
    let reader = {
        let read = read.clone();
        std::thread::spawn(move || {
            let answer = client.body_slowly(head, 16 * 1024, Duration::from_millis(50), &read);
            client.expect_fin();
            answer
        })
    };
    proxy.expect_clean_exit();
    let had = read.load(Ordering::Acquire);
    assert!(had + CLIENTS_KERNEL >= length, "exited when the client had {had} of {length} bytes");
    let answer = reader.join().unwrap();
    assert_eq!((answer.body.len(), answer.end), (length, End::Whole));
}

#[test]
fn a_reader_that_never_reads_does_not_keep_the_process_past_its_grace() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "4s", "--reserve", "2s", "--lame-duck", "0s"]);
    let mut client = Client::connect_narrow(proxy.listen);
    client.get("/download?bytes=400000");
    client.head();
    let begun = Instant::now();
    proxy.terminate();
    proxy.expect_clean_exit();
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
}

#[test]
fn a_pipelined_request_is_answered_before_the_connection_closes() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);
    proxy.terminate();
    proxy.wait_phase("draining");
    client.get("/");
    app.release();
    assert_eq!(client.answer().text(), "released\n");
    let last = client.answer();
    assert_eq!((last.head.status, last.end), (200, End::Whole));
    assert!(last.head.has("connection", "close"), "{:?}", last.head);
    client.expect_fin();
    proxy.expect_clean_exit();
}

#[test]
fn an_early_answer_is_not_reset_by_the_rest_of_the_upload() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &["--lame-duck", "2s"]);
    let mut client = proxy.client();
    proxy.terminate();
    proxy.wait_phase("lame-duck");
    client.request("POST", "/early", &["Content-Length: 500000"]);
    client.send(vec![b'x'; 200_000]);
    let answer = client.answer();
    assert_eq!((answer.head.status, answer.end), (413, End::Whole));
    client.send(vec![b'x'; 300_000]);
    client.expect_fin();
    drop(client);
    proxy.process.wait_exit();
}
