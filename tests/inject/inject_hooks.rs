//! The patch for a user's own preStop hook, and for an app on a unix socket.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use crate::common;

use common::pod::{annotated, app, by, has, patched, placed, pod, sidecar, why};
use lameduck::inject::Services;
use serde_json::{Value, json};

/// A pod whose app has this preStop hook.
fn hooked(hook: Value) -> Value {
    pod(|pod| app(pod)["lifecycle"] = json!({"preStop": hook}))
}

/// The same, where annotations place the proxy instead of a capture.
fn placed_and_hooked(hook: Value) -> Value {
    placed(|pod| app(pod)["lifecycle"] = json!({"preStop": hook}))
}

fn blocking(pod: &mut Value) -> bool {
    app(pod)["lifecycle"]["preStop"]["httpGet"]["path"] == "/drain?hook=app"
}

#[test]
fn an_http_get_is_called_by_the_proxy_after_the_drain() {
    let header = json!([{"name": "X-A", "value": "b: c, d"}, {"name": "Accept", "value": ""}]);
    let mut done = patched(&placed_and_hooked(
        json!({"httpGet": {"path": "bye?x=1", "port": "http", "httpHeaders": header}}),
    ));
    assert!(blocking(&mut done.pod));
    // A hook to the app's own port needs no address: that port is the proxy's upstream.
    assert!(has(&done, "--after-drain=/bye?x=1"));
    let mut dollars = placed_and_hooked(json!({"httpGet": {"path": "/$(HOSTNAME)", "port": 3000}}));
    annotated("ready-check", "/$")(&mut dollars);
    let done = patched(&dollars);
    assert!(has(&done, "--after-drain=/$$(HOSTNAME)") && has(&done, "--ready-check=/$$"));
    for port in [json!(9100), json!("admin")] {
        let mut before = placed_and_hooked(json!({"httpGet": {"port": port}}));
        let admin = json!({"name": "admin", "containerPort": 9100});
        app(&mut before)["ports"].as_array_mut().unwrap().push(admin);
        annotated("port", "http")(&mut before);
        assert!(has(&patched(&before), "--after-drain=http://127.0.0.1:9100/"));
    }
}

/// Every user of the node can read a command line.
#[test]
fn its_header_fields_stand_in_a_variable_whatever_they_hold() {
    let get = |headers: Value| hooked(json!({"httpGet": {"port": 3000, "httpHeaders": headers}}));
    let headers = json!([
        {"name": "Authorization", "value": "Bearer $(SECRET), \"a\"; b=\u{e9}: $x\t#"}, {"name": "Accept", "value": ""}
    ]);
    let done = patched(&get(headers));
    let ours = sidecar(&done);
    assert!(!ours["args"].to_string().contains("Bearer"), "{ours}");
    let variable = json!({
        "name": "LAMEDUCK_AFTER_DRAIN_HEADER",
        "value": "Authorization: Bearer $$(SECRET), \"a\"; b=\u{e9}: $$x\t#\nAccept: ",
    });
    assert_eq!(ours["env"][1], variable);
    assert_eq!(sidecar(&patched(&get(json!([]))))["env"].as_array().unwrap().len(), 1);
    let two = why(&get(json!([{"name": "X-A", "value": "b\nHost: other"}])));
    assert!(two.contains("a line break in its header X-A"), "{two}");
}

