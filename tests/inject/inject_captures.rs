//! Capture: the app keeps its ports, names and Services, and moves by the shim.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use std::fs;

use super::inject_hooks::restricted;
use super::inject_keeps_every_byte::{compare, done, golden, lose_nothing, task, told};
use crate::common;

use common::pod::{annotated, app, by, has, patched, placed, pod, settings, sidecar, why};
use lameduck::inject::manifest::{Outcome, Task};
use lameduck::inject::{Services, patch, restore};
use serde_json::{Value, json};

const SYSCTL: &str = "net.ipv4.ip_unprivileged_port_start";

/// A pod whose ports are captured.
fn captured(change: impl Fn(&mut Value)) -> Value {
    pod(|pod| {
        annotated("capture", "loopback")(pod);
        change(pod);
    })
}

/// Value of a variable of the first container.
fn variable(pod: &mut Value, name: &str) -> Option<String> {
    let vars = app(pod)["env"].as_array()?;
    vars.iter().find(|var| var["name"] == name)?["value"].as_str().map(str::to_owned)
}

#[test]
fn every_style_is_captured_and_taken_out_without_a_trace() {
    let before = fs::read_to_string(golden("captured.before.yaml")).unwrap();
    let (after, report) = done(&before, &task());
    compare("captured.yaml", &after);
    for line in &report {
        let service = line.what.starts_with("service/");
        let expected = if service { Outcome::Unchanged } else { Outcome::Changed };
        assert_eq!(line.outcome, expected, "{}", told(&report));
    }
    assert_eq!(done(&after, &task()).0, after, "twice");
    assert_eq!(done(&after, &Task::Uninject).0, before, "uninject");
}

#[test]
fn arbitrary_yaml_is_captured_and_loses_nothing() {
    lose_nothing(&[fs::read_to_string(golden("captured.before.yaml")).unwrap()]);
}

#[test]
fn ports_and_the_variable_port_stay_and_the_sidecar_captures() {
    let before = captured(|pod| {
        app(pod)["env"] = json!([{"name": "PORT", "value": "3000"}]);
        app(pod)["ports"] = json!([{"name": "http", "containerPort": 3000}, {"containerPort": 9100}]);
        annotated("ports", "3000=http 9100=tcp,7000=skip")(pod);
    });
    for services in [Services::Seen, Services::Unseen] {
        let mut done = by(&before, services);
        assert_eq!(app(&mut done.pod)["ports"], before["spec"]["containers"][0]["ports"]);
        assert_eq!(variable(&mut done.pod, "PORT").as_deref(), Some("3000"));
        for arg in ["--capture", "--capture-as=3000=http", "--capture-as=9100=tcp", "--capture-as=7000=skip"]
        {
            assert!(has(&done, arg), "{arg}");
        }
        assert!(has(&done, "--share-dir=/run/lameduck"));
        assert!(!sidecar(&done)["args"].to_string().contains("--listen"), "{}", sidecar(&done)["args"]);
        assert!(done.plan.is_none() && done.warnings.is_empty(), "{:?}", done.warnings);
    }
}

#[test]
fn every_container_but_a_meshs_gets_the_shim_and_the_hook() {
    let before = captured(|pod| {
        let more = json!([{"name": "two", "image": "y"}, {"name": "linkerd-proxy", "image": "z"}]);
        pod["spec"]["containers"].as_array_mut().unwrap().extend(more.as_array().unwrap().clone());
    });
    let done = patched(&before);
    for n in 0..2 {
        let container = &done.pod["spec"]["containers"][n];
        assert_eq!(container["lifecycle"]["preStop"]["httpGet"]["path"], "/drain?hook=app");
        let mount = json!([{"name": "lameduck", "mountPath": "/run/lameduck", "readOnly": true}]);
        assert_eq!(container["volumeMounts"], mount);
        let env = json!([
            {"name": "LD_PRELOAD", "value": "/run/lameduck/shim.so"},
            {"name": "LAMEDUCK_NODE_PRELOAD", "value": "/run/lameduck/preload.js"},
        ]);
        assert_eq!(container["env"], env);
    }
    assert_eq!(done.pod["spec"]["containers"][2], before["spec"]["containers"][2]);
    let mut one = before;
    annotated("container", "two")(&mut one);
    assert_eq!(app(&mut patched(&one).pod)["env"], Value::Null, "another container is chosen");
}

