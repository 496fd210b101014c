//! The text of manifests: JSON stays JSON, what is taken out leaves no trace, and what can't be changed safely stays.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use super::inject_keeps_every_byte::{done, lameduck, task, text, told};
use lameduck::inject::manifest::{Manifest, Outcome, Task, transform};
use serde_json::Value;

/// Injects, checks that a second run changes nothing and that `uninject` gives back every byte, and returns the text. The
/// same is checked for a port that moves by its name.
fn round_trip(before: &str) -> String {
    let named = by_name(before);
    if named != before && !before.contains("port-name") {
        round_trip(&named);
    }
    let (after, report) = done(before, &task());
    assert!(report.iter().any(|line| line.outcome == Outcome::Changed), "{}", told(&report));
    assert_eq!(done(&after, &task()).0, after, "twice");
    let (back, report) = done(&after, &Task::Uninject);
    assert!(back == before, "{}\n{after}\n=>\n{back}", told(&report));
    after
}

/// The same with an annotation, where the pod template has none.
fn by_name(text: &str) -> String {
    let annotations = "annotations: {lameduck.dev/capture: port-name}";
    let pod = "  template:\n    spec:\n";
    text.replace("annotations: {}", annotations)
        .replace(pod, &pod.replace("    spec", &format!("    metadata: {{{annotations}}}\n    spec")))
        .replace(
            "metadata: {labels: {app: web}}",
            &format!("metadata: {{labels: {{app: web}}, {annotations}}}"),
        )
        .replace(
            r#"{"metadata": {"#,
            r#"{"metadata": {"annotations": {"lameduck.dev/capture": "port-name"}, "#,
        )
}

/// A Deployment whose pod template has these lines, each list and mapping at its own indentation.
fn deployment(pod: &str, container: &str) -> String {
    let head =
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n  template:\n    spec:\n";
    let ports = "        ports: [{name: http, containerPort: 8080}]\n";
    let containers =
        format!("      containers:\n      - name: web\n        image: web:1\n{container}{ports}");
    format!("{head}{pod}{containers}")
}

const JSON: &str = r#"{"apiVersion": "v1", "kind": "List", "items": [
  {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
   "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}},
  {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
   "spec": {"template": {"metadata": {"labels": {"app": "web"}},
     "spec": {"terminationGracePeriodSeconds": 30, "containers": [{"name": "web", "image": "web:1",
      "ports": [{"name": "http", "containerPort": 8080}],
      "readinessProbe": {"httpGet": {"path": "/", "port": "http"}},
      "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", "echo bye"]}}}}]}}}}
]}
"#;

#[test]
fn json_with_a_service_stays_json_however_often_it_is_injected() {
    let after = round_trip(JSON);
    serde_json::from_str::<Value>(&after).unwrap();
    // Its owner changes the injected file: the record is replaced, in JSON too.
    let changed = after.replace("Seconds\": 60", "Seconds\": 90");
    assert_ne!(changed, after);
    serde_json::from_str::<Value>(&done(&changed, &task()).0).unwrap();
}

#[test]
fn json_values_in_a_row_are_documents() {
    let before = JSON.trim_end().to_owned() + JSON;
    let after = round_trip(&before);
    let values: Result<Vec<Value>, _> = serde_json::Deserializer::from_str(&after).into_iter().collect();
    assert_eq!(values.unwrap().len(), 2);
}