#[test]
fn an_exec_runs_after_our_program_has_waited() {
    let mut done = patched(&hooked(json!({"exec": {"command": ["sh", "-c", "nginx -s quit; sleep 3"]}})));
    let command = json!([
        "/run/lameduck/lameduck",
        "drain",
        "--app-hook",
        "--control=127.0.0.1:4882",
        "--",
        "sh",
        "-c",
        "nginx -s quit; sleep 3",
    ]);
    assert_eq!(app(&mut done.pod)["lifecycle"]["preStop"], json!({"exec": {"command": command}}));
    // The program is shared even if Node gets no preload.
    let exec = json!({"exec": {"command": ["/bye"]}});
    let leave = |pod: &mut Value| annotated("pid1", "leave")(pod);
    let mut before = placed_and_hooked(exec);
    leave(&mut before);
    let mut done = patched(&before);
    let mount = json!([{"name": "lameduck", "mountPath": "/run/lameduck", "readOnly": true}]);
    assert_eq!(app(&mut done.pod)["volumeMounts"], mount);
    assert!(has(&done, "--share-dir=/run/lameduck"));
    assert!(app(&mut done.pod).get("env").is_none());

    annotated("control-listen", "127.0.0.1:9882")(&mut before);
    let mut done = patched(&before);
    assert_eq!(app(&mut done.pod)["lifecycle"]["preStop"]["exec"]["command"][3], "--control=127.0.0.1:9882");
    annotated("control-listen", "off")(&mut before);
    assert!(why(&before).contains("by control-listen, which is off"));
}

#[test]
fn its_time_comes_off_the_deadline() {
    for hook in [json!({"exec": {"command": ["/bye"]}}), json!({"httpGet": {"path": "/bye", "port": 3000}})] {
        let done = patched(&hooked(hook.clone()));
        assert!(has(&done, "--reserve=15s"), "{hook}");
        assert!(done.warnings[0].contains("has 15s together with its SIGTERM (lameduck.dev/reserve)"));
        let mut before = hooked(hook);
        annotated("reserve", "25s")(&mut before);
        let done = patched(&before);
        assert!(has(&done, "--reserve=25s") && !has(&done, "--reserve=15s") && done.warnings.is_empty());
    }
    assert!(!has(&patched(&hooked(json!({"sleep": {"seconds": 7}}))), "--reserve=15s"));
}

#[test]
fn a_hook_that_cannot_be_kept_is_reported() {
    for (hook, told) in [
        (json!({"httpGet": {"path": "/", "port": 3000, "host": "10.0.0.9"}}), "names a host"),
        (json!({"httpGet": {"path": "/", "port": 3000, "scheme": "HTTPS"}}), "not plain HTTP"),
        (json!({"httpGet": {"path": "/", "port": "none"}}), "asks port \"none\", which it hasn't"),
        (json!({"httpGet": {"path": "/a b", "port": 3000}}), "neither a path"),
        (
            json!({"httpGet": {"path": "/", "port": 3000, "httpHeaders": [{"name": "a b", "value": ""}]}}),
            "not a header field",
        ),
        (json!({"tcpSocket": {"port": 3000}}), "neither a sleep, an httpGet nor an exec"),
        (json!({"exec": {"command": []}}), "neither a sleep, an httpGet nor an exec"),
    ] {
        let why = why(&hooked(hook.clone()));
        assert!(why.contains(told), "{hook}: {why}");
    }
    let mut taken = hooked(json!({"exec": {"command": ["/bye"]}}));
    app(&mut taken)["volumeMounts"] = json!([{"name": "x", "mountPath": "/run/lameduck"}]);
    assert!(why(&taken).contains("something else is mounted on /run/lameduck"));
}

/// An app on a unix socket, as its user.
fn on_a_socket() -> Value {
    pod(|pod| {
        annotated("app-socket", "/run/lameduck/app.sock")(pod);
        app(pod)["securityContext"] = json!({"runAsUser": 1000});
        app(pod)["livenessProbe"] = json!({"httpGet": {"path": "/healthz?x", "port": "http"}});
        app(pod)["readinessProbe"] =
            json!({"httpGet": {"path": "healthz?x", "port": 3000, "scheme": "HTTP"}});
        app(pod)["startupProbe"] = json!({"httpGet": {"port": 3000}});
        app(pod)["lifecycle"] = json!({"postStart": {"httpGet": {"path": "/hi", "port": 9100}}});
    })
}