#[test]
fn a_preload_of_the_pod_stays_before_the_shim() {
    let with = |entry: Value| captured(move |pod| app(pod)["env"] = json!([entry.clone()]));
    for (was, now) in [
        (json!("/a.so"), "/a.so:/run/lameduck/shim.so"),
        (json!("/a.so /b.so"), "/a.so /b.so:/run/lameduck/shim.so"),
        (json!(""), "/run/lameduck/shim.so"),
        (json!(null), "/run/lameduck/shim.so"),
        (json!("/run/lameduck/shim.so"), "/run/lameduck/shim.so"),
    ] {
        let mut done = patched(&with(json!({"name": "LD_PRELOAD", "value": was})));
        assert_eq!(variable(&mut done.pod, "LD_PRELOAD").as_deref(), Some(now));
    }
    // Its owner edits what was injected.
    let mut done = patched(&captured(|_| {})).pod;
    app(&mut done)["env"][0]["value"] = json!("/c.so:/run/lameduck/shim.so");
    let again = patch(&done, &settings(Services::Seen)).unwrap();
    let back = Value::Object(restore::restored(&again.pod).unwrap());
    assert_eq!(back["spec"]["containers"][0]["env"], json!([{"name": "LD_PRELOAD", "value": "/c.so"}]));
}

#[test]
fn a_container_that_cannot_load_the_shim_is_reported_and_keeps_its_probes() {
    let elsewhere =
        json!({"name": "LD_PRELOAD", "valueFrom": {"configMapKeyRef": {"name": "x", "key": "y"}}});
    let odd = json!({"name": "odd", "image": "y", "env": [elsewhere], "readinessProbe": {"tcpSocket": {"port": 1}}});
    let before = captured(|pod| pod["spec"]["containers"].as_array_mut().unwrap().push(odd.clone()));
    let done = patched(&before);
    let two = &done.pod["spec"]["containers"][1];
    assert_eq!((&two["env"], &two["readinessProbe"]), (&odd["env"], &odd["readinessProbe"]));
    assert_eq!(two["lifecycle"]["preStop"]["httpGet"]["path"], "/drain?hook=app");
    assert_eq!(two.get("volumeMounts"), None);
    assert_eq!(
        done.warnings,
        ["container odd is not captured: its LD_PRELOAD comes from elsewhere: write it as a value"]
    );
    let alone = captured(|pod| app(pod)["env"] = odd["env"].clone());
    assert!(why(&alone).contains("container app can't be captured: its LD_PRELOAD comes from elsewhere"));
}

#[test]
fn pid1_says_what_the_shim_does_besides() {
    let env = |value: &str| {
        let mut done = patched(&captured(annotated("pid1", value)));
        let vars = app(&mut done.pod)["env"].as_array().unwrap().clone();
        (vars[1..].to_vec(), done.pod["spec"]["shareProcessNamespace"].clone())
    };
    assert_eq!(env("leave"), (vec![json!({"name": "LAMEDUCK_PID1", "value": "leave"})], Value::Null));
    assert_eq!(env("share"), (vec![], json!(true)));
}

/// The kubelet's own connection would always be accepted, by the proxy.
#[test]
fn a_tcp_socket_probe_asks_the_app_and_no_other_probe_changes() {
    let tcp = |port: Value| json!({"tcpSocket": {"port": port}, "periodSeconds": 7, "terminationGracePeriodSeconds": 9});
    let probe = |probe: Value, ports: &str| {
        let mut before = captured(|pod| app(pod)["readinessProbe"] = probe.clone());
        annotated("ports", ports)(&mut before);
        app(&mut patched(&before).pod)["readinessProbe"].clone()
    };
    for port in [json!("http"), json!(3000), json!("3000")] {
        let get = json!({"path": "/app-port/3000", "port": 4881});
        let now = json!({"httpGet": get, "periodSeconds": 7, "terminationGracePeriodSeconds": 9});
        assert_eq!(probe(tcp(port), "3000=http"), now);
    }
    for same in [
        tcp(json!("none")),
        json!({"tcpSocket": {"port": 3000, "host": "10.0.0.1"}}),
        json!({"httpGet": {"path": "/", "port": "http"}}),
        json!({"grpc": {"port": 3000}}),
        json!({"exec": {"command": ["true"]}}),
    ] {
        assert_eq!(probe(same.clone(), "3000=http"), same);
    }
    assert_eq!(probe(tcp(json!(3000)), "3000=skip"), tcp(json!(3000)), "the sidecar knows nothing of it");
}

