//! Node gets the preload appended to what its image has in NODE_OPTIONS, in its own environment; others get nothing.

use std::path::PathBuf;
use std::process::Command;

use crate::{file, output, preloaded};

const SAYS: &str = "console.log(process.env.NODE_OPTIONS, globalThis.preloads)";

/// A preload that counts how often it runs.
fn preload() -> PathBuf {
    file("counting.js", "globalThis.preloads = (globalThis.preloads || 0) + 1;")
}

fn node(options: Option<&str>) -> Command {
    let mut node = preloaded("node");
    node.env("LAMEDUCK_NODE_PRELOAD", preload());
    options.map(|options| node.env("NODE_OPTIONS", options));
    node
}

#[test]
fn node_keeps_its_options_and_runs_the_preload() {
    let require = format!("--require {}", preload().display());
    let kept = "--max-old-space-size=100";
    for (options, expected) in [
        (None, format!(" {require} 1\n")),
        (Some(""), format!(" {require} 1\n")),
        (Some(kept), format!("{kept} {require} 1\n")),
        // As for a child of Node.
        (Some(&*require), format!("{require} 1\n")),
    ] {
        assert_eq!(output(node(options).args(["-e", SAYS])), expected, "{options:?}");
    }
    let limit = "console.log(require('v8').getHeapStatistics().heap_size_limit < 200e6, globalThis.preloads)";
    assert_eq!(output(node(Some(kept)).args(["-e", limit])), "true 1\n");
}

#[test]
fn a_child_of_node_runs_it_once() {
    let script =
        format!("console.log(require('child_process').execFileSync('node', ['-e', {SAYS:?}]).toString())");
    assert!(output(node(None).args(["-e", &script])).contains(" 1\n"));
}

#[test]
fn nothing_else_changes() {
    let variables = ["sh", "-c", "echo ${NODE_OPTIONS-none} $LAMEDUCK_NODE_PRELOAD"];
    let mut shell = preloaded(variables[0]);
    let said = output(shell.args(&variables[1..]).env("LAMEDUCK_NODE_PRELOAD", preload()));
    assert_eq!(said, format!("none {}\n", preload().display()));
    let script = "process.argv.length && console.log(process.env.NODE_OPTIONS)";
    assert_eq!(output(preloaded("node").args(["-e", script])), "undefined\n");
    let mut empty = preloaded("node");
    assert_eq!(output(empty.args(["-e", script]).env("LAMEDUCK_NODE_PRELOAD", "")), "undefined\n");
}

/// Node's permissions would forbid the file, and Node would not start.
#[test]
fn a_restricted_node_starts_without_it() {
    for flag in ["--permission", "--experimental-permission"] {
        if !Command::new("node").args([flag, "-e", ""]).output().unwrap().status.success() {
            eprintln!("LEFT OUT: this Node has no {flag}");
            continue;
        }
        assert_eq!(output(node(None).args([flag, "-e", SAYS])), "undefined undefined\n");
        assert_eq!(output(node(Some(flag)).args(["-e", SAYS])), format!("{flag} undefined\n"));
    }
}
