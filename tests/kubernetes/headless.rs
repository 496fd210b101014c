//! A headless Service: its clients know the pods' addresses, and go on using those that they have looked up.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::WARM;
use super::cluster::Namespace;
use super::deploy::{Changes, inject, plain};
use super::images::scratch;
use super::load::Load;
use super::pods::GONE_WITHIN;

/// How long clients keep what they have looked up: the default of Kubernetes' DNS.
const TTL: Duration = Duration::from_secs(5);

const HEADLESS: Changes<'static> = &[
    ("{lameduck.dev/grace: 75s}", "{lameduck.dev/grace: 75s, lameduck.dev/capture: loopback}"),
    ("          ports:\n            - name: http\n              containerPort: 3000\n", ""),
    ("httpGet: {path: /, port: http}", "httpGet: {path: /, port: 3000}"),
    ("spec:\n  selector: {app: slow}", "spec:\n  clusterIP: None\n  selector: {app: slow}"),
];

/// Writes the addresses of the ready pods to this file.
fn look_up(ns: &Namespace, file: &Path) {
    let slices =
        ns.kubectl(&["get", "endpointslices", "-l", "kubernetes.io/service-name=slow", "-o", "json"]);
    let slices: Value = serde_json::from_str(&slices).expect("JSON");
    let endpoints =
        slices["items"].as_array().into_iter().flatten().flat_map(|slice| slice["endpoints"].as_array());
    let ready = endpoints.flatten().filter(|endpoint| endpoint["conditions"]["ready"] == true);
    let lines = ready.filter_map(|endpoint| endpoint["addresses"][0].as_str());
    let lines: String = lines.map(|address| format!("{address}:3000\n")).collect();
    let new = file.with_extension("new");
    fs::write(&new, lines).and_then(|()| fs::rename(&new, file)).expect("the file of addresses");
}

#[test]
#[ignore = "needs a cluster"]
fn clients_of_a_headless_service_lose_nothing_by_addresses_that_are_old() {
    let Some(ns) = Namespace::new("headless") else { return };
    ns.apply(&inject(&plain(HEADLESS)));
    ns.rolled_out();
    let file = scratch("headless.addresses");
    look_up(&ns, &file);
    let addresses = format!("--addr-file={}", file.display());
    let over = AtomicBool::new(false);
    scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let began = Instant::now();
                look_up(&ns, &file);
                sleep(TTL.saturating_sub(began.elapsed()));
            }
        });
        let load = Load::start("headless/slow", &[&addresses, "--requests", "2000"]);
        sleep(WARM);
        ns.restart(&["slow"]);
        ns.pods.wait_gone(3);
        let outcome = load.finish();
        over.store(true, Ordering::Relaxed);
        outcome.expect_nothing_lost(2000);
    });
    ns.pods.expect_clean_drains(3, GONE_WITHIN);
}
