//! On a real Docker Engine with Compose: the app is replaced under 60 clients, and no request is lost.
//!
//! ```text
//! LAMEDUCK_DOCKER=../shared/docker/engine cargo test --test compose -- --ignored --nocapture --test-threads 1
//! ```
//!
//! The engine's script has an `up` command; `../cluster/image` next to it makes images of this machine's files.
//! `LAMEDUCK_BIN` names a static binary to test instead of building one with the Dockerfile.

mod load;
mod stack;

use std::process::Command;
use std::time::Instant;

use load::{HELD, LONG, Outcome};
use stack::{Stack, docker, dockerfile};

/// A plain app, without lameduck in its image.
const PLAIN: &[&str] = &["examples/compose/compose.plain.yaml"];
/// The app with `lameduck run` as its entrypoint.
const RUN: &[&str] = &[];
/// The same, with a front door that another one can replace.
const TWO_DOORS: &[&str] = &["examples/compose/compose.front.yaml", "tests/compose/compose.front.yaml"];

/// With TLS at the front door.
const TLS: &[&str] = &["examples/compose/compose.tls.yaml"];

/// Prints the figures for the README and for operators.
fn tell(stack: &Stack, what: &str, outcome: &Outcome, service: &str) {
    let ((made, lost), pause, boot) = (outcome.counts(), outcome.pause(), stack.boot(service));
    println!(
        "{what}: {lost} of {made} lost; slowest short request {pause:.1?}, boot time of the app {boot:.1?}"
    );
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn swap_replaces_a_plain_app() {
    let Some(stack) = Stack::up(PLAIN) else { return };
    let load = stack.load(HELD);
    let recreate = stack.compose_command(&["up", "-d", "--force-recreate", "app"]);
    let recreate: Vec<&str> = recreate.iter().map(String::as_str).collect();
    let said = stack.must(&[&["swap", "--"][..], &recreate].concat());
    assert!(said.contains("swapped in "), "{said}");
    let outcome = load.finish();
    tell(&stack, "swap", &outcome, "app");
    outcome.expect_nothing_lost(300);
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn switch_goes_to_green_and_back() {
    let Some(stack) = Stack::up(PLAIN) else { return };
    stack.compose(&["up", "-d", "green"]);
    let load = stack.load(LONG);
    stack.must(&["switch", "green:3000"]);
    stack.compose(&["up", "-d", "--force-recreate", "app"]);
    let status = stack.must(&["status"]);
    assert!(status.contains("green:3000 (set by lameduck switch; overrides --upstream)"), "{status}");
    stack.must(&["switch", "--back"]);
    stack.compose(&["rm", "-sf", "green"]);
    let outcome = load.finish();
    tell(&stack, "switch, there and back", &outcome, "app");
    outcome.expect_nothing_lost(300);
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn up_alone_replaces_an_app_with_run_as_its_entrypoint() {
    let Some(stack) = Stack::up(RUN) else { return };
    let load = stack.load(HELD);
    stack.compose(&["up", "-d", "--force-recreate", "app"]);
    let outcome = load.finish();
    tell(&stack, "up -d --force-recreate app", &outcome, "app");
    outcome.expect_nothing_lost(300);
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn the_app_is_scaled_out_and_in() {
    let Some(stack) = Stack::up(RUN) else { return };
    let load = stack.load(LONG);
    stack.compose(&["up", "-d", "--scale", "app=3", "--no-recreate"]);
    stack.wait("three servers are in use", || {
        let output = stack.lameduck(&["status", "--json"]);
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let servers = status["servers"].as_array().cloned().unwrap_or_default();
        servers.len() == 3 && servers.iter().all(|server| server["in_flight"].as_u64() > Some(0))
    });
    stack.compose(&["up", "-d", "--scale", "app=1", "--no-recreate"]);
    let outcome = load.finish();
    tell(&stack, "--scale app=1 -> 3 -> 1", &outcome, "app");
    outcome.expect_nothing_lost(300);
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn a_restart_of_the_front_door_itself_is_measured() {
    let Some(stack) = Stack::up(RUN) else { return };
    let load = stack.load(HELD);
    let began = Instant::now();
    stack.compose(&["restart", "front"]);
    let took = began.elapsed();
    let outcome = load.finish();
    let (made, lost) = outcome.counts();
    println!(
        "docker restart of the front door: {lost} of {made} lost in {took:.1?} ({}). It finished the requests that it \
        had accepted. From then until the new process listens, new connections are refused (at a published port, \
        Docker's proxy accepts and closes them), and these clients retry at once. To lose nothing, let another \
        front door take over, as in examples/compose/README.md",
        outcome.losses()
    );
    assert!(lost < made, "every request was lost");
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn another_front_door_takes_over_and_gives_back() {
    let Some(stack) = Stack::up(TWO_DOORS) else { return };
    let load = stack.load(HELD);
    stack.compose(&["up", "-d", "--wait", "other"]);
    stack.compose(&["up", "-d", "--wait", "--force-recreate", "front"]);
    stack.compose(&["rm", "-sf", "other"]);
    let outcome = load.finish();
    tell(&stack, "the front door replaced beside another", &outcome, "app");
    outcome.expect_nothing_lost(300);
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn the_front_door_speaks_tls() {
    let certificate = stack::certificate();
    let Some(stack) = Stack::up(TLS) else { return };
    let published = stack.compose(&["port", "front", "8443"]);
    let port = published.trim().rsplit(':').next().expect("a port");
    let to = format!("localhost:{port}:127.0.0.1");
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--cacert"]).arg(certificate).args(["--resolve", &to, "-w", " by %{http_version}"]);
    let output = curl.arg(format!("https://localhost:{port}/")).output().expect("curl");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.ends_with(" by 2"), "{text} {output:?}");
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn the_dockerfile_builds() {
    dockerfile();
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn the_image_runs_unprivileged_and_is_controlled_by_exec() {
    let Some(stack) = Stack::up(PLAIN) else { return };
    let id = stack.compose(&["ps", "-q", "front"]);
    let about = docker(&["inspect", "-f", "{{.Config.User}} {{.HostConfig.ReadonlyRootfs}}", id.trim()]);
    assert!(!about.starts_with("0") && !about.starts_with(' ') && about.trim().ends_with("true"), "{about}");
    stack.wait("healthy", || {
        docker(&["inspect", "-f", "{{.State.Health.Status}}", id.trim()]).trim() == "healthy"
    });
    stack.compose(&["exec", "-T", "front", "/lameduck", "hold", "--until-idle"]);
    // The app's own requests are not held, otherwise the app and the hold would wait for each other.
    let ask = "fetch('http://front:8080/').then((answer) => process.exit(answer.ok ? 0 : 1))";
    stack.compose(&["exec", "-T", "app", "node", "-e", ask]);
    stack.compose(&["exec", "-T", "front", "/lameduck", "resume"]);
}
