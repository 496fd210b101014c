//! Services of IPv6 lose nothing either, whether the app has one socket for both families or one for each.

use std::thread::sleep;

use super::WARM;
use super::cluster::{Namespace, engine, kubectl_with};
use super::deploy::inject;
use super::images::image;
use super::pods::GONE_WITHIN;
use super::recipes;
use super::runtimes::{PLAIN, STATIC, app};

/// Whether the cluster has addresses of IPv6 for Services; prints if it has none.
fn has_ipv6(ns: &Namespace) -> bool {
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: asked}\nspec: {ipFamilies: [IPv6], ports: [{port: 1}]}\n";
    let asked = kubectl_with(service, &["-n", ns.name, "apply", "--dry-run=server", "-f", "-"]);
    if !asked.status.success() {
        eprintln!("LEFT OUT: this cluster has no IPv6: {}", String::from_utf8_lossy(&asked.stderr));
    }
    asked.status.success()
}

#[test]
#[ignore = "needs a cluster"]
fn rolling_restarts_of_captured_pods_lose_nothing_by_ipv6() {
    let Some(ns) = Namespace::new("ipv6") else { return };
    if !has_ipv6(&ns) {
        return;
    }
    let parts = recipes::node_apps().into_iter().chain(recipes::nginx()).flatten().collect::<Vec<_>>();
    let apps = format!("{}:/apps", recipes::apps().display());
    let parts: Vec<&str> = ["--file", &apps].into_iter().chain(parts.iter().map(String::as_str)).collect();
    image(&engine().expect("an engine"), "ipv6:1", &parts);
    let node = app("node", "ipv6:1", &["node /slow/server.js"], &[], 3000);
    let nginx = app("nginx", "ipv6:1", &["nginx -c /apps/nginx.conf"], &[], 80);
    ns.apply(&inject(&(node + &nginx).replace("  ports: [{", "  ipFamilies: [IPv6]\n  ports: [{")));
    ns.rolled_out();
    let loads = [("node", PLAIN), ("nginx", STATIC)]
        .map(|(name, kinds)| ns.load(name, &["--requests", "500", "--kinds", kinds]));
    sleep(WARM);
    ns.restart(&["node", "nginx"]);
    ns.pods.wait_gone(4);
    for load in loads {
        load.finish().expect_nothing_lost(500);
    }
    ns.pods.expect_clean_drains(4, GONE_WITHIN);
}
