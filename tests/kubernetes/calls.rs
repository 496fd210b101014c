//! Services that call each other, with an ingress in front of them, lose nothing while both sides roll.

use std::thread::sleep;

use super::WARM;
use super::cluster::Namespace;
use super::deploy::{By, inject};
use super::pods::GONE_WITHIN;

/// A plain Node service that calls the slow app.
const FRONT: &str = include_str!("front.yaml");
/// nginx as an ingress: kept-alive connections to one Service, otherwise nginx's defaults.
const NGINX: &str = include_str!("nginx.yaml");

/// Many event streams: when one ends, its connection returns to a pool that is busy with other requests.
const KINDS: &str = "keep-alive:20,new:8,slow:10,long:6,stream:6,upload:4,download:2,idle:6,events:12";

#[test]
#[ignore = "needs a cluster"]
fn a_service_that_calls_another_loses_nothing_while_both_roll() {
    let Some(ns) = Namespace::new("calls") else { return };
    ns.deploy(By::Inject, &[("replicas: 3", "replicas: 2")]);
    ns.apply(&inject(&FRONT.replace("BACKEND_ADDRESS", &ns.address("slow"))));
    ns.rolled_out();
    let load = ns.load("front", &["--requests", "3000", "--kinds", KINDS]);
    sleep(WARM);
    ns.restart(&["slow", "front"]);
    ns.pods.wait_gone(4);
    load.finish().expect_nothing_lost(3000);
    ns.pods.expect_clean_drains(4, GONE_WITHIN);
}

#[test]
#[ignore = "needs a cluster"]
fn an_ingress_with_kept_connections_loses_nothing_while_both_services_behind_it_roll() {
    let Some(ns) = Namespace::new("ingress") else { return };
    ns.deploy(By::Inject, &[("replicas: 3", "replicas: 2")]);
    ns.apply(&inject(&FRONT.replace("BACKEND_ADDRESS", &ns.address("slow"))));
    ns.apply(&NGINX.replace("UPSTREAM_ADDRESS", &ns.address("front")));
    ns.rolled_out();
    let load = ns.load("nginx", &["--requests", "3000", "--kinds", KINDS]);
    sleep(WARM);
    ns.restart(&["slow", "front"]);
    ns.pods.wait_gone(4);
    load.finish().expect_nothing_lost(3000);
    ns.pods.expect_clean_drains(4, GONE_WITHIN);
}
