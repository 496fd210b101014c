//! Idle kept-alive connections close last and in order, so that no client's pool sees a reset.

use crate::common;

use common::MOMENT;
use common::process::{Lameduck, Node};

#[test]
fn idle_connections_stay_open_while_a_request_runs() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut idle: Vec<_> = (0..3).map(|_| proxy.client()).collect();
    for client in &mut idle {
        client.get("/");
        let answer = client.answer();
        assert!(answer.head.status == 200 && !answer.head.has("connection", "close"), "{:?}", answer.head);
    }
    let mut busy = proxy.client();
    busy.get("/wait");
    app.wait_active(1);

    proxy.terminate();
    proxy.wait_phase("draining");
    assert!(idle.iter_mut().all(|client| client.is_quiet_for(MOMENT)), "an idle connection was closed early");

    // A further request on a kept-alive connection is served, and the connection closes after it.
    let mut used = idle.remove(0);
    used.get("/");
    let answer = used.answer();
    assert!(answer.head.status == 200 && answer.head.has("connection", "close"), "{:?}", answer.head);
    used.expect_fin();

    app.release();
    assert_eq!(busy.answer().text(), "released\n");
    idle.iter_mut().for_each(|client| client.expect_fin());
    proxy.expect_clean_exit();
}
