//! The repository follows its own rules: module layers, lengths, and the content of the docs.

mod modules;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

const MOST_LINES: usize = 500;
const MOST_LINES_OF_A_FUNCTION: usize = 70;

/// Files that may be longer, and why.
const LONG_FILES: [(&str, &str); 2] = [
    ("src/drain/machine.rs", "one state machine, whose rules depend on each other"),
    ("tests/drain/drain_machine.rs", "a simulation belongs next to the promises that it checks"),
];

/// Names that several types may have, and why.
const SHARED_NAMES: [(&str, &str); 3] = [
    ("Err", "the associated type of FromStr"),
    ("Head", "the associated type of Sink"),
    ("Data", "the associated type of a TLS side"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// All files of the repository under `dir` with this suffix: path from the root, with slashes, and text.
fn files(dir: &str, suffix: &str) -> Vec<(String, String)> {
    let (mut found, mut dirs) = (Vec::new(), vec![root().join(dir)]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).expect("a directory").map(|entry| entry.expect("an entry").path()) {
            let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if entry.is_dir() {
                if !["target", "node_modules", ".git"].contains(&name.as_str()) && !entry.is_symlink() {
                    dirs.push(entry);
                }
            } else if name.ends_with(suffix)
                && let Ok(text) = fs::read_to_string(&entry)
            {
                found.push((relative(&entry), text));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "nothing in {dir} ends with {suffix}");
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned()
}

fn expect_none(rule: &str, broken: &[String]) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

#[test]
fn a_type_has_a_name_of_its_own() {
    let mut places = BTreeMap::<String, Vec<String>>::new();
    for (path, text) in files("src", ".rs") {
        for line in text.split("\nmod tests {").next().unwrap_or_default().lines() {
            let words: Vec<&str> = line.split_whitespace().filter(|word| !word.starts_with("pub")).collect();
            let ["struct" | "enum" | "trait" | "type", name, ..] = words.as_slice() else { continue };
            let end = name.find(|c: char| !c.is_alphanumeric()).unwrap_or(name.len());
            places.entry(name[..end].to_owned()).or_default().push(path.clone());
        }
    }
    let shared = |name: &str| SHARED_NAMES.iter().any(|(shared, _)| *shared == name);
    let broken = places.into_iter().filter(|(name, places)| places.len() > 1 && !shared(name));
    let broken: Vec<_> = broken.map(|(name, places)| format!("{name}: {}", places.join(", "))).collect();
    expect_none("no two types of one name", &broken);
}

#[test]
fn files_are_short_enough_to_be_read() {
    let mut broken = Vec::new();
    let sources = ["src", "shim/src", "tests", "benches"].iter().flat_map(|dir| files(dir, ".rs"));
    for (path, text) in sources {
        let long = text.lines().count() > MOST_LINES;
        match (long, LONG_FILES.iter().any(|(allowed, _)| *allowed == path)) {
            (true, false) => broken.push(format!("{path}: {} lines", text.lines().count())),
            (false, true) => broken.push(format!("{path} is short now: take it off LONG_FILES")),
            _ => {}
        }
    }
    expect_none("no file over 500 lines without a reason", &broken);
}

#[test]
fn functions_are_short_enough_to_be_read() {
    let mut broken = Vec::new();
    let sources = ["src", "shim/src", "tests", "benches"].iter().flat_map(|dir| files(dir, ".rs"));
    for (path, text) in sources {
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| begins_function(line)) {
            // rustfmt sets the closing brace under the function's first character.
            let indent = &line[..line.len() - line.trim_start().len()];
            let ends = |line: &&str| line.strip_prefix(indent).is_some_and(|rest| rest.starts_with('}'));
            let one_line = line.ends_with('}') || line.ends_with(';');
            let length = 2 + lines[at + 1..].iter().take_while(|line| !ends(line)).count();
            if !one_line && length > MOST_LINES_OF_A_FUNCTION {
                broken.push(format!("{path}:{}: {length} lines", at + 1));
            }
        }
    }
    expect_none("no function over 70 lines", &broken);
}

fn begins_function(line: &str) -> bool {
    let mut words = line
        .split_whitespace()
        .skip_while(|word| word.starts_with("pub") || ["async", "const", "extern", "\"C\""].contains(word));
    words.next() == Some("fn")
}

#[test]
fn no_file_names_a_path_of_a_machine() {
    let checkout = format!("{}/", root().display());
    // Split, so that this file does not contain them.
    let mut places = vec![checkout];
    places.extend(["home", "Users", "root"].map(|place| format!("/{place}/")));
    let mut broken = Vec::new();
    for (path, text) in files("", "") {
        for (n, line) in text.lines().enumerate() {
            let found = places.iter().find(|place| line.contains(place.as_str()));
            broken.extend(found.map(|place| format!("{path}:{}: {place}", n + 1)));
        }
    }
    expect_none("no path of a machine", &broken);
}

#[test]
fn nothing_is_left_to_do() {
    // Split, so that this file does not contain them.
    let marks =
        [["TO", "DO"], ["FIX", "ME"], ["to", "do!("], ["unimpl", "emented!("]].map(|parts| parts.concat());
    let mut broken = Vec::new();
    for (path, text) in ["src", "shim/src", "tests", "benches"].iter().flat_map(|dir| files(dir, ".rs")) {
        for (n, line) in
            text.lines().enumerate().filter(|(_, line)| marks.iter().any(|mark| line.contains(mark)))
        {
            broken.push(format!("{path}:{}: {}", n + 1, line.trim()));
        }
    }
    expect_none("no stub and no note to oneself", &broken);
}

#[test]
fn every_file_says_first_what_it_is() {
    let mut broken = Vec::new();
    for (path, text) in ["src", "shim/src", "tests"].iter().flat_map(|dir| files(dir, ".rs")) {
        if !text.starts_with("//! ") {
            broken.push(path);
        }
    }
    expect_none("a file begins with `//!` and its purpose, a test's with its promise", &broken);
}

/// Files with unsafe code: the measurement that justifies it, or why nothing else works.
const UNSAFE_FILES: [(&str, &str); 9] = [
    ("src/allocator.rs", "CPU per gRPC call 49 → 28 µs"),
    ("src/proxy/socket.rs", "one ioctl; otherwise a scan of 8,000 sockets blocks a data thread for 117 ms"),
    (
        "src/supervise/spawn.rs",
        "only the child itself can set its parent death signal, between fork and exec",
    ),
    ("src/upstream/source.rs", "one setsockopt; otherwise 28,000 connections a minute use up the ports"),
    ("shim/src/bind.rs", "the pointer that the app passes to bind(2)"),
    ("shim/src/environment.rs", "the environment before main, which no libc has read yet"),
    ("shim/src/exports.rs", "functions that C calls"),
    ("shim/src/pid1.rs", "a signal handler without a libc"),
    ("shim/src/sys.rs", "system calls without a libc"),
];

#[test]
fn unsafe_code_stays_in_its_own_module() {
    let manifest: Vec<String> = read("Cargo.toml").lines().map(str::to_owned).collect();
    assert!(manifest.iter().any(|line| line == "unsafe_code = \"deny\""), "Cargo.toml, [lints.rust]");
    let mut allowed: Vec<_> = ["src", "shim/src"]
        .iter()
        .flat_map(|dir| files(dir, ".rs"))
        .filter(|(_, text)| text.contains("(unsafe_code"))
        .map(|(path, _)| path)
        .collect();
    allowed.retain(|path| !UNSAFE_FILES.iter().any(|(file, _)| file == path));
    expect_none("no unsafe code without a measured reason", &allowed);
}

/// A Markdown text without its blocks of code.
fn outside_blocks(text: &str) -> String {
    text.split("```").step_by(2).collect()
}

/// Text between single backquotes.
fn code_spans(text: &str) -> Vec<String> {
    outside_blocks(text).split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn the_user_docs_name_only_what_exists() {
    let mut help = String::new();
    for command in ["proxy", "run", "drain", "status", "hold", "swap", "switch", "inject", "webhook"] {
        let shown = Command::new(env!("CARGO_BIN_EXE_lameduck")).args([command, "--help"]).output();
        help += &String::from_utf8_lossy(&shown.expect("lameduck starts").stdout);
    }
    let mut broken = Vec::new();
    let mut pages = files("docs", ".md");
    pages.extend(["README.md", "SECURITY.md"].map(|page| (page.to_owned(), read(page))));
    for (page, span) in
        pages.iter().flat_map(|(page, text)| code_spans(text).into_iter().map(move |span| (page, span)))
    {
        let word = span.split_whitespace().next().unwrap_or_default();
        let is_flag = word.starts_with("--") && !help.contains(&format!(" {word} "));
        let is_flag = is_flag && !help.contains(&format!(" {word}\n"));
        let is_file = ["tests/", "src/", "benches/", "examples/", "docs/", "manifests/"]
            .iter()
            .any(|dir| word.starts_with(dir));
        if is_flag || is_file && !root().join(word).exists() {
            broken.push(format!("{page}: {span}"));
        }
    }
    expect_none("the docs name a flag or a file that does not exist", &broken);
}

/// The anchors of a page's headings, as GitHub makes them.
fn anchors(text: &str) -> Vec<String> {
    let outside = outside_blocks(text);
    let headings =
        outside.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let kept = |c: &char| c.is_alphanumeric() || " -_".contains(*c);
    headings
        .map(|heading| heading.to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-"))
        .collect()
}

#[test]
fn links_in_the_docs_lead_somewhere() {
    let mut broken = Vec::new();
    for (page, text) in files("", ".md") {
        let outside = outside_blocks(&text);
        let targets = outside.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.starts_with("http")) {
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let folder = root().join(&page).parent().expect("the page's folder").to_owned();
            let file = if path.is_empty() { root().join(&page) } else { folder.join(path) };
            let found = file.exists()
                && (anchor.is_empty()
                    || fs::read_to_string(&file)
                        .is_ok_and(|text| anchors(&text).iter().any(|name| name == anchor)));
            if !found {
                broken.push(format!("{page}: {target}"));
            }
        }
    }
    expect_none("a link to a file or a heading that does not exist", &broken);
}

#[test]
fn every_test_is_listed_with_its_promise() {
    let promises = read("docs/promises.md");
    // Not the helpers, and not the cases on real engines, for which the docs list main.rs.
    let not_listed = ["tests/common/", "tests/compose/", "tests/kubernetes/"];
    let mut tests: Vec<_> = files("tests", ".rs").into_iter().map(|(path, _)| path).collect();
    tests.retain(|path| !path.ends_with("/main.rs") && !not_listed.iter().any(|dir| path.starts_with(dir)));
    tests.retain(|path| !promises.contains(&format!("`{path}`")));
    expect_none("a test that docs/promises.md does not list", &tests);
}

#[test]
fn the_readme_is_short() {
    let lines = read("README.md").lines().count();
    assert!(lines <= 150, "README.md has {lines} lines; details belong in docs/");
}

#[test]
fn one_command_runs_the_tests_everywhere() {
    for path in ["README.md", "CONTRIBUTING.md", ".ci/run", "justfile"] {
        let tests = read(path).lines().any(|line| line.trim().starts_with("cargo test --locked"));
        assert!(tests, "{path} has the line `cargo test --locked`");
    }
}

#[test]
fn the_image_is_built_by_the_pinned_toolchain() {
    let pinned = read("rust-toolchain.toml");
    let minor =
        pinned.split('"').nth(1).and_then(|version| version.rsplit_once('.')).expect("channel = \"X.Y.Z\"").0;
    assert!(
        read("Dockerfile").contains(&format!("FROM rust:{minor}-alpine")),
        "Dockerfile: rust:{minor}-alpine"
    );
}
