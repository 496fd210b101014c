//! The sidecar's patch of a pod, rule by rule.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use crate::common;

use common::pod::{annotated, app, by, has, patched, placed, pod, settings, sidecar, why};
use lameduck::inject::Services;
use lameduck::inject::sidecar::token_of;
use lameduck::inject::{PatchSettings, patch, restore};
use serde_json::{Value, json};

#[test]
fn the_sidecar_is_native_probed_and_restricted() {
    let done = patched(&pod(|_| {}));
    let ours = &done.pod["spec"]["initContainers"][0];
    assert_eq!((&ours["restartPolicy"], &ours["imagePullPolicy"]), (&json!("Always"), &json!("Never")));
    assert_eq!(ours["startupProbe"]["httpGet"], json!({"path": "/livez", "port": 4881}));
    assert_eq!(ours["readinessProbe"]["httpGet"], json!({"path": "/readyz", "port": 4881}));
    assert_eq!(ours["lifecycle"]["preStop"]["httpGet"]["path"], "/drain?hook=sidecar");
    let security = &ours["securityContext"];
    assert_eq!(security["allowPrivilegeEscalation"], false);
    assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}));
    assert_eq!(
        (&security["runAsNonRoot"], &security["readOnlyRootFilesystem"]),
        (&json!(true), &json!(true))
    );
    assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(token_of(&done.pod), Some("t0ken"));
    assert!(done.warnings.is_empty(), "{:?}", done.warnings);
}

#[test]
fn the_patch_is_json_patch() {
    let before = placed(|_| {});
    let ops = serde_json::to_value(patched(&before).ops).unwrap();
    let add = |path: &str| ops.as_array().unwrap().iter().any(|op| op["op"] == "add" && op["path"] == path);
    assert!(add("/spec/initContainers") && add("/metadata/annotations/lameduck.dev~1injected"), "{ops}");
    let port = json!({"op": "replace", "path": "/spec/containers/0/ports/0/containerPort", "value": 4880});
    assert!(ops.as_array().unwrap().contains(&port), "{ops}");
}

#[test]
fn the_apps_hook_asks_the_probe_port_by_number_with_the_token() {
    let mut done = patched(&pod(annotated("probe-port", "9881")));
    let hook = json!({"httpGet": {
        "path": "/drain?hook=app", "port": 9881, "httpHeaders": [{"name": "Lameduck-Token", "value": "t0ken"}],
    }});
    assert_eq!(app(&mut done.pod)["lifecycle"]["preStop"], hook);
    assert_eq!(done.pod["metadata"]["annotations"]["config.linkerd.io/skip-inbound-ports"], "9881");
    assert!(has(&done, "--probe-listen=:9881"));
}

#[test]
fn a_preset_sleep_becomes_the_least_lame_duck() {
    for hook in [
        json!({"sleep": {"seconds": 7}}),
        json!({"exec": {"command": ["sleep", "7"]}}),
        json!({"exec": {"command": ["/bin/sh", "-c", "sleep 7s"]}}),
    ] {
        let before = pod(|pod| app(pod)["lifecycle"] = json!({"preStop": hook, "stopSignal": "SIGINT"}));
        let mut done = patched(&before);
        assert!(has(&done, "--lame-duck=7s"), "{hook}");
        assert_eq!(app(&mut done.pod)["lifecycle"]["stopSignal"], "SIGINT");
    }
}

/// Nothing calls it by a Service that would have to hear of its end first.
#[test]
fn a_pod_that_is_to_complete_has_no_lame_duck() {
    let of = |policy: &str, change: &dyn Fn(&mut Value)| {
        patched(&pod(|pod| {
            pod["spec"]["restartPolicy"] = json!(policy);
            change(pod);
        }))
    };
    for policy in ["Never", "OnFailure"] {
        assert!(has(&of(policy, &|_| {}), "--lame-duck=0s"), "{policy}");
        assert!(has(&of(policy, &annotated("lame-duck", "4s")), "--lame-duck=4s"));
        let sleeps = |pod: &mut Value| app(pod)["lifecycle"] = json!({"preStop": {"sleep": {"seconds": 3}}});
        assert!(has(&of(policy, &sleeps), "--lame-duck=3s"));
    }
    let before = pod(|pod| pod["spec"]["restartPolicy"] = json!("OnFailure"));
    let called = PatchSettings { service_ports: vec![json!({ "port": 80 })], ..settings(Services::Seen) };
    let called = patch(&before, &called).expect("a pod that a Service leads to");
    for serves in [of("Always", &|_| {}), called] {
        assert!(!sidecar(&serves)["args"].to_string().contains("lame-duck"));
    }
}

