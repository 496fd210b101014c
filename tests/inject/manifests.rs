//! All forms of the manifests contain the same objects, and grant no more than the webhook needs.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lameduck::inject::yaml;
use serde_json::{Value, json};

const VERSION: &str = env!("CARGO_PKG_VERSION");

fn path(below: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(below)
}

fn read(below: &str) -> String {
    fs::read_to_string(path(below)).unwrap_or_else(|error| panic!("{below}: {error}"))
}

/// The objects by kind and name.
type Objects = BTreeMap<(String, String), Value>;

fn objects(text: &str) -> Objects {
    let documents = text.split("\n---").filter_map(|document| yaml::parse(document).unwrap());
    let mut objects = Objects::new();
    for object in documents.map(|node| node.to_json().unwrap()).filter(|object| !object.is_null()) {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let key = (text(&object["kind"]), text(&object["metadata"]["name"]));
        assert!(objects.insert(key.clone(), object).is_none(), "{key:?} twice");
    }
    objects
}

fn installed() -> Objects {
    objects(&read("manifests/install.yaml"))
}

fn one(objects: &Objects, kind: &str, name: &str) -> Value {
    objects[&(kind.to_owned(), name.to_owned())].clone()
}

/// The only container of the Deployment.
fn container() -> Value {
    let deployment = one(&installed(), "Deployment", "lameduck-webhook");
    let containers = &deployment["spec"]["template"]["spec"]["containers"];
    assert_eq!(containers.as_array().unwrap().len(), 1);
    containers[0].clone()
}

fn expect_same(what: &str, left: &Objects, right: &Objects) {
    let keys: Vec<_> = left.keys().collect();
    assert_eq!(keys, right.keys().collect::<Vec<_>>(), "{what}");
    for (key, object) in left {
        let text = |object| serde_json::to_string_pretty(object).unwrap();
        let (left, right) = (text(object), text(&right[key]));
        let diff = similar::TextDiff::from_lines(&left, &right);
        assert!(left == right, "{what}: {key:?}\n{}", diff.unified_diff());
    }
}

#[test]
fn install_yaml_has_the_objects_of_the_base() {
    let files = ["namespace", "rbac", "webhook", "configuration"];
    let base: Vec<_> = files.iter().map(|file| read(&format!("manifests/base/{file}.yaml"))).collect();
    expect_same("just manifests renders it anew", &installed(), &objects(&base.join("\n---\n")));
}

#[test]
fn every_image_and_the_chart_have_this_version() {
    let image = json!(format!("lameduck:{VERSION}"));
    let container = container();
    assert_eq!(container["image"], image);
    assert_eq!(container["env"], json!([{"name": "LAMEDUCK_IMAGE", "value": image}]));
    let chart = yaml::parse(&read("manifests/chart/Chart.yaml")).unwrap().unwrap().to_json().unwrap();
    assert_eq!((&chart["version"], &chart["appVersion"]), (&json!(VERSION), &json!(VERSION)));
}

/// Whether a label selector matches; supports the two kinds of requirement used here.
fn selects(selector: &Value, labels: &Value) -> bool {
    let expressions = selector["matchExpressions"].as_array();
    let equal =
        selector["matchLabels"].as_object().into_iter().flatten().all(|(key, value)| labels[key] == *value);
    equal
        && expressions.into_iter().flatten().all(|expression| {
            assert_eq!(expression["operator"], "NotIn");
            let label = &labels[expression["key"].as_str().unwrap()];
            !expression["values"].as_array().unwrap().contains(label)
        })
}

#[test]
fn an_opted_in_pod_is_shown_to_the_webhook_once_and_no_other_ever() {
    let webhooks = one(&installed(), "MutatingWebhookConfiguration", "lameduck")["webhooks"].clone();
    let shown = |namespace: Value, pod: Value| {
        let entry = |entry: &&Value| {
            selects(&entry["namespaceSelector"], &namespace) && selects(&entry["objectSelector"], &pod)
        };
        webhooks.as_array().unwrap().iter().filter(entry).count()
    };
    let label =
        |value: &str| if value.is_empty() { json!({}) } else { json!({"lameduck.dev/inject": value}) };
    for (namespace, pod, times) in [
        ("", "", 0),
        ("", "disabled", 0),
        ("", "enabled", 1),
        ("disabled", "", 0),
        ("disabled", "disabled", 0),
        ("disabled", "enabled", 1),
        ("enabled", "", 1),
        ("enabled", "disabled", 0),
        ("enabled", "enabled", 1),
    ] {
        for (name, times) in [("shop", times), ("kube-system", 0), ("lameduck-system", 0)] {
            let mut labels = label(namespace);
            labels["kubernetes.io/metadata.name"] = json!(name);
            assert_eq!(shown(labels, label(pod)), times, "namespace {name} {namespace:?}, pod {pod:?}");
        }
    }
}

