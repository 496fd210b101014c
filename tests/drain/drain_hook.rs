//! The blocking preStop hook: it returns when the drain is over, to every caller with the token.

use crate::common;

use common::MOMENT;
use common::http::Answer;
use common::process::{Lameduck, Node, TOKEN};
use serde_json::Value;

fn verdict(answer: &Answer) -> Value {
    assert_eq!(answer.head.status, 200, "{}", answer.text());
    let body: Value = serde_json::from_slice(&answer.body).expect("JSON");
    body["verdict"].clone()
}

/// Calls the hook at these targets while a request runs: each must return only after that request.
fn hook_waits(targets: &[&str]) {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &[]);
    let mut client = proxy.client();
    client.get("/wait");
    app.wait_active(1);

    let mut hooks: Vec<_> = targets.iter().map(|target| proxy.hook(target, Some(TOKEN))).collect();
    proxy.wait_phase("draining");
    assert!(hooks.iter_mut().all(|hook| hook.is_quiet_for(MOMENT)), "the hook returned while a request ran");

    app.release();
    assert_eq!(client.answer().text(), "released\n");
    for hook in &mut hooks {
        assert_eq!(verdict(&hook.answer()), "clean");
    }
    proxy.terminate();
    proxy.expect_clean_exit();
}

#[test]
fn the_hook_returns_when_the_last_request_is_done() {
    hook_waits(&["/drain"]);
}

#[test]
fn the_hook_called_twice_waits_for_the_same_end() {
    hook_waits(&["/drain", "/drain"]);
}

#[test]
fn app_and_sidecar_hook_together_mean_that_the_pod_goes() {
    hook_waits(&["/drain?hook=app", "/drain?hook=sidecar"]);
}

#[test]
fn the_hook_with_two_slashes_is_the_hook() {
    hook_waits(&["//drain", "///drain?hook="]);
}

#[test]
fn the_hook_without_the_right_token_is_refused_and_nothing_drains() {
    let app = Node::slow();
    let proxy = Lameduck::proxy(app.addr, &[]);
    for token in [None, Some(""), Some("wrong"), Some(&TOKEN[1..]), Some("a-test-token-and-more")] {
        assert_eq!(proxy.hook("/drain", token).answer().head.status, 403, "{token:?}");
        assert_eq!(proxy.hook("//drain", token).answer().head.status, 403, "{token:?}");
    }
    assert_eq!(proxy.status().expect("still there")["phase"], "serving");
    let mut client = proxy.client();
    client.get("/");
    let answer = client.answer();
    assert!(answer.head.status == 200 && !answer.head.has("connection", "close"), "{:?}", answer.head);
}
