//! A slow reader gets its last byte, although the proxy and the app are gone by then.

mod common;

use common::http::{Client, End};
use common::process::{Lameduck, Node};

#[test]
fn a_slow_reader_gets_its_last_byte_after_the_proxy_has_gone() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = Client::connect_narrow(proxy.listen);
    // It fits into the proxy's socket buffer, but not into the reader's.
    let length = 400_000;
    client.get(&format!("/download?bytes={length}"));
    let head = client.head();

    proxy.terminate();
    proxy.expect_clean_exit();
    drop(app);
    let answer = client.body("GET", head);
    assert_eq!((answer.body.len(), answer.end), (length, End::Whole));
    client.expect_fin();
}

#[test]
fn request_bytes_that_nobody_read_do_not_reset_the_answer() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);
    proxy.terminate();
    proxy.wait_phase("draining");
    // The first answer will say `Connection: close`, so this one is never answered.
    client.get("/");
    app.release();
    let answer = client.answer();
    assert_eq!((answer.text().as_str(), answer.end), ("released\n", End::Whole));
    assert!(answer.head.has("connection", "close"), "{:?}", answer.head);
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