#[test]
fn the_webhook_has_no_right_but_these() {
    let objects = installed();
    let rules = |kind: &str| one(&objects, kind, "lameduck-webhook")["rules"].clone();
    let secret = json!([{"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["lameduck-webhook-tls"],
        "verbs": ["get", "update"]}]);
    let configuration = json!([
        {"apiGroups": ["admissionregistration.k8s.io"], "resources": ["mutatingwebhookconfigurations"],
            "resourceNames": ["lameduck"], "verbs": ["get", "patch"]},
        {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]},
    ]);
    assert_eq!((rules("Role"), rules("ClusterRole")), (secret, configuration));
    assert_eq!(objects.keys().filter(|(kind, _)| kind.contains("Role")).count(), 4);
}

#[test]
fn applying_again_leaves_what_the_webhook_wrote() {
    // Neither `kubectl apply` nor an upgrade of the chart resets fields that the manifest does not contain.
    let objects = installed();
    let secret = one(&objects, "Secret", "lameduck-webhook-tls");
    assert!(secret.get("data").or(secret.get("stringData")).is_none(), "{secret}");
    let webhooks = one(&objects, "MutatingWebhookConfiguration", "lameduck")["webhooks"].clone();
    for webhook in webhooks.as_array().unwrap() {
        assert!(webhook["clientConfig"].get("caBundle").is_none(), "{webhook}");
    }
}

