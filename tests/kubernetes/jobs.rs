//! A pod that should complete does so with the sidecar in it.

use super::cluster::Namespace;
use super::deploy::inject;

const JOBS: &str = include_str!("jobs.yaml");

#[test]
#[ignore = "needs a cluster"]
fn a_job_and_a_cron_job_with_the_sidecar_complete() {
    let Some(ns) = Namespace::new("jobs") else { return };
    ns.apply(&inject(JOBS));
    ns.kubectl(&["create", "job", "now", "--from=cronjob/nightly"]);
    for job in ["job/report", "job/now"] {
        ns.kubectl(&["wait", "--for=condition=complete", job, "--timeout=60s"]);
    }
    ns.pods.wait("both pods' success", |pods| {
        pods.len() == 2
            && pods.values().all(|pod| pod.phase == "Succeeded" && pod.restarts.contains_key("lameduck"))
    });
}