#[test]
fn each_containers_own_hook_is_kept() {
    let before = captured(|pod| {
        app(pod)["lifecycle"] = json!({"preStop": {"httpGet": {"path": "/bye", "port": "http"}}});
        let more = json!([
            {"name": "two", "image": "y", "lifecycle": {"preStop": {"exec": {"command": ["/bye"]}}}},
            {"name": "three", "image": "y", "lifecycle": {"preStop": {"sleep": {"seconds": 9}}}},
        ]);
        pod["spec"]["containers"].as_array_mut().unwrap().extend(more.as_array().unwrap().clone());
    });
    let done = patched(&before);
    // The proxy itself listens on the other addresses.
    assert!(has(&done, "--after-drain=http://127.77.0.1:3000/bye"));
    assert!(has(&done, "--reserve=15s") && has(&done, "--lame-duck=9s"));
    let hook = |n: usize| &done.pod["spec"]["containers"][n]["lifecycle"]["preStop"];
    assert_eq!(hook(1)["exec"]["command"][0], "/run/lameduck/lameduck");
    assert_eq!(
        (&hook(0)["httpGet"]["path"], &hook(2)["httpGet"]["path"]),
        (&json!("/drain?hook=app"), &json!("/drain?hook=app"))
    );
    let mut two = before.clone();
    two["spec"]["containers"][1]["lifecycle"] = before["spec"]["containers"][0]["lifecycle"].clone();
    two["spec"]["containers"][1]["ports"] = json!([{"name": "http", "containerPort": 81}]);
    assert!(why(&two).contains("several of its containers have a preStop httpGet"));
}

#[test]
fn ports_below_1024_are_allowed_to_the_proxy_and_the_node_may_be_removed() {
    let sysctl = json!([{"name": SYSCTL, "value": "0"}]);
    let volumes = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes";
    let done = patched(&captured(|_| {}));
    assert_eq!(done.pod["spec"]["securityContext"], json!({"sysctls": sysctl}));
    assert_eq!(done.pod["metadata"]["annotations"][volumes], "lameduck");
    for empty in
        [json!(null), json!({}), json!({"sysctls": null}), json!({"sysctls": []}), json!({"fsGroup": 1})]
    {
        let done = patched(&captured(|pod| pod["spec"]["securityContext"] = empty.clone()));
        assert_eq!(done.pod["spec"]["securityContext"]["sysctls"], sysctl, "{empty}");
    }
    let own = json!({"sysctls": [{"name": SYSCTL, "value": "80"}]});
    let done = patched(&captured(|pod| {
        pod["spec"]["securityContext"] = own.clone();
        pod["metadata"]["annotations"][volumes] = json!("cache");
    }));
    assert_eq!(done.pod["spec"]["securityContext"], own, "its owner's stays");
    assert_eq!(done.pod["metadata"]["annotations"][volumes], "cache,lameduck");
}