#[test]
fn what_the_manifests_set_is_there() {
    let help = Command::new(env!("CARGO_BIN_EXE_lameduck")).args(["webhook", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let chart = read("manifests/chart/templates/webhook.yaml");
    let mut names: Vec<&str> =
        chart.split("name: ").filter_map(|rest| rest.split([',', '}']).next()).collect();
    names.retain(|name| name.starts_with("LAMEDUCK_"));
    assert_eq!(names, ["LAMEDUCK_TLS_DIR", "LAMEDUCK_IMAGE", "LAMEDUCK_IMAGE_PULL_POLICY"]);
    for name in names {
        assert!(help.contains(&format!("[env: {name}=")), "{name} is not in\n{help}");
    }
    // Values that the manifests take from the program's defaults.
    for default in [":8443", ":4881", "lameduck-webhook-tls", "lameduck-webhook", "lameduck"] {
        assert!(help.contains(&format!("[default: {default}]")), "{default} is not in\n{help}");
    }
    assert_eq!(container()["args"], json!(["webhook"]));
}

#[test]
fn the_slow_app_after_is_what_inject_makes_of_it() {
    let inject = ["inject", "--token-seed=example", "examples/slow/deployment.yaml"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_lameduck"));
    let done = command.args(inject).current_dir(path("")).env_clear().output().unwrap();
    let header = format!(
        "# Output of `lameduck {}`. It keeps the owner's comments, including the next two lines.\n",
        inject.join(" ")
    );
    let after = header + &String::from_utf8(done.stdout).unwrap();
    let file = "examples/slow/injected.yaml";
    if std::env::var_os("BLESS").is_some() {
        fs::write(path(file), &after).unwrap();
    }
    assert!(read(file) == after, "{file} differs (BLESS=1 writes it); expected content:\n{after}");
}

/// Output of a tool: `$HELM`, `$KUBECTL`, or the one on the `PATH`; none if it is not installed, which is printed.
fn tool(name: &str, arguments: &[&str]) -> Option<Result<String, String>> {
    let program = std::env::var(name.to_uppercase()).unwrap_or(name.to_owned());
    let Ok(done) = Command::new(program).args(arguments).current_dir(path("manifests")).output() else {
        eprintln!("LEFT OUT: no {name} (set {}): NOTHING WAS TESTED", name.to_uppercase());
        return None;
    };
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Some(if done.status.success() {
        Ok(text(done.stdout))
    } else {
        Err(text(done.stdout) + &text(done.stderr))
    })
}

/// A folder below `target` with a kustomization that ends in these lines.
fn kustomization(name: &str, lines: &str) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).unwrap();
    let head = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n";
    fs::write(folder.join("kustomization.yaml"), format!("{head}{lines}")).unwrap();
    folder.to_string_lossy().into_owned()
}

/// The chart's objects for the oldest Kubernetes that it supports, without the labels that only Helm needs.
fn templated(arguments: &[&str]) -> Option<Objects> {
    let base = ["template", "lameduck", "chart", "--namespace=lameduck-system", "--kube-version=1.29.0"];
    let mut objects = objects(&tool("helm", &[&base, arguments].concat())?.unwrap());
    for object in objects.values_mut() {
        let labels = object["metadata"]["labels"].as_object_mut().unwrap();
        labels.retain(|key, _| {
            ["app.kubernetes.io/name", "app.kubernetes.io/component"].contains(&key.as_str())
        });
    }
    Some(objects)
}

#[test]
#[ignore = "needs kubectl and helm"]
fn the_chart_and_the_overlays_are_the_same_objects() {
    let Some(default) = tool("kubectl", &["kustomize", "overlays/default"]) else { return };
    expect_same("just manifests renders it anew", &installed(), &objects(&default.unwrap()));

    // A kustomization accepts only relative paths.
    let up = "../".repeat(Path::new(env!("CARGO_TARGET_TMPDIR")).components().count());
    let at = format!("{up}{}", path("manifests").to_string_lossy().trim_start_matches('/'));
    let all = format!(
        "resources: [{at}/overlays/ha]\ncomponents: [{at}/components/cert-manager, {at}/components/pod-monitor]\n"
    );
    let all = kustomization("all", &all);
    let ha = ["--set=replicas=3", "--set=failurePolicy=Fail"];
    let cert_manager = ["--set=certManager.enabled=true"];
    for (folder, values) in [
        ("overlays/default", vec![]),
        ("overlays/ha", ha.to_vec()),
        ("overlays/cert-manager", cert_manager.to_vec()),
        (all.as_str(), [&ha[..], &cert_manager, &["--set=podMonitor.enabled=true"]].concat()),
    ] {
        let mut overlay = objects(&tool("kubectl", &["kustomize", folder]).unwrap().unwrap());
        // `helm install --create-namespace` creates the namespace.
        overlay.remove(&("Namespace".to_owned(), "lameduck-system".to_owned())).unwrap();
        let Some(chart) = templated(&values) else { return };
        expect_same(folder, &overlay, &chart);
    }
}

#[test]
#[ignore = "needs helm"]
fn the_chart_is_clean_and_refuses_values_that_mean_nothing() {
    let lint = |values: &[&str]| tool("helm", &[&["lint", "--strict", "chart"], values].concat());
    let Some(clean) = lint(&[]) else { return };
    assert!(clean.as_ref().is_ok_and(|said| !said.contains("[WARNING]")), "{clean:?}");
    for (values, said) in [
        (["--set=replica=3"].as_slice(), "replica"),
        (&["--set=image.name=x"], "name"),
        (&["--set=replicas=0"], "replicas"),
        (&["--set=failurePolicy=fail"], "failurePolicy"),
        (&["--set=failurePolicy=Fail"], "replicas"),
        (&["--set=image.tag=a:b"], "tag"),
        (&["--set=podMonitor.interval=30"], "interval"),
        (&["--set=args={log}"], "args"),
    ] {
        let refused = lint(values).unwrap().expect_err(values[0]);
        assert!(refused.contains(said), "{values:?}: {refused}");
    }
    let others =
        ["--set=image.repository=r:5000/x/lameduck", "--set=sidecar.image=s:1", "--set=args={--a,--b=1}"];
    let rendered = templated(&[&others[..], &["--set=image.pullPolicy=Always"]].concat()).unwrap();
    let container =
        one(&rendered, "Deployment", "lameduck-webhook")["spec"]["template"]["spec"]["containers"][0].clone();
    assert_eq!(container["image"], json!(format!("r:5000/x/lameduck:{VERSION}")));
    assert_eq!(
        (&container["env"][0]["value"], &container["imagePullPolicy"]),
        (&json!("s:1"), &json!("Always"))
    );
    assert_eq!(container["args"], json!(["webhook", "--a", "--b=1"]));
}
