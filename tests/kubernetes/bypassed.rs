//! A statically linked program can't be captured: it works as without lameduck, and its owner is told.

use std::thread::sleep;

use super::WARM;
use super::cluster::{Namespace, engine};
use super::deploy::inject;
use super::images::image;
use super::recipes;
use super::runtimes::{PLAIN, app};

#[test]
#[ignore = "needs a cluster"]
fn a_static_program_is_bypassed_told_and_loses_no_more_than_without_lameduck() {
    let Some(ns) = Namespace::new("bypassed") else { return };
    let Some(parts) = recipes::go() else { return eprintln!("LEFT OUT: Go can't build the program") };
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    image(&engine().expect("an engine"), "static-go:1", &parts);
    let app = |name| app(name, "static-go:1", &["static-go"], &[], 8080);
    ns.apply(&inject(&app("bypassed")));
    ns.apply(&app("without"));
    ns.rolled_out();

    let is_ours = |name: &String| name.starts_with("bypassed");
    let pod = ns.living().into_iter().find(is_ours).expect("a pod");
    let status = ns.kubectl(&["exec", &pod, "-c", "lameduck", "--", "/lameduck", "status"]);
    assert!(status.contains("bypassed     [::]:8080: the app listens there itself"), "{status}");
    let metrics = format!("/api/v1/namespaces/bypassed/pods/{pod}:4881/proxy/metrics");
    let metrics = ns.kubectl(&["get", "--raw", &metrics]);
    assert!(metrics.contains("lameduck_port_bypassed{port=\"8080\",reason=\"not-moved\"} 1"), "{metrics}");
    ns.pods.wait("a log line about it", |pods| {
        pods[&pod].log.iter().any(|line| line["reason"] == "not-moved" && line["level"] == "WARN")
    });

    let load = |name| ns.load(name, &["--requests", "1000", "--kinds", PLAIN]);
    let loads = [load("bypassed"), load("without")];
    sleep(WARM);
    for _ in 0..2 {
        ns.restart(&["bypassed", "without"]);
    }
    ns.pods.wait_gone(8);
    let [bypassed, without] =
        loads.map(|load| load.finish().0["lost"].as_u64().expect("a number of lost requests"));
    assert!(bypassed <= without, "{bypassed} lost, {without} without lameduck");
}