#[test]
fn grace_is_raised_and_never_lowered() {
    for (given, wish, grace) in [
        (None, None, 60),
        (None, Some("30s"), 30),
        (Some(45), None, 60),
        (Some(90), None, 90),
        (Some(45), Some("75s"), 75),
        (Some(90), Some("75s"), 90),
    ] {
        let before = pod(|pod| {
            if let Some(given) = given {
                pod["spec"]["terminationGracePeriodSeconds"] = json!(given);
            }
            if let Some(wish) = wish {
                annotated("grace", wish)(pod);
            }
        });
        let done = patched(&before);
        assert_eq!(done.pod["spec"]["terminationGracePeriodSeconds"], grace);
        assert!(has(&done, &format!("--grace={grace}s")));
    }
}

#[test]
fn a_named_port_keeps_its_name_and_probes_go_past_the_proxy() {
    let before = pod(|pod| {
        app(pod)["ports"] =
            json!([{"name": "http", "containerPort": 3000}, {"name": "metrics", "containerPort": 9100}]);
        app(pod)["livenessProbe"] = json!({"httpGet": {"port": "http"}});
        app(pod)["readinessProbe"] = json!({"tcpSocket": {"port": 3000}});
        app(pod)["startupProbe"] = json!({"httpGet": {"port": "metrics"}});
        app(pod)["lifecycle"] = json!({"postStart": {"httpGet": {"port": "http"}}});
        annotated("port", "http")(pod);
    });
    let mut done = patched(&before);
    let app = app(&mut done.pod);
    assert_eq!(app["ports"][0], json!({"name": "http", "containerPort": 4880}));
    assert_eq!(app["ports"][1]["containerPort"], 9100);
    assert_eq!(
        (&app["livenessProbe"]["httpGet"]["port"], &app["readinessProbe"]["tcpSocket"]["port"]),
        (&json!(3000), &json!(3000))
    );
    assert_eq!(app["startupProbe"]["httpGet"]["port"], "metrics");
    assert_eq!(app["lifecycle"]["postStart"]["httpGet"]["port"], 3000);
    assert!(has(&done, "--listen=:4880") && has(&done, "--upstream=127.0.0.1:3000"));
}

#[test]
fn without_a_name_the_proxy_takes_the_port_and_port_shifts() {
    let port = |value: &str| json!([{"name": "PORT", "value": value}]);
    let unnamed = |env: Value| {
        placed(move |pod| {
            app(pod)["ports"] = json!([{"containerPort": 3000}]);
            app(pod)["readinessProbe"] = json!({"tcpSocket": {"port": 3000}});
            app(pod)["env"] = env.clone();
        })
    };
    let mut done = patched(&unnamed(port("3000")));
    assert!(has(&done, "--listen=:3000") && has(&done, "--upstream=127.0.0.1:4883"));
    assert_eq!(app(&mut done.pod)["env"][0]["value"], "4883");
    assert_eq!(app(&mut done.pod)["ports"][0]["containerPort"], 3000);
    assert_eq!(app(&mut done.pod)["readinessProbe"]["tcpSocket"]["port"], 4883);
    assert!(why(&unnamed(port("3001"))).contains("port 3000 has no name"));
    let mut before = unnamed(json!([]));
    app(&mut before).as_object_mut().unwrap().remove("env");
    annotated("app-port", "8081")(&mut before);
    let mut done = patched(&before);
    assert_eq!(app(&mut done.pod)["env"][0], json!({"name": "PORT", "value": "8081"}));
    assert!(has(&done, "--upstream=127.0.0.1:8081"));
}

/// The webhook can't see whether a Service's `targetPort` is a number.
#[test]
fn the_webhook_takes_the_port_when_it_can_and_warns_when_it_cannot() {
    let with_port = placed(|pod| app(pod)["env"] = json!([{"name": "PORT", "value": "3000"}]));
    let done = by(&with_port, Services::Unseen);
    assert!(has(&done, "--listen=:3000") && done.warnings.is_empty());
    assert!(has(&patched(&with_port), "--listen=:4880"));
    let done = by(&placed(|_| {}), Services::Unseen);
    assert!(has(&done, "--listen=:4880") && done.warnings[0].contains("give it the name 'http'"));
}