#[test]
fn a_captured_pod_still_meets_the_restricted_standard() {
    let before = captured(|pod| {
        pod["spec"]["securityContext"] =
            json!({"runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}});
        app(pod)["securityContext"] =
            json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
        app(pod)["readinessProbe"] = json!({"tcpSocket": {"port": 80}});
    });
    assert_eq!(restricted(&before), Ok(()), "the pod must meet the standard before");
    assert_eq!(restricted(&patched(&before).pod), Ok(()));
}

#[test]
fn what_cannot_be_captured_is_skipped_and_says_what_to_do() {
    type Change<'a> = &'a dyn Fn(&mut Value);
    let cases: [(Change, &str); 10] = [
        (&|pod| app(pod)["name"] = json!("istio-proxy"), "name it by lameduck.dev/container"),
        (&|pod| pod["spec"]["hostNetwork"] = json!(true), "start the app by `lameduck run` instead"),
        (&|pod| pod["spec"]["os"] = json!({"name": "windows"}), "Windows"),
        (&annotated("sidecar", "ordinary"), "use the native one"),
        (
            &|pod| app(pod)["command"] = json!(["/bin/lameduck", "run", "node", "x.js"]),
            "take `lameduck run` out",
        ),
        (&|pod| app(pod)["args"] = json!(["tini", "--", "lameduck", "run", "x"]), "take `lameduck run` out"),
        (&|pod| drop(app(pod).as_object_mut().unwrap().remove("image")), "has no image"),
        (&|pod| app(pod)["ports"][0]["containerPort"] = json!(4881), "port 4881"),
        (&annotated("container", "none"), "there is no 'none'"),
        (&annotated("ports", "80=udp"), "annotation lameduck.dev/ports: '80=udp'"),
    ];
    for (change, told) in cases {
        let why = why(&captured(change));
        assert!(why.contains(told), "{told}: {why}");
    }
    // A sidecar of its own that the kubelet starts before ours.
    let other = json!([{"name": "own", "image": "own:1", "restartPolicy": "Always", "ports": [{"containerPort": 4881}]}]);
    for before in [captured(|_| {}), placed(|_| {})] {
        let mut before = before;
        before["spec"]["initContainers"] = other.clone();
        assert!(why(&before).contains("port 4881"), "{}", why(&before));
        before["spec"]["initContainers"][0]["restartPolicy"] = Value::Null;
        assert!(has(&patched(&before), "--probe-listen=:4881"), "it has ended by then");
    }
    let idle = patched(&captured(annotated("app-port", "81"))).warnings;
    assert_eq!(idle, ["annotation lameduck.dev/app-port means nothing with lameduck.dev/capture: loopback"]);
    let idle = patched(&placed(annotated("ports", "3000=http"))).warnings;
    assert_eq!(idle, ["annotation lameduck.dev/ports means nothing without lameduck.dev/capture: loopback"]);
}

#[test]
fn the_old_ways_can_be_demanded() {
    let way = |way: &str, port: &str| {
        let mut pod = pod(annotated("capture", way));
        app(&mut pod)["env"] = json!([{"name": "PORT", "value": port}]);
        pod
    };
    for services in [Services::Seen, Services::Unseen] {
        let done = by(&way("port-name", "3000"), services);
        assert!(has(&done, "--listen=:4880") && has(&done, "--upstream=127.0.0.1:3000"), "{services:?}");
        let mut done = by(&way("port-env", "3000"), services);
        assert!(has(&done, "--listen=:3000") && variable(&mut done.pod, "PORT").as_deref() == Some("4883"));
    }
    // Its image may set PORT.
    assert!(has(&patched(&way("port-env", "1")), "--upstream=127.0.0.1:4883"));
    let mut unnamed = way("port-name", "3000");
    app(&mut unnamed)["ports"] = json!([{"containerPort": 3000}]);
    assert!(why(&unnamed).contains("port 3000 has no name"));
    annotated("app-port", "81")(&mut unnamed);
    assert!(why(&unnamed).contains("take app-port and app-socket away"));
}

/// A pod of an earlier version becomes a captured one. Its Service keeps the name of the port, which leads to the proxy in
/// the old pods and in the new ones.
#[test]
fn an_earlier_injection_is_brought_over() {
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}\n---\n";
    let before = service.to_owned()
        + "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n  template:\n    metadata:\n      \
           labels: {app: web}\n      annotations:\n        a: b\n    spec:\n      containers:\n      - name: web\n        \
           image: web:1\n        ports: [{name: http, containerPort: 8080}]\n        readinessProbe: {tcpSocket: {port: http}}\n";
    let way = "        lameduck.dev/capture: port-name\n";
    let old_way = before.replace("        a: b\n", &format!("        a: b\n{way}"));
    let (old, _) = done(&old_way, &task());
    assert!(old.contains("containerPort: 4880") && old.contains("targetPort: http"), "{old}");
    let (migrated, report) = done(&old.replace(way, ""), &task());
    assert_eq!(report[0].outcome, Outcome::Unchanged, "{}", told(&report));
    assert_eq!(migrated.split("---").next(), old.split("---").next(), "{migrated}");
    assert!(migrated.contains("containerPort: 8080") && !migrated.contains("4880"), "{migrated}");
    assert_eq!(done(&migrated, &task()).0, migrated, "twice");
    let pod = |text: &str| {
        let text = text.split("---\n").nth(1).unwrap();
        lameduck::inject::yaml::parse(text).unwrap().unwrap().to_json().unwrap()["spec"]["template"].clone()
    };
    let fresh = pod(&done(&before, &task()).0);
    let spec = |pod: &Value| pod["spec"].clone();
    assert_eq!(spec(&pod(&migrated)), spec(&fresh), "as if it had never been injected");
    let (without, _) = done(&migrated, &Task::Uninject);
    assert_eq!(pod(&without), pod(&before));
    assert!(without.starts_with(service), "{without}");
    // What is skipped keeps its sidecar, and is told so.
    let disabled = old.replace("labels: {app: web}", "labels: {app: web, lameduck.dev/inject: disabled}");
    let (text, report) = done(&disabled, &task());
    assert_eq!(text, disabled);
    assert!(told(&report).contains("the sidecar of an earlier injection stays"), "{}", told(&report));
    // And back.
    let (back, _) = done(&migrated.replace("        a: b\n", &format!("        a: b\n{way}")), &task());
    assert_eq!(spec(&pod(&back)), spec(&pod(&old)));
    assert_eq!(back.split("---").next(), old.split("---").next(), "{back}");
}

/// Databases and queues know their peers by their addresses, and a client's connection is never idle for long.
#[test]
fn what_is_known_to_serve_no_http_is_left_alone_unless_asked_for() {
    let ports = |ports: Value| pod(|pod| app(pod)["ports"] = ports.clone());
    for (left, told) in [
        (json!([{"containerPort": 5432}]), "it serves no HTTP (port 5432)"),
        (json!([{"name": "tcp-mysql", "containerPort": 1}]), "it serves no HTTP (tcp-mysql)"),
        // Redis Cluster: the nodes tell each other the addresses from which they were called.
        (
            json!([{"name": "client", "containerPort": 6379}, {"name": "gossip", "containerPort": 16379}]),
            "(port 16379, port 6379)",
        ),
        (json!([{"containerPort": 6379}, {"name": "http-metrics", "containerPort": 9121}]), "(port 6379)"),
        (
            json!([{"name": "client", "containerPort": 2379}, {"containerPort": 2380}]),
            "(port 2379, port 2380)",
        ),
    ] {
        let mut before = ports(left);
        let why = why(&before);
        assert!(why.contains(told) && why.contains("lameduck.dev/capture: loopback"), "{why}");
        annotated("capture", "loopback")(&mut before);
        assert!(has(&patched(&before), "--capture"));
    }
    let mut ordinary = ports(json!([{"name": "redis", "containerPort": 6379}]));
    annotated("sidecar", "ordinary")(&mut ordinary);
    assert!(why(&ordinary).contains("it serves no HTTP (redis)"), "no HTTP proxy in front of it either");
    for served in [
        json!([{"name": "http", "containerPort": 5432}]),
        json!([{"containerPort": 5672}, {"containerPort": 15672}]),
        json!([{"containerPort": 53, "protocol": "UDP"}]),
        json!([]),
    ] {
        assert!(has(&patched(&ports(served)), "--capture"));
    }
    let both = patched(&ports(json!([{"containerPort": 5672}, {"containerPort": 15672}])));
    assert!(has(&both, "--capture-as=5672=tcp"), "no waiting for its first bytes");
    let beside = |pod: &mut Value| {
        app(pod)["ports"] = json!([]);
        let database = json!({"name": "db", "image": "db:1", "ports": [{"containerPort": 5432}]});
        pod["spec"]["containers"].as_array_mut().unwrap().push(database);
    };
    assert!(why(&pod(beside)).contains("(port 5432)"));
    let chosen = pod(|pod| {
        beside(pod);
        let app = app(pod)["name"].as_str().unwrap().to_owned();
        annotated("container", &app)(pod);
    });
    assert!(has(&patched(&chosen), "--capture"), "another container is the database");
    let ruled = pod(|pod| {
        app(pod)["ports"] = json!([{"containerPort": 5432}]);
        annotated("ports", "5432=http")(pod);
    });
    assert!(has(&patched(&ruled), "--capture-as=5432=http"));
}

#[test]
fn a_service_among_the_manifests_says_what_the_ports_are() {
    let report = |service: &str, container: &str| {
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: a}}\nspec: {{selector: {{app: a}}, ports: [{{{service}}}]}}\n---\n\
             apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {{name: a}}\nspec:\n  template:\n    metadata: {{labels: {{app: a}}}}\n    \
             spec:\n      containers: [{{name: a, image: a, ports: [{container}]}}]\n"
        );
        told(&done(&text, &task()).1)
    };
    for (service, container, no_http) in [
        ("port: 80, targetPort: 5432", "", true),
        ("port: 6379, targetPort: 7000", "", true),
        ("port: 80, targetPort: main", "{name: main, containerPort: 3306}", true),
        ("port: 80, targetPort: 7000", "{name: mongodb, containerPort: 7000}", true),
        ("port: 80, appProtocol: mysql", "", true),
        ("port: 80, name: http, targetPort: 5432", "", false),
        ("port: 80, targetPort: 3000", "{containerPort: 5432}", false),
        ("port: 53, protocol: UDP", "{containerPort: 5432}", true),
        // For monitoring, and a Service whose selector Kubernetes ignores.
        ("port: 9187, name: metrics", "{containerPort: 5432}", true),
        ("port: 5432}], type: ExternalName, x: [{", "{containerPort: 3000}", false),
    ] {
        let report = report(service, container);
        assert_eq!(report.contains("serves no HTTP"), no_http, "{service} {container}: {report}");
    }
}