#[test]
fn an_app_on_a_unix_socket_leaves_its_port_to_the_proxy() {
    for services in [Services::Seen, Services::Unseen] {
        let mut done = by(&on_a_socket(), services);
        assert!(has(&done, "--listen=:3000") && has(&done, "--upstream=unix:/run/lameduck/app.sock"));
        assert_eq!(
            sidecar(&done)["securityContext"]["runAsUser"],
            1000,
            "the sidecar's user must be allowed to connect"
        );
        assert!(done.warnings.is_empty(), "{:?}", done.warnings);
        let app = app(&mut done.pod);
        assert_eq!(app["ports"][0], json!({"name": "http", "containerPort": 3000}));
        assert_eq!(app["env"][0], json!({"name": "PORT", "value": "/run/lameduck/app.sock"}));
        let mount = json!([{"name": "lameduck", "mountPath": "/run/lameduck", "readOnly": false}]);
        assert_eq!(app["volumeMounts"], mount, "the app creates the socket there");
    }
    // The pod's user applies to the app too.
    let mut before = on_a_socket();
    app(&mut before).as_object_mut().unwrap().remove("securityContext");
    before["spec"]["securityContext"] = json!({"runAsUser": 2000});
    assert_eq!(sidecar(&patched(&before))["securityContext"]["runAsUser"], 2000);
}

#[test]
fn its_probes_and_its_hook_go_through_the_proxy() {
    let mut before = on_a_socket();
    app(&mut before)["lifecycle"]["preStop"] = json!({"httpGet": {"path": "/bye", "port": "http"}});
    let mut done = patched(&before);
    let app = app(&mut done.pod);
    let get = |probe: &str, path: &str| {
        let get = &app[probe]["httpGet"];
        assert_eq!((&get["path"], &get["port"]), (&json!(path), &json!(4881)), "{probe}");
    };
    get("livenessProbe", "/app-probe/healthz?x");
    get("readinessProbe", "/app-probe/healthz?x");
    get("startupProbe", "/app-probe/");
    assert_eq!(
        app["lifecycle"]["postStart"]["httpGet"],
        json!({"path": "/hi", "port": 9100}),
        "another port"
    );
    assert!(
        has(&done, "--app-probe=/healthz?x")
            && has(&done, "--app-probe=/")
            && has(&done, "--after-drain=/bye")
    );
    let probes = sidecar(&done)["args"].as_array().unwrap().iter();
    assert_eq!(probes.filter(|arg| arg.as_str().unwrap().starts_with("--app-probe")).count(), 2);
}

#[test]
fn its_post_start_goes_through_the_proxy_as_far_as_it_can() {
    let mut before = on_a_socket();
    app(&mut before)["lifecycle"]["postStart"]["httpGet"]["port"] = json!("http");
    let mut done = patched(&before);
    let handler = &app(&mut done.pod)["lifecycle"]["postStart"]["httpGet"];
    assert_eq!(*handler, json!({"path": "/app-probe/hi", "port": 4881}));
    assert!(has(&done, "--app-probe=/hi"));
    assert!(done.warnings.iter().any(|told| told.contains("is lost if the app does not listen yet")));
    // The kubelet starts the next container only after the hook has returned.
    annotated("sidecar", "ordinary")(&mut before);
    assert!(why(&before).contains("by the sidecar, which starts after it"));
}

#[test]
fn a_unix_socket_that_could_not_work_is_reported() {
    type Change<'a> = &'a dyn Fn(&mut Value);
    let cases: [(Change, &str); 8] = [
        (
            &|pod| drop(app(pod).as_object_mut().unwrap().remove("securityContext")),
            "write the app's runAsUser",
        ),
        (&|pod| app(pod)["securityContext"]["runAsUser"] = json!(0), "the app runs as root"),
        (
            &|pod| app(pod)["livenessProbe"] = json!({"tcpSocket": {"port": 3000}}),
            "livenessProbe.tcpSocket can't ask",
        ),
        (&|pod| app(pod)["livenessProbe"] = json!({"grpc": {"port": 3000}}), "livenessProbe.grpc can't ask"),
        (&|pod| app(pod)["livenessProbe"]["httpGet"]["scheme"] = json!("HTTPS"), "only a plain httpGet can"),
        (&annotated("app-socket", "/tmp/app.sock"), "write /run/lameduck/app.sock"),
        (&annotated("app-port", "8081"), "are both there"),
        (
            &|pod| app(pod)["volumeMounts"] = json!([{"name": "x", "mountPath": "/run/lameduck"}]),
            "something else is mounted",
        ),
    ];
    for (change, told) in cases {
        let mut before = on_a_socket();
        change(&mut before);
        let why = why(&before);
        assert!(why.contains(told), "{told}: {why}");
    }
}

