//! An event stream that its client can reopen ends on an event boundary; other event streams run to their end.

use crate::common;

use std::time::{Duration, Instant};

use common::http::End;
use common::process::{Lameduck, Node};

#[test]
fn an_event_stream_ends_after_a_whole_event() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("GET", "/events?ms=400", &["Accept: text/event-stream"]);
    let head = client.head();
    client.wait_seen("id: 1\n");

    proxy.terminate();
    let answer = client.body("GET", head);
    assert_eq!(answer.end, End::Whole);
    assert!(answer.text().ends_with("\n\n"), "ends within an event: {:?}", answer.text());
    client.expect_fin();
    proxy.expect_clean_exit();
}

#[test]
fn the_connection_of_an_ended_stream_takes_one_more_request() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &["--stream-spread", "0s"]);
    let (mut client, mut running) = (proxy.client(), proxy.client());
    running.get("/slow?ms=4000");
    client.request("GET", "/events?ms=400", &["Accept: text/event-stream"]);
    let head = client.head();
    client.wait_seen("id: 1\n");

    proxy.terminate();
    assert_eq!(client.body("GET", head).end, End::Whole);
    // The response had no `Connection: close`, so a client's pool may send the next request at once.
    client.get("/");
    let next = client.answer();
    assert!(next.head.status == 200 && next.head.has("connection", "close"), "{:?}", next.head);
    assert_eq!(running.answer().head.status, 200);
    proxy.expect_clean_exit();
}

#[test]
fn streams_also_end_before_a_deadline_that_is_brought_forward() {
    let app = Node::slow();
    let mut proxy = Lameduck::proxy(app.addr, &["--stream-spread", "1h"]);
    let streams: Vec<_> = (0..5)
        .map(|_| {
            let mut client = proxy.client();
            client.request("GET", "/events?ms=20", &["Accept: text/event-stream"]);
            let head = client.head();
            (client, head)
        })
        .collect();
    let patient = proxy.command(&["drain"]);
    proxy.wait_phase("draining");

    let hurried = proxy.command_output(&["drain", "--timeout", "2s"]);
    assert!(hurried.status.success(), "{hurried:?}");
    for (mut client, head) in streams {
        assert_eq!(client.body("GET", head).end, End::Whole);
    }
    drop(patient);
    proxy.terminate();
    proxy.expect_clean_exit();
}

#[test]
fn a_half_sent_event_is_left_out_or_finished() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("GET", "/events", &["Accept: text/event-stream"]);
    let head = client.head();
    client.wait_seen("whole\n\n");

    proxy.terminate();
    proxy.wait_phase("draining");
    app.release();
    let answer = client.body("GET", head);
    assert_eq!(answer.end, End::Whole);
    let whole = ["id: 1\ndata: whole\n\n", "id: 1\ndata: whole\n\nid: 2\ndata: half\n\n"];
    assert!(whole.contains(&answer.text().as_str()), "half an event: {:?}", answer.text());
    client.expect_fin();
    proxy.expect_clean_exit();
}

#[test]
fn an_event_stream_that_comes_to_no_boundary_is_cut() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--stream-spread", "0s", "--grace", "120s"]);
    let mut client = proxy.client();
    client.request("GET", "/events", &["Accept: text/event-stream"]);
    let head = client.head();
    client.wait_seen("id: 2");

    let begun = Instant::now();
    proxy.terminate();
    assert_eq!(client.body("GET", head).end, End::CutByRst);
    assert!(begun.elapsed() >= Duration::from_secs(10), "cut before its ten seconds: {:?}", begun.elapsed());
    assert_eq!(proxy.process.wait_exit(), 3, "the verdict says that something was cut");
}

#[test]
fn an_event_stream_that_answers_a_post_runs_to_its_end() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.request("POST", "/events", &["Accept: text/event-stream", "Content-Length: 0"]);
    app.wait_active(1);

    proxy.terminate();
    assert_eq!(proxy.wait_phase("draining")["in_flight"], 1);
    app.release();
    let answer = client.answer();
    assert_eq!(answer.end, End::Whole);
    assert_eq!(answer.text(), "id: 1\ndata: whole\n\nid: 2\ndata: half\n\n");
    proxy.expect_clean_exit();
}
