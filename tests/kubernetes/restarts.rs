//! The app alone restarts or crashes: the pod stays, and clients lose only what can't be saved.

use std::thread::sleep;

use super::WARM;
use super::cluster::{Namespace, inside};
use super::deploy::By;

// While one of its containers is not running, the kubelet reports a pod as not ready: new connections go to the other
// pods, or are refused if there are none. Requests that this pod already has are held.

#[test]
#[ignore = "needs a cluster"]
fn a_liveness_restart_lets_finish_what_ends_within_its_grace() {
    let Some(ns) = Namespace::new("liveness-restart") else { return };
    ns.deploy(
        By::Inject,
        &[
            // The probe fails once the test creates the file, and deletes it, so the restarted app is healthy.
            (
                "          readinessProbe:",
                r#"          livenessProbe:
            exec: {command: [node, -e, "try { fs.unlinkSync('/probe/sick'); process.exit(1) } catch {}"]}
            periodSeconds: 2
            timeoutSeconds: 10
            failureThreshold: 1
          volumeMounts: [{name: probe, mountPath: /probe}]
          readinessProbe:"#,
            ),
            (
                "      securityContext: {runAsNonRoot",
                "      volumes: [{name: probe, emptyDir: {}}]\n      securityContext: {runAsNonRoot",
            ),
            // Longer than the longest request, which takes 20 s.
            ("{lameduck.dev/grace: 75s}", "{lameduck.dev/grace: 75s, lameduck.dev/restart-grace: 25s}"),
        ],
    );
    let pod = ns.living().remove(0);
    let kinds = "keep-alive:20,new:8,slow:10,long:6,stream:6,upload:4,download:2,idle:6,events:12";
    let load = ns.load("slow", &["--requests", "3000", "--kinds", kinds]);
    sleep(WARM);
    let sicken = "fs.writeFileSync('/probe/sick', '')";
    ns.kubectl(&["exec", &pod, "-c", "app", "--", "node", "-e", sicken]);
    ns.pods.wait("the app's restart", |pods| pods[&pod].restarts.get("app") == Some(&1));
    sleep(WARM);
    let outcome = load.finish();
    outcome.expect_nothing_lost(3000);
    let seen = ns.pods.all().remove(&pod).expect("the pod");
    assert_eq!(seen.restarts["lameduck"], 0, "the sidecar restarted too");
    assert!(seen.line("the app may stop").is_some() && seen.line("drain began").is_none(), "{:#?}", seen.log);
}

#[test]
#[ignore = "needs a cluster"]
fn a_crash_of_the_app_costs_only_what_it_was_running() {
    let Some(ns) = Namespace::new("crash") else { return };
    ns.deploy(By::Inject, &[]);
    let pod = ns.living().remove(0);
    let kinds = "keep-alive:20,new:8,slow:10,idle:6";
    let load = ns.load("slow", &["--requests", "3000", "--kinds", kinds]);
    sleep(WARM);
    let crash = "fetch('http://127.0.0.1:3000/crash').catch(() => {})";
    let _ = inside("kubectl")
        .args(["-n", ns.name, "exec", &pod, "-c", "app", "--", "node", "-e", crash])
        .output();
    ns.pods.wait("the app's restart", |pods| pods[&pod].restarts.get("app") == Some(&1));
    sleep(WARM);
    let outcome = load.finish().0;
    // At most one slow request per client, and the few short ones that were running.
    let lost = outcome["lost"].as_u64().expect("a count");
    assert!(lost <= 20, "{:#}", outcome["samples"]);
    assert!(outcome["losses"].as_object().expect("losses").keys().all(|kind| kind == "5xx"), "{outcome:#}");
    assert_eq!(ns.pods.all()[&pod].restarts["lameduck"], 0, "the sidecar restarted too");
}
