//! Builds for the cluster: lameduck, the load client, and the images.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::cluster::run;

/// The sidecar's image.
pub const LAMEDUCK: &str = "lameduck:0.1.0";

/// The example apps, each with `node server.js` as PID 1: image and directory.
const APPS: [(&str, &str); 3] = [("slow:1.0.0", "slow"), ("chat:1.0.0", "chat"), ("front:1.0.0", "front")];

/// The static binary: `$LAMEDUCK_BIN`, or built once.
pub fn lameduck() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        std::env::var_os("LAMEDUCK_BIN").map_or_else(
            || {
                let target = "x86_64-unknown-linux-musl";
                run(cargo().args(["build", "--release", "--bin", "lameduck", "--target", target]));
                target_dir().join(target).join("release/lameduck")
            },
            PathBuf::from,
        )
    })
}

/// Builds everything and loads the images onto the nodes.
pub fn put(engine: &Path) {
    run(cargo().args(["build", "--example", "load"]));
    let ours = format!("{}:/lameduck", text(lameduck()));
    image(engine, LAMEDUCK, &["--file", &ours, "--entrypoint", r#"["/lameduck"]"#]);

    let node = node();
    for (name, folder) in APPS {
        let app = format!("{}:/app", text(&app(folder)));
        let start = r#"["node", "server.js"]"#;
        let parts = ["--program", &node, "--file", &app, "--workdir", "/app", "--entrypoint", start];
        image(engine, name, &parts);
        if folder == "slow" {
            // The app and lameduck in one image, for `lameduck run`.
            let in_path = format!("{}:/usr/local/bin/lameduck", text(lameduck()));
            image(engine, "slow-with-lameduck:1.0.0", &[&parts[..6], &["--file", &in_path]].concat());
        }
    }
    let start = r#"["nginx", "-c", "/config/nginx.conf"]"#;
    image(engine, "nginx:1", &["--program", "/usr/sbin/nginx:/usr/local/bin/nginx", "--entrypoint", start]);
}

/// Node and its place in an image.
pub fn node() -> String {
    let node = Command::new("node").args(["-p", "process.execPath"]).output().expect("node");
    format!("{}:/usr/local/bin/node", String::from_utf8_lossy(&node.stdout).trim())
}

/// An example with its npm packages, if it has any.
fn app(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name);
    if !folder.join("package-lock.json").exists() {
        return folder;
    }
    let copy = scratch(name);
    run(Command::new("cp").arg("-rT").args([&folder, &copy]));
    run(Command::new("npm").args(["ci", "--silent", "--no-audit", "--no-fund"]).current_dir(&copy));
    copy
}

/// Builds an image and loads it onto the nodes.
pub fn image(engine: &Path, name: &str, arguments: &[&str]) {
    let file = scratch(&format!("{name}.tar"));
    run(Command::new(engine.with_file_name("image")).arg(name).arg(&file).args(arguments));
    run(Command::new(engine).arg("load").arg(&file));
}

fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    // What cargo sets for a test would make build scripts run again, now and after it.
    let of_a_test = |name: &String| {
        name == "OUT_DIR" || name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
    };
    for name in std::env::vars().map(|(name, _)| name).filter(of_a_test) {
        cargo.env_remove(name);
    }
    cargo
}

/// Path of a temporary file or directory of these tests.
pub fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Cargo's target directory: two levels above this test program.
pub fn target_dir() -> PathBuf {
    let me = std::env::current_exe().expect("a path");
    me.ancestors().nth(3).expect("target/debug/deps/me").to_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
