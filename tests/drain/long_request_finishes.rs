//! A request that is running at SIGTERM finishes, while new connections are refused after the lame-duck phase.

use crate::common;

use common::http::{Client, End};
use common::process::{Lameduck, Node};

#[test]
fn a_long_request_finishes_while_new_connections_are_refused() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);

    proxy.terminate();
    proxy.wait_phase("draining");
    Client::wait_refused(proxy.listen);

    app.release();
    let answer = client.answer();
    assert_eq!((answer.head.status, answer.end, answer.text().as_str()), (200, End::Whole, "released\n"));
    assert!(answer.head.has("connection", "close"), "{:?}", answer.head);
    client.expect_fin();
    proxy.expect_clean_exit();
}

#[test]
fn the_lame_duck_still_serves_new_connections_and_sends_them_elsewhere() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &["--lame-duck", "2s"]);
    proxy.terminate();
    proxy.wait_phase("lame-duck");

    let mut client = proxy.client();
    client.get("/");
    let answer = client.answer();
    assert_eq!(answer.head.status, 200);
    assert!(answer.head.has("connection", "close"), "{:?}", answer.head);
    client.expect_fin();
    proxy.expect_clean_exit();
}

#[test]
fn what_waits_in_the_accept_queue_is_served_before_the_socket_closes() {
    let app = Node::slow();
    // These limit the lame-duck phase to (4s − 1s) / 3.
    let mut proxy = Lameduck::proxy(app.addr, &["--grace", "4s", "--reserve", "1s"]);
    proxy.terminate();
    proxy.wait_phase("lame-duck");
    proxy.pause();
    let mut clients: Vec<_> = (0..5).map(|_| proxy.client()).collect();
    clients.iter_mut().for_each(|client| client.get("/"));
    // A fixed time, because the lame-duck phase has to be over when the proxy continues.
    std::thread::sleep(std::time::Duration::from_millis(1200));
    proxy.unpause();

    for mut client in clients {
        assert_eq!(client.answer().head.status, 200);
        client.expect_fin();
    }
    proxy.expect_clean_exit();
}
