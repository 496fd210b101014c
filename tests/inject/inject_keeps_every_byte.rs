//! `lameduck inject` changes what it must, and not one byte more.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use lameduck::cli::{annotated_flags, check_proxy};
use lameduck::inject::Services;
use lameduck::inject::manifest::{Manifest, Outcome, ReportLine, Task, transform};
use lameduck::inject::{PatchSettings, yaml};

const SLOW: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/slow/deployment.yaml");

pub fn task() -> Task {
    let settings = PatchSettings {
        image: "lameduck:test".to_owned(),
        pull_policy: None,
        resources: Default::default(),
        token: String::new(),
        service_ports: vec![],
        services: Services::Seen,
        check: check_proxy,
        flags: annotated_flags,
    };
    Task::Inject {
        settings: Box::new(settings),
        seed: "seed".to_owned(),
        namespace: "default".to_owned(),
        kinds: vec![],
    }
}

pub fn done(text: &str, task: &Task) -> (String, Vec<ReportLine>) {
    let source = Manifest { name: "-".to_owned(), text: text.to_owned() };
    let (mut texts, report) = transform(&[source], task);
    (texts.remove(0), report)
}

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/inject").join(name)
}

/// `BLESS=1 cargo test` writes the expected files; review the difference before you commit it.
pub fn compare(name: &str, text: &str) {
    let path = golden(name);
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(expected == text, "{name} differs; expected content:\n{text}");
}

pub fn told(report: &[ReportLine]) -> String {
    let line = |line: &ReportLine| {
        let warnings = line.warnings.iter().map(|warning| format!("  warning: {warning}\n"));
        format!("{}: {:?}\n{}", line.what, line.outcome, warnings.collect::<String>())
    };
    report.iter().map(line).collect()
}

#[test]
fn the_slow_app_gets_its_sidecar_and_loses_it_again_without_a_trace() {
    let before = fs::read_to_string(SLOW).unwrap();
    let (after, _) = done(&before, &task());
    compare("slow.yaml", &after);
    let (again, report) = done(&after, &task());
    assert_eq!(again, after);
    assert!(report.iter().all(|line| line.outcome == Outcome::Unchanged));
    assert_eq!(done(&after, &Task::Uninject).0, before);
}

#[test]
fn every_kind_of_workload_list_style_and_trap_survives() {
    let before = fs::read_to_string(golden("kinds.before.yaml")).unwrap();
    let (after, report) = done(&before, &task());
    compare("kinds.yaml", &after);
    compare("kinds.report", &told(&report));
    assert_eq!(done(&after, &task()).0, after, "twice");
    assert_eq!(done(&after, &Task::Uninject).0, before, "uninject");
}

#[test]
fn windows_line_ends_and_a_missing_last_one_stay() {
    let before = fs::read_to_string(SLOW).unwrap().trim_end().replace('\n', "\r\n");
    let (after, _) = done(&before, &task());
    assert!(!after.replace("\r\n", "").contains('\n') && !after.ends_with('\n'));
    assert_eq!(after.replace("\r\n", "\n") + "\n", fs::read_to_string(golden("slow.yaml")).unwrap());
    assert_eq!(done(&after, &Task::Uninject).0, before);
}

#[test]
fn json_stays_json() {
    let slow = fs::read_to_string(golden("kinds.before.yaml")).unwrap();
    let first = slow.split("\n---").next().unwrap();
    let value = yaml::parse(first).unwrap().unwrap().to_json().unwrap();
    let before = serde_json::to_string_pretty(&value).unwrap();
    let (after, report) = done(&before, &task());
    assert_eq!(report[0].outcome, Outcome::Changed, "{}", told(&report));
    serde_json::from_str::<serde_json::Value>(&after).unwrap();
    assert_eq!(done(&after, &Task::Uninject).0, before);
}

/// `xorshift64*`: small, and the same on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

/// Damages real manifests at random: bytes, lines and ranges are moved, duplicated, removed and inserted.
fn damaged(text: &str, random: &mut Random) -> String {
    const BITS: [&str; 24] = [
        "---\n",
        "- ",
        ": ",
        "&a ",
        "*a",
        "<<: *a\n",
        "|\n",
        ">-\n",
        "{",
        "}",
        "[",
        "]",
        "'",
        "\"",
        "#",
        "\t",
        "? ",
        "!!str ",
        "\u{feff}",
        "\r\n",
        "é",
        "%YAML 1.1\n",
        "...\n",
        "~",
    ];
    let mut text = text.to_owned();
    for _ in 0..=random.below(3) {
        let place = |random: &mut Random, text: &str| {
            let mut at = random.below(text.len() + 1);
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            at
        };
        let (a, b) = (place(random, &text), place(random, &text));
        let (a, b) = (a.min(b), a.max(b).min(a.min(b) + 200));
        let b = (b..=text.len()).find(|b| text.is_char_boundary(*b)).unwrap();
        match random.below(4) {
            0 => text.replace_range(a..b, ""),
            1 => text = [&text[..b], &text[a..]].concat(),
            _ => text.insert_str(a, BITS[random.below(BITS.len())]),
        }
    }
    text
}

/// The output must contain every line of `before` in order, except in documents that changed.
#[test]
fn arbitrary_yaml_never_panics_and_loses_nothing() {
    lose_nothing(&[
        fs::read_to_string(golden("kinds.before.yaml")).unwrap(),
        fs::read_to_string(SLOW).unwrap(),
    ]);
}