#[test]
fn files_with_json_become_a_stream_that_kubectl_reads() {
    let dir = std::env::temp_dir().join(format!("lameduck-inject-json-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let map = |name: &str| {
        format!(r#"{{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {{"name": "{name}"}}}}"#)
    };
    let write = |file: &str, text: &str| std::fs::write(dir.join(file), text).unwrap();
    write("a.json", &(map("a") + &map("b")));
    write("b.json", &map("c"));
    write("c.yaml", "\u{feff}kind: ConfigMap\n");
    let stream = text(&lameduck(&["inject", dir.to_str().unwrap()], "").stdout);
    // kubectl takes what begins with a brace for JSON only, which has no `---`.
    let expected = format!("---\n{}\n---\n{}\n---\n{}\n---\nkind: ConfigMap\n", map("a"), map("b"), map("c"));
    assert_eq!(stream, expected);
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn empty_and_missing_values_come_back_as_they_were() {
    let pod = "      initContainers: [ ]\n      volumes: # none\n      terminationGracePeriodSeconds:\n";
    let container = "        env: []\n        volumeMounts:\n        lifecycle: {}\n";
    let before = deployment(pod, container)
        .replace("    spec:\n      init", "    metadata:\n      annotations: {}\n    spec:\n      init");
    round_trip(&before);
    round_trip(&deployment("", "        lifecycle:\n          preStop: null # none\n"));
    round_trip(&deployment("", "        lifecycle: {preStop: , postStart: {exec: {command: [x]}}}\n"));
    round_trip(&before.replace('\n', "\r\n"));
}

#[test]
fn replaced_values_come_back_as_they_were_written() {
    let probe = "        livenessProbe: {httpGet: {port: 'http', path: /}}\n";
    let hook = "        lifecycle:\n          preStop: # says good-bye\n            httpGet:\n              scheme: HTTP\n              # to itself\n              port: \"http\"\n\n              path: '/bye'\n          postStart: {exec: {command: [x]}}\n";
    let options = "        env:\n        - {name: NODE_OPTIONS, value: '--trace-warnings'} # as before\n";
    let pod = "      terminationGracePeriodSeconds: 0x1E # 30\n";
    round_trip(&deployment(pod, &[probe, hook, options].concat()));
    // Also after its owner has changed something else.
    let before = deployment(pod, hook);
    let (after, _) = done(&before, &task());
    let changed = done(&after.replace("web:1", "web:2"), &Task::Uninject).0;
    assert_eq!(changed, before.replace("web:1", "web:2"));
}

#[test]
fn elements_may_begin_below_their_dash() {
    for behind in ["", " # the first", " &a", " !!map", "\n\n  # it"] {
        let list = format!("        env:\n        -{behind}\n          name: A\n          value: b\n");
        let after = round_trip(&deployment("", &list));
        assert!(after.contains("          value: b\n        - name: LD_PRELOAD\n"), "{behind:?}: {after}");
    }
}

#[test]
fn a_udp_port_of_the_same_number_stays() {
    let both = "ports: [{name: http, containerPort: 8080}, {name: quic, containerPort: 8080, protocol: UDP}]";
    let before = deployment("", "").replace("ports: [{name: http, containerPort: 8080}]", both);
    let after = round_trip(&by_name(&before));
    assert!(after.contains("{name: http, containerPort: 4880}, {name: quic, containerPort: 8080"), "{after}");
}

#[test]
fn a_service_stays_as_it_is_when_its_workload_does() {
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  selector: {app: web}\n  ports: [{port: 8080}]\n---\n";
    let labelled =
        |text: String| text.replace("    spec:\n", "    metadata: {labels: {app: web}}\n    spec:\n");
    round_trip(&(service.to_owned() + &labelled(deployment("", ""))));
    let empty = service.replace("{name: web}", "{name: web, annotations: { }}");
    round_trip(&(empty + &labelled(deployment("", ""))));
    let shared = deployment("", "").replace("ports: [{name", "x: &p 8080\n        ports: [{name");
    let shared = service.to_owned() + &labelled(shared).replace("containerPort: 8080", "containerPort: *p");
    let shared = by_name(&shared);
    let (after, report) = done(&shared, &task());
    assert_eq!(after, shared, "{}", told(&report));
    assert!(told(&report).contains("can't be changed in place: /spec"), "{}", told(&report));
}

/// In one List, each item is edited by itself.
#[test]
fn an_item_that_cannot_be_edited_keeps_no_other_from_it() {
    let item = |text: &str| "- ".to_owned() + &text.trim_end().replace('\n', "\n  ") + " # end\n";
    let shared = deployment("", "        x: &x {a: 1}\n        y: *x\n        lifecycle: {preStop: *x}\n");
    let all = [
        "kind: List\napiVersion: v1\nitems:\n",
        &item(&deployment("", "")),
        &item(&shared),
        &item(&deployment("", "")),
    ];
    let (after, report) = done(&all.concat(), &task());
    let outcomes: Vec<_> = report.iter().map(|line| line.outcome == Outcome::Changed).collect();
    assert_eq!(outcomes, [true, false, true], "{}", told(&report));
    assert!(after.contains(&item(&shared)));
    assert_eq!(done(&after, &Task::Uninject).0, all.concat());
}

/// Time must grow with the List, not with its square.
#[test]
fn a_list_takes_no_longer_than_its_items_alone() {
    let items = 300;
    let alone = deployment("", "        env:\n        - {name: A, value: aaaaaaaaaaaaaaaaaaaaaaaaaa}\n");
    let mut list = "apiVersion: v1\nkind: List\nitems:\n".to_owned();
    for _ in 0..items {
        let _ = writeln!(list, "- {}", alone.trim_end().replace('\n', "\n  "));
    }
    let took = |sources: Vec<Manifest>| {
        let began = Instant::now();
        let (_, report) = transform(&sources, &task());
        assert!(report.iter().all(|line| line.outcome == Outcome::Changed) && report.len() == items);
        began.elapsed()
    };
    let source = |text: &str| Manifest { name: "-".to_owned(), text: text.to_owned() };
    let apart = took((0..items).map(|_| source(&alone)).collect());
    let together = took(vec![source(&list)]);
    // Twenty times and more when the List was parsed anew for each operation.
    assert!(together < 4 * apart + Duration::from_millis(500), "{together:?}, and {apart:?} one by one");
}

#[test]
fn a_template_says_how_to_render_it() {
    for name in ["{{ .Release.Name }}", "{{- include \"name\" . }}\n  {{- end }}", "x\n{{- if .Values.x }}"] {
        let template =
            deployment("", "").replace("metadata: {name: web}", &format!("metadata:\n  name: {name}"));
        let (after, report) = done(&template, &task());
        assert_eq!(after, template);
        assert!(
            told(&report).contains("like a Helm template: render it first: helm template"),
            "{}",
            told(&report)
        );
    }
    assert!(!told(&done("a: [\n", &task()).1).contains("Helm"));
}

#[test]
fn numbers_with_a_tag_are_numbers() {
    round_trip(&deployment("", "").replace("containerPort: 8080", "containerPort: !!int \"8080\""));
}

#[test]
fn what_cannot_be_read_in_a_folder_keeps_nothing_else_from_it() {
    let dir = std::env::temp_dir().join(format!("lameduck-inject-unread-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let write = |file: &str, bytes: &[u8]| std::fs::write(dir.join(file), bytes).unwrap();
    write("a.yaml", b"\xff\xfea\0:\0");
    std::os::unix::fs::symlink("nowhere", dir.join("b.yaml")).unwrap();
    std::fs::File::create(dir.join("c.json")).unwrap().set_len((64 << 20) + 1).unwrap();
    write("d.yaml", deployment("", "").as_bytes());
    let out = lameduck(&["inject", dir.to_str().unwrap()], "");
    assert_eq!(out.status.code(), Some(2));
    let report = text(&out.stderr);
    for (file, why) in [
        ("a.yaml", "left as it is: it is not UTF-8"),
        ("b.yaml", "No such file"),
        ("c.json", "left as it is: it has over 64 MiB"),
        ("d.yaml", "deployment/web: injected"),
    ] {
        assert!(report.lines().any(|line| line.contains(file) && line.contains(why)), "{file}: {report}");
    }
    assert!(text(&out.stdout).starts_with("apiVersion: apps/v1"));
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn byte_order_marks_and_tabs_in_text_stay() {
    round_trip(&format!("\u{feff}{}", deployment("", "")));
    round_trip(&deployment("", "        env:\n        - name: A\t# a tab\n          value: \"a\tb\"\n"));
    let (after, report) = done(&deployment("\tx: 1\n", ""), &task());
    assert_eq!(after, deployment("\tx: 1\n", ""));
    assert!(matches!(report[0].outcome, Outcome::Failed(_)));
}
