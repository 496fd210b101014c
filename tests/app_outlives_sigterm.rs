//! An app that lives on after its SIGTERM is told in the log, with what that usually is.

mod common;

use common::MOMENT;
use common::process::{Lameduck, Node, TOKEN};

const LIVES_ON: &str = "the app still takes connections after its SIGTERM: as PID 1";
const KILLED: &str = "the app outlived its SIGTERM until the grace was used up: as PID 1";

/// Drained as a deleted pod is; its hooks have their answer.
fn drained(app: &Node, args: &[&str]) -> Lameduck {
    let proxy = Lameduck::proxy(app.addr, &[&["--sidecar", "native"], args].concat());
    let mut hooks = ["app", "sidecar"].map(|whose| proxy.hook(&format!("/drain?hook={whose}"), Some(TOKEN)));
    for hook in &mut hooks {
        assert!(hook.answer().text().contains("clean"));
    }
    proxy
}

fn warns(proxy: &Lameduck, text: &str) -> bool {
    proxy.process.output().lines().any(|line| line.contains("WARN") && line.contains(text))
}

#[test]
fn an_app_that_does_not_hear_its_sigterm_is_told() {
    let app = Node::held();
    let mut proxy = drained(&app, &["--grace", "3s", "--reserve", "1s"]);
    proxy.process.wait_line("the warning", |line| line.contains(LIVES_ON).then_some(()));
    // The kubelet kills the app when the grace is used up; then it tells us.
    std::thread::sleep(std::time::Duration::from_secs(3));
    proxy.terminate();
    assert_eq!(proxy.process.wait_exit(), 0);
    assert!(warns(&proxy, KILLED), "{}", proxy.process.output());
}

#[test]
fn an_app_that_goes_in_time_is_none_of_anybodys_business() {
    let mut app = Node::held();
    let mut proxy = drained(&app, &["--reserve", "400ms"]);
    app.process.kill();
    std::thread::sleep(MOMENT * 2);
    proxy.terminate();
    assert_eq!(proxy.process.wait_exit(), 0);
    assert!(!warns(&proxy, LIVES_ON) && !warns(&proxy, KILLED), "{}", proxy.process.output());
}

#[test]
fn so_is_one_that_lives_on_because_nobody_told_it_to_go() {
    let app = Node::held();
    let mut proxy = Lameduck::proxy(app.addr, &["--sidecar", "native", "--reserve", "400ms"]);
    assert!(proxy.command_output(&["drain"]).status.success());
    std::thread::sleep(MOMENT * 2);
    proxy.terminate();
    proxy.process.wait_exit();
    assert!(!warns(&proxy, LIVES_ON) && !warns(&proxy, KILLED), "{}", proxy.process.output());
}