/// Injects these manifests, damaged at random, and takes the sidecar out again.
pub fn lose_nothing(seeds: &[String]) {
    let rounds = std::env::var("ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(2000);
    let mut changed = 0;
    for seed in 1..=rounds {
        let mut random = Random(0x9e37_79b9 * seed);
        let whole = &seeds[random.below(seeds.len())];
        // Only one or two documents at a time, so that a broken one does not hide the others.
        let parts: Vec<&str> = whole.split_inclusive("\n---\n").collect();
        let part = parts[random.below(parts.len())];
        let before = damaged(part, &mut random);
        let (after, report) = done(&before, &task());
        let touched = report.iter().any(|line| line.outcome == Outcome::Changed);
        assert_eq!(touched, before != after, "seed {seed}: {}\n{before}", told(&report));
        if touched {
            changed += 1;
            assert_eq!(done(&after, &task()).0, after, "seed {seed}: twice\n{before}");
            assert_eq!(done(&after, &Task::Uninject).0, before, "seed {seed}: uninject\n{after}");
            kept(&before, &after, seed);
        }
    }
    assert!(changed > rounds / 20, "only {changed} of {rounds} were injected: too few to test anything");
}

/// Checks that only lines whose values the patch replaces were removed.
fn kept(before: &str, after: &str, seed: u64) {
    const MAY: [&str; 27] = [
        // A comment in a probe, which is replaced: it stands in the record.
        "The kubele",
        "safe-to-evict",
        "tcpSocket",
        "Seconds:",
        "Threshold:",
        "Probe:",
        "containerPort",
        "port",
        "Port",
        "PORT",
        "value",
        "terminationGrace",
        "preStop",
        "sleep",
        "seconds",
        "{",
        "httpGet",
        "path",
        "command",
        "exec",
        "excludeInbound",
        "shareProcess",
        "- sh",
        "\"-c\"",
        "lameduck",
        "}",
        "]",
    ];
    let diff = similar::TextDiff::from_lines(before, after);
    for change in diff.iter_all_changes().filter(|change| change.tag() == similar::ChangeTag::Delete) {
        let line = change.value();
        // The line was only extended.
        let longer = after.contains(line.trim_end());
        let may = longer || MAY.iter().any(|may| line.contains(may));
        assert!(may, "seed {seed}: lost {line:?} of\n{before}\n=>\n{after}");
    }
}

pub fn lameduck(args: &[&str], stdin: &str) -> Output {
    use std::io::Write;
    let mut child = Command::new(env!("CARGO_BIN_EXE_lameduck"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn exit_codes_tell_what_would_change_and_what_failed() {
    let before = fs::read_to_string(SLOW).unwrap();
    let check = lameduck(&["inject", "--check"], &before);
    assert_eq!((check.status.code(), check.stdout.len()), (Some(1), 0));
    let injected = text(&lameduck(&["inject", "-"], &before).stdout);
    let again = lameduck(&["inject", "--check", "--diff"], &injected);
    assert_eq!((again.status.code(), again.stdout.len()), (Some(0), 0));
    let broken = format!("{before}---\na: [\n");
    let out = lameduck(&["inject"], &broken);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("document 3: not understood"), "{}", text(&out.stderr));
    assert!(text(&out.stdout).ends_with("---\na: [\n"));
    assert_eq!(lameduck(&["inject", "/nowhere"], "").status.code(), Some(2));
    assert_eq!(lameduck(&["inject", "-", "--in-place"], "").status.code(), Some(2));
}

#[test]
fn the_diff_shows_what_would_change() {
    let out = text(&lameduck(&["inject", "--diff", SLOW], "").stdout);
    for line in [
        &format!("--- {SLOW}"),
        &format!("+++ {SLOW}"),
        "+            - name: LD_PRELOAD",
        "+      terminationGracePeriodSeconds: 60",
    ] {
        assert!(out.lines().any(|l| l == line), "{line} in\n{out}");
    }
}

#[test]
fn folders_are_changed_in_place_and_other_files_are_not() {
    let dir = std::env::temp_dir().join(format!("lameduck-inject-{}", std::process::id()));
    fs::create_dir_all(dir.join("sub/.git")).unwrap();
    let before = fs::read_to_string(SLOW).unwrap();
    let before = before.replace(
        "{app: slow}\n    spec",
        "{app: slow}\n      annotations: {lameduck.dev/capture: port-name}\n    spec",
    );
    let (deployment, service) = before.split_once("---\n").unwrap();
    let files = [
        ("a.yaml", deployment),
        ("sub/b.yml", service),
        ("sub/.git/c.yaml", before.as_str()),
        ("d.txt", &before),
    ];
    files.iter().for_each(|(name, text)| fs::write(dir.join(name), text).unwrap());
    let path = dir.to_str().unwrap();
    let joined = text(&lameduck(&["inject", path], "").stdout);
    assert_eq!(joined.lines().filter(|line| *line == "---").count(), 1);
    let out = lameduck(&["inject", "-i", path], "");
    assert_eq!((out.status.code(), out.stdout.len()), (Some(0), 0), "{}", text(&out.stderr));
    let now = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
    // A Service in another file is updated too.
    assert!(now("a.yaml").contains("containerPort: 4880") && now("sub/b.yml").contains("targetPort: http"));
    assert_eq!((now("sub/.git/c.yaml"), now("d.txt")), (before.clone(), before.clone()));
    assert_eq!(lameduck(&["inject", "--check", path], "").status.code(), Some(0));
    fs::remove_dir_all(dir).unwrap();
}
