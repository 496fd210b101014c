//! An app that never listens causes a clear error and an exit code, never a silent wait.

use crate::common;

use common::port::Port;
use common::process::Lameduck;
use common::wait_for;

#[test]
fn an_app_that_never_listens_is_a_clear_error() {
    let deaf = ["node", "-e", "setTimeout(() => {}, 60_000)"];
    let (code, output) = Lameduck::run_to_its_end(&["--start-timeout", "700ms"], &deaf);
    assert_ne!(code, 0, "{output}");
    assert!(output.contains("listen") && output.contains("700ms"), "{output}");
}

#[test]
fn an_app_that_ends_before_it_listens_is_a_clear_error_with_its_code() {
    let (code, output) = Lameduck::run_to_its_end(&[], &["node", "-e", "process.exit(3)"]);
    assert_eq!(code, 3, "{output}");
    assert!(output.contains("listen"), "{output}");
}

#[test]
fn an_app_that_cannot_be_started_is_a_clear_error() {
    let (code, output) = Lameduck::run_to_its_end(&[], &["no-such-program-anywhere"]);
    assert_eq!(code, 127, "{output}");
    assert!(output.contains("no-such-program-anywhere"), "{output}");
}

#[test]
fn behind_a_proxy_requests_are_answered_503_after_the_wait_and_readiness_says_why() {
    let nobody = Port::reserve();
    let proxy = Lameduck::proxy(nobody.addr, &["--upstream-wait", "500ms"]);
    let ready = wait_for("not ready", || Some(proxy.ready()).filter(|ready| ready.head.status == 503));
    assert!(!ready.text().trim().is_empty());
    let mut client = proxy.client();
    client.get("/");
    assert_eq!(client.answer().head.status, 503);
}
