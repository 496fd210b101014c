//! The API server accepts our manifests, with strict validation.

use std::fs;
use std::path::{Path, PathBuf};

use super::cluster::{Namespace, inside, kubectl_with};
use super::deploy::{inject, plain};
use super::webhook;

/// One object of each kind that `inject` supports, valid for the API server and for `restricted`.
const KINDS: &str = include_str!("kinds.yaml");

/// Custom resources that are not installed on this cluster.
const FOREIGN: [&str; 4] = [
    r#""Certificate" in version "cert-manager.io/v1""#,
    r#""Issuer" in version "cert-manager.io/v1""#,
    r#""ClusterIssuer" in version "cert-manager.io/v1""#,
    r#""PodMonitor" in version "monitoring.coreos.com/v1""#,
];

#[test]
#[ignore = "needs a cluster"]
fn the_api_server_takes_what_inject_writes() {
    let Some(ns) = Namespace::new("dry-run") else { return };
    takes(&ns, "every kind", &inject(KINDS));
    takes(&ns, "the slow app", &inject(&plain(&[])));
    takes(&ns, "jobs", &inject(include_str!("jobs.yaml")));
    takes(&ns, "the slow app, ordinary", &inject(&plain(&[("grace: 75s", "sidecar: ordinary")])));
}

#[test]
#[ignore = "needs a cluster"]
fn the_api_server_takes_every_manifest() {
    let Some(ns) = Namespace::new("manifests") else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests");
    if folder.join("install.yaml").exists() {
        // A dry run of objects in its namespace needs the namespace to exist.
        webhook::installed();
    }
    let mut files = Vec::new();
    let mut kustomizations = Vec::new();
    find(&folder, &mut files, &mut kustomizations);
    assert!(!files.is_empty());
    for file in files {
        takes(&ns, &file.display().to_string(), &fs::read_to_string(&file).expect("a manifest"));
    }
    for folder in kustomizations {
        let built = inside("kubectl").arg("kustomize").arg(&folder).output().expect("kubectl");
        assert!(built.status.success(), "{}: {}", folder.display(), String::from_utf8_lossy(&built.stderr));
        takes(&ns, &folder.display().to_string(), &String::from_utf8_lossy(&built.stdout));
    }
}

/// Finds manifests to apply and directories to build with kustomize, but no templates of a chart.
fn find(folder: &Path, files: &mut Vec<PathBuf>, kustomizations: &mut Vec<PathBuf>) {
    if folder.join("Chart.yaml").exists() {
        return;
    }
    let kustomization = fs::read_to_string(folder.join("kustomization.yaml"));
    let kustomized = kustomization.is_ok();
    // A component is built as part of the overlays that use it.
    if kustomization.is_ok_and(|text| !text.contains("kind: Component")) {
        kustomizations.push(folder.to_owned());
    }
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            find(&path, files, kustomizations);
        } else if !kustomized && path.extension().is_some_and(|extension| extension == "yaml") {
            files.push(path);
        }
    }
}

/// Applies the objects as a dry run on the server, which only omits the write. Objects without a namespace go into
/// this one.
///
/// # Panics
/// If the server rejects an object or warns about it.
pub fn takes(ns: &Namespace, what: &str, yaml: &str) {
    let apply = ["apply", "--dry-run=server", "--validate=strict", "-f", "-"];
    let here: &[&str] = if yaml.contains("\n  namespace: ") { &[] } else { &["--namespace", ns.name] };
    let output = kubectl_with(yaml, &[&apply, here].concat());
    let (taken, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let unknown =
        |line: &&str| FOREIGN.iter().any(|api| line.contains(&format!("no matches for kind {api}")));
    let complaints: Vec<_> = said
        .lines()
        .filter(|line| !unknown(line) && *line != "ensure CRDs are installed first")
        .filter(|line| !line.is_empty())
        .collect();
    println!("{}: {what}: {} objects accepted", ns.name, taken.lines().count());
    assert!(complaints.is_empty() && !taken.is_empty(), "{what}: {complaints:#?}");
}
