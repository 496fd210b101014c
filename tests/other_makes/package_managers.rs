//! npm, yarn and pnpm in all versions in use: the script's server gets SIGTERM exactly once. On their own, none of them
//! forwards it that far. `.ci/run` installs them; each has a folder in `LIBRARIES` named after its version.
//!
//! ```text
//! npm install --prefix libraries npm6@npm:npm@6 … yarn4@npm:@yarnpkg/cli-dist@4 pnpm10@npm:pnpm@10
//! LIBRARIES=libraries cargo test --test other_makes package_managers -- --ignored --nocapture
//! ```

use crate::common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::process::{Lameduck, lameduck, temporary_directory};

/// Each package manager's script, and the directories of its versions.
const TABLE: [(&str, &[&str]); 3] = [
    ("bin/npm-cli.js", &["npm6", "npm7", "npm8", "npm9", "npm10", "npm11"]),
    ("bin/yarn.js", &["yarn1", "yarn2", "yarn3", "yarn4"]),
    ("bin/pnpm.cjs", &["pnpm6", "pnpm7", "pnpm8", "pnpm9", "pnpm10"]),
];

const SERVER: &str = "
    let heard = 0;
    process.on('SIGTERM', () => { console.log(`heard ${++heard}`); setTimeout(() => process.exit(0), 300) });
    require('http').createServer((req, res) => res.end('ok')).listen(process.env.PORT, '127.0.0.1');";

#[test]
#[ignore = "needs npm's npm, yarn and pnpm: LIBRARIES"]
fn the_server_behind_each_version_hears_sigterm_once() {
    let libraries = std::env::var_os("LIBRARIES").expect("LIBRARIES names the folder with the packages");
    let libraries = Path::new(&libraries).canonicalize().expect("the folder is there");
    let mut failed = Vec::new();
    for (program, folders) in TABLE {
        for folder in folders {
            let script = libraries.join("node_modules").join(folder).join(program);
            let ended = ended(script.to_str().expect("UTF-8"), folder);
            println!("{folder}: {ended}");
            if ended != "heard 1, in order" {
                failed.push(*folder);
            }
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

/// Runs `start` with this version; returns how often the server got SIGTERM, and how the run ended.
fn ended(script: &str, folder: &str) -> String {
    let dir = temporary_directory();
    fs::write(dir.join("server.js"), SERVER).expect("written");
    let package = r#"{ "name": "app", "version": "1.0.0", "scripts": { "start": "node server.js" } }"#;
    fs::write(dir.join("package.json"), package).expect("written");
    let quiet = [
        ("HOME", dir.to_str().expect("UTF-8")),
        ("YARN_ENABLE_TELEMETRY", "0"),
        // With `CI` set, yarn would refuse to write its lock file.
        ("YARN_ENABLE_IMMUTABLE_INSTALLS", "0"),
        ("npm_config_update_notifier", "false"),
    ];
    if folder.starts_with("yarn") {
        // From version 2 on, yarn starts nothing in a project that was not installed.
        fs::write(dir.join("yarn.lock"), "").expect("written");
        fs::write(dir.join(".yarnrc.yml"), "nodeLinker: node-modules\n").expect("written");
        let install = Command::new("node").args([script, "install"]).current_dir(&dir).envs(quiet).output();
        let install = install.expect("node starts");
        assert!(install.status.success(), "{folder}: {}", String::from_utf8_lossy(&install.stdout));
    }
    let mut program = lameduck();
    program.current_dir(&dir).envs(quiet);
    let args = ["--grace", "60s", "--reserve", "20s"];
    let mut run = Lameduck::start_as(program, &["run"], &args, &["node", script, "start"]);
    run.wait_log("the app listens");
    run.terminate();
    run.process.wait_exit();
    let output = run.process.output();
    let heard = output.lines().filter(|line| line.trim().starts_with("heard ")).count();
    let _ = fs::remove_dir_all(dir);
    let way = if output.contains("outlived") { "then killed" } else { "in order" };
    format!("heard {heard}, {way}")
}