/// Kubernetes, "Pod Security Standards", Baseline and Restricted: every field that they name.
pub fn restricted(pod: &Value) -> Result<(), String> {
    let spec = &pod["spec"];
    for key in ["hostNetwork", "hostPID", "hostIPC"] {
        if spec[key] == true {
            return Err(key.to_owned());
        }
    }
    let volumes = spec["volumes"].as_array().into_iter().flatten();
    if volumes.clone().any(|volume| volume["emptyDir"].is_null()) {
        return Err("a volume".to_owned());
    }
    let safe = "net.ipv4.ip_unprivileged_port_start";
    let mut sysctls = spec["securityContext"]["sysctls"].as_array().into_iter().flatten();
    if sysctls.any(|sysctl| sysctl["name"] != safe) {
        return Err("a sysctl".to_owned());
    }
    let lists = [&spec["containers"], &spec["initContainers"]];
    for container in lists.into_iter().filter_map(Value::as_array).flatten() {
        let (own, pods) = (&container["securityContext"], &spec["securityContext"]);
        let set = |key: &str| if own[key].is_null() { &pods[key] } else { &own[key] };
        let drops = own["capabilities"]["drop"].as_array().is_some_and(|all| all.contains(&json!("ALL")));
        let checks = [
            ("privileged", own["privileged"] != true),
            ("allowPrivilegeEscalation", own["allowPrivilegeEscalation"] == false),
            ("capabilities", drops && own["capabilities"]["add"].is_null()),
            ("runAsNonRoot", set("runAsNonRoot") == true && set("runAsUser") != 0),
            ("seccompProfile", set("seccompProfile")["type"] == "RuntimeDefault"),
            ("procMount", own["procMount"].is_null()),
            ("hostPort", !container.to_string().contains("hostPort")),
            // From Kubernetes 1.34 on.
            ("host of a probe or a hook", !container.to_string().contains("\"host\":")),
        ];
        if let Some((what, _)) = checks.iter().find(|(_, fine)| !fine) {
            return Err(format!("{}: {what}", container["name"]));
        }
    }
    Ok(())
}

#[test]
fn a_pod_that_meets_the_restricted_standard_still_does() {
    let strict = |change: &dyn Fn(&mut Value)| {
        let mut pod = on_a_socket();
        pod["metadata"]["annotations"] = json!({});
        pod["spec"]["securityContext"] =
            json!({"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}});
        app(&mut pod)["securityContext"] = json!({
            "runAsUser": 1000, "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
        });
        change(&mut pod);
        pod
    };
    let exec = |pod: &mut Value| app(pod)["lifecycle"]["preStop"] = json!({"exec": {"command": ["/bye"]}});
    let get = |pod: &mut Value| app(pod)["lifecycle"]["preStop"] = json!({"httpGet": {"port": 3000}});
    let changes: [&dyn Fn(&mut Value); 7] = [
        &|_| {},
        &exec,
        &get,
        &annotated("sidecar", "ordinary"),
        &annotated("pid1", "share"),
        &annotated("app-port", "8081"),
        &annotated("app-socket", "/run/lameduck/app.sock"),
    ];
    for (n, change) in changes.iter().enumerate() {
        let before = strict(change);
        assert_eq!(restricted(&before), Ok(()), "{n}: the pod must meet the standard before");
        assert_eq!(restricted(&patched(&before).pod), Ok(()), "{n}");
    }
}