#[test]
fn node_options_are_kept_and_the_preload_is_added() {
    let mut done = patched(&placed(|pod| {
        app(pod)["env"] = json!([{"name": "NODE_OPTIONS", "value": "--trace-warnings"}]);
    }));
    let options = "--trace-warnings --require /run/lameduck/preload.js";
    assert_eq!(app(&mut done.pod)["env"][0]["value"], options);
    let mount = json!({"name": "lameduck", "mountPath": "/run/lameduck", "readOnly": true});
    assert_eq!(app(&mut done.pod)["volumeMounts"], json!([mount]));
    assert!(has(&done, "--share-dir=/run/lameduck"));
    for (change, reason) in [
        (
            json!({"env": [{"name": "NODE_OPTIONS", "valueFrom": {"configMapKeyRef": {}}}]}),
            "comes from elsewhere",
        ),
        (json!({"args": ["--permission", "server.js"]}), "permissions forbid it"),
        (json!({"volumeMounts": [{"name": "x", "mountPath": "/run/lameduck"}]}), "something else is mounted"),
    ] {
        let before =
            placed(|pod| app(pod).as_object_mut().unwrap().extend(change.as_object().unwrap().clone()));
        let done = patched(&before);
        assert!(
            done.warnings[0].contains(reason) && !has(&done, "--share-dir=/run/lameduck"),
            "{:?}",
            done.warnings
        );
    }
}

#[test]
fn pid1_can_be_shared_or_left() {
    let done = patched(&pod(annotated("pid1", "share")));
    assert_eq!(done.pod["spec"]["shareProcessNamespace"], true);
    for wish in ["share", "leave"] {
        let mut done = patched(&placed(annotated("pid1", wish)));
        assert!(app(&mut done.pod).get("env").is_none() && done.warnings.is_empty());
    }
    let mut done = patched(&placed(|pod| pod["spec"]["shareProcessNamespace"] = json!(true)));
    assert!(app(&mut done.pod).get("env").is_none());
}

#[test]
fn an_ordinary_sidecar_is_a_container_but_not_in_a_job() {
    let done = patched(&pod(annotated("sidecar", "ordinary")));
    assert_eq!(done.pod["spec"]["containers"][1]["name"], "lameduck");
    assert!(has(&done, "--sidecar=ordinary") && sidecar(&done).get("restartPolicy").is_none());
    for policy in ["Never", "OnFailure"] {
        let job = |pod: &mut Value| pod["spec"]["restartPolicy"] = json!(policy);
        patched(&pod(job));
        let why = why(&pod(|pod| {
            job(pod);
            annotated("sidecar", "ordinary")(pod);
        }));
        assert!(why.contains("keep a pod that is to complete"), "{why}");
    }
}

#[test]
fn a_mesh_leaves_the_probe_port_alone_and_kubectl_shows_the_app() {
    let istio = "traffic.sidecar.istio.io/excludeInboundPorts";
    let done = patched(&pod(|pod| pod["metadata"]["annotations"][istio] = json!("9090, 4881")));
    let annotations = &done.pod["metadata"]["annotations"];
    assert_eq!(annotations[istio], "9090, 4881");
    assert_eq!(annotations["config.linkerd.io/skip-inbound-ports"], "4881");
    assert_eq!(annotations["kubectl.kubernetes.io/default-container"], "app");
}

#[test]
fn flags_come_from_annotations_and_are_checked_as_the_proxy_would() {
    let done = patched(&pod(|pod| {
        annotated("lame-duck", "9s")(pod);
        annotated("access-log", "true")(pod);
        annotated("warm-up", "GET /,GET /x")(pod);
        annotated("grcae", "9s")(pod);
    }));
    assert!(
        has(&done, "--lame-duck=9s") && has(&done, "--access-log") && has(&done, "--warm-up=GET /,GET /x")
    );
    assert_eq!(
        done.warnings,
        ["annotation lameduck.dev/grcae means nothing: do you mean lameduck.dev/grace?"]
    );
    for (key, value, told) in [
        ("reserve", "10", "has no unit"),
        ("reserve", "58s", "leaves no time for running work"),
        ("log-level", "loud", "'loud'"),
        ("grace", "soon", "annotation lameduck.dev/grace"),
    ] {
        let why = why(&pod(annotated(key, value)));
        assert!(why.contains(told), "{key}: {why}");
    }
}

#[test]
fn what_is_not_certain_is_not_guessed() {
    let two = json!({"name": "two", "ports": [{"containerPort": 9000}]});
    type Change<'a> = &'a dyn Fn(&mut Value);
    let cases: [(Change, &str); 12] = [
        (&|pod| pod["spec"]["hostNetwork"] = json!(true), "hostNetwork"),
        (&|pod| pod["spec"]["os"] = json!({"name": "windows"}), "Windows"),
        (&|pod| pod["spec"]["nodeSelector"] = json!({"kubernetes.io/os": "windows"}), "Windows"),
        (&|pod| pod["spec"]["containers"].as_array_mut().unwrap().push(two.clone()), "several containers"),
        (&|pod| app(pod)["ports"].as_array_mut().unwrap().push(json!({"containerPort": 1})), "several ports"),
        (
            &|pod| app(pod)["ports"] = json!([{"name": "dns", "containerPort": 53, "protocol": "UDP"}]),
            "no TCP",
        ),
        (&|pod| app(pod)["ports"][0]["containerPort"] = json!(4881), "4881"),
        (&|pod| app(pod)["name"] = json!("lameduck"), "a container named lameduck"),
        (&|pod| pod["spec"]["volumes"] = json!([{"name": "lameduck"}]), "a volume named lameduck"),
        (&annotated("container", "none"), "there is no 'none'"),
        (&annotated("port", "none"), "no TCP port 'none'"),
        (&annotated("inject", "disabled"), "disabled"),
    ];
    for (change, told) in cases {
        let why = why(&placed(change));
        assert!(why.contains(told), "{told}: {why}");
    }
}

