//! A request is in flight from its first byte to the last byte of its response, however slow both are.

use crate::common;

use common::http::{Client, End};
use common::process::{Lameduck, Node};

#[test]
fn a_chunked_response_counts_until_its_final_chunk() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/stream");
    let head = client.head();
    client.wait_seen("first\n");

    proxy.terminate();
    assert_eq!(proxy.wait_phase("draining")["in_flight"], 1);
    app.release();
    let answer = client.body("GET", head);
    assert_eq!((answer.text().as_str(), answer.end), ("first\nlast\n", End::Whole));
    proxy.expect_clean_exit();
}

#[test]
fn an_upload_that_is_half_sent_at_sigterm_arrives_whole() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let body: Vec<u8> = (0..1_000_000_u32).map(|n| n as u8).collect();
    let upload = |mut client: Client, pause: &dyn Fn()| {
        client.request("POST", "/upload", &[&format!("Content-Length: {}", body.len())]);
        let (now, later) = body.split_at(300_000);
        client.send(now);
        pause();
        client.send(later);
        client.answer()
    };
    let expected = upload(Client::connect(app.addr), &|| {});
    let answer = upload(proxy.client(), &|| {
        app.wait_active(1);
        proxy.terminate();
        assert_eq!(proxy.wait_phase("draining")["in_flight"], 1);
    });
    assert_eq!((answer.head.status, answer.text()), (200, expected.text()));
    proxy.expect_clean_exit();
}

#[test]
fn a_download_counts_until_the_client_has_taken_it() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = Client::connect_narrow(proxy.listen);
    // More than all buffers between the app and the client can hold.
    let length = 50_000_000;
    client.get(&format!("/download?bytes={length}"));
    let head = client.head();

    proxy.terminate();
    assert_eq!(proxy.wait_phase("draining")["in_flight"], 1);
    let answer = client.body("GET", head);
    assert_eq!((answer.body.len(), answer.end), (length, End::Whole));
    let letters = b"abcdefghijklmnopqrstuvwxyz012345";
    assert!(answer.body.chunks(letters.len()).all(|part| letters.starts_with(part)));
    proxy.expect_clean_exit();
}