#[test]
fn no_port_is_wanted_twice_wherever_lameduck_listens() {
    let with = |ports: Value, key: &str, value: &str| {
        let mut pod = pod(annotated(key, value));
        annotated("port", "3000")(&mut pod);
        app(&mut pod)["ports"].as_array_mut().unwrap().extend(ports.as_array().unwrap().clone());
        pod
    };
    let other = |port: u16| json!([{"containerPort": port}]);
    for (key, value, port) in [
        ("control-listen", "127.0.0.1:9882", 9882),
        ("control-listen", ":9882", 9882),
        ("probe-port", "9881", 9881),
        ("proxy-port", "9880", 9880),
        ("grace", "60s", 4882),
    ] {
        let why = why(&with(other(port), key, value));
        assert!(why.contains(&format!("port {port}, which lameduck needs")), "{key}: {why}");
    }
    for (key, value) in [("control-listen", "127.0.0.1:4881"), ("proxy-port", "4882"), ("tcp", ":3000=x:1")] {
        let why = why(&with(json!([]), key, value));
        assert!(why.contains("would be both"), "{key}: {why}");
    }
    for control in ["off", "127.0.0.1:9882"] {
        patched(&with(other(4882), "control-listen", control));
    }
    for (key, value, port) in
        [("control-listen", "127.0.0.1:9882", 9882), ("tcp", ":6379=redis:6379,:9306=unix:/db.sock", 9306)]
    {
        let mut beside = with(json!([]), key, value);
        annotated("container", "app")(&mut beside);
        let two = json!({"name": "two", "ports": other(port)});
        beside["spec"]["containers"].as_array_mut().unwrap().push(two);
        assert!(why(&beside).contains(&format!("port {port}")), "another container's");
    }
    // Where a Service refers to the port by name.
    patched(&with(other(9306), "tcp", ":9306=unix:/db.sock"));
}

#[test]
fn a_pod_that_is_no_pod_is_left_alone() {
    for odd in [
        json!(null),
        json!([]),
        json!({"spec": 1}),
        json!({"spec": {"containers": {}}}),
        json!({"spec": {"containers": [1, {}]}}),
        json!({"spec": {"containers": [{"name": 1, "ports": 3}]}}),
        json!({"metadata": [], "spec": {"containers": [{"name": "x", "ports": [{"name": "h", "containerPort": 80}]}]}}),
        json!({"metadata": {"annotations": 1}, "spec": {"containers": [{"name": "x", "ports": [{"name": "h", "containerPort": 80}]}]}}),
        json!({"spec": {"initContainers": {}, "containers": [{"name": "x", "ports": [{"name": "h", "containerPort": 80}]}]}}),
        json!({"metadata": {"annotations": {"lameduck.dev/injected": "{"}}, "spec": {"containers": []}}),
    ] {
        why(&odd);
    }
}

#[test]
fn what_its_owner_changed_since_stays() {
    let mut done = patched(&pod(|_| {})).pod;
    done["spec"]["terminationGracePeriodSeconds"] = json!(120);
    app(&mut done)["image"] = json!("x:2");
    app(&mut done)["env"].as_array_mut().unwrap().insert(0, json!({"name": "A", "value": "1"}));
    let again = patch(&done, &settings(Services::Seen)).unwrap();
    assert!(has(&again, "--grace=120s"));
    assert_eq!(again.pod["spec"]["containers"][0]["env"][0]["name"], "A");
    let back = Value::Object(restore::restored(&again.pod).unwrap());
    assert_eq!(back["spec"]["terminationGracePeriodSeconds"], 120);
    assert_eq!(back["spec"]["containers"][0]["env"], json!([{"name": "A", "value": "1"}]));
}

#[test]
fn another_image_or_token_is_an_update_and_not_a_second_sidecar() {
    let first = patched(&pod(|_| {})).pod;
    let newer = PatchSettings {
        image: "lameduck:2".to_owned(),
        token: "other".to_owned(),
        ..settings(Services::Seen)
    };
    let done = patch(&first, &newer).unwrap();
    assert_eq!(done.pod["spec"]["initContainers"].as_array().unwrap().len(), 1);
    assert_eq!((&sidecar(&done)["image"], token_of(&done.pod)), (&json!("lameduck:2"), Some("other")));
}
