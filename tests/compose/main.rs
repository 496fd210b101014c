//! On a real Docker Engine with Compose: the app is replaced under 60 clients, and no request is lost.
//!
//! ```text
//! LAMEDUCK_DOCKER=../shared/docker/engine cargo test --test compose -- --ignored --nocapture --test-threads 1
//! ```
//!
//! The engine's script knows `up`, and has a script beside it, in `../cluster/image`, that makes images of this machine's
//! files. `LAMEDUCK_IMAGE` names an image of lameduck that is there already, instead of building the Dockerfile's.

mod load;
mod stack;

use std::time::Instant;

use load::{HELD, LONG, Outcome};
use stack::{Stack, docker};

/// The figures that the README and an operator want.
fn tell(stack: &Stack, what: &str, outcome: &Outcome, service: &str) {
    let ((made, lost), pause, boot) = (outcome.counts(), outcome.pause(), stack.boot(service));
    println!(
        "{what}: {lost} of {made} lost; longest short request {pause:.1?}, the app's own boot {boot:.1?}"
    );
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn swap_replaces_a_plain_app() {
    let Some(stack) = Stack::up(true) else { return };
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
    let Some(stack) = Stack::up(true) else { return };
    stack.compose(&["up", "-d", "green"]);
    let load = stack.load(LONG);
    stack.must(&["switch", "green:3000"]);
    stack.compose(&["up", "-d", "--force-recreate", "app"]);
    let status = stack.must(&["status"]);
    assert!(status.contains("green:3000 (by lameduck switch; outranks --upstream)"), "{status}");
    stack.must(&["switch", "--back"]);
    stack.compose(&["rm", "-sf", "green"]);
    let outcome = load.finish();
    tell(&stack, "switch, there and back", &outcome, "app");
    outcome.expect_nothing_lost(300);
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn up_alone_replaces_an_app_with_run_as_its_entrypoint() {
    let Some(stack) = Stack::up(false) else { return };
    let load = stack.load(HELD);
    stack.compose(&["up", "-d", "--force-recreate", "app"]);
    let outcome = load.finish();
    tell(&stack, "up -d --force-recreate app", &outcome, "app");
    outcome.expect_nothing_lost(300);
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn the_app_is_scaled_out_and_in() {
    let Some(stack) = Stack::up(false) else { return };
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
fn a_restart_of_the_front_door_itself_is_told() {
    let Some(stack) = Stack::up(false) else { return };
    let load = stack.load(HELD);
    let began = Instant::now();
    stack.compose(&["restart", "front"]);
    let took = began.elapsed();
    let outcome = load.finish();
    let (made, lost) = outcome.counts();
    println!(
        "docker restart of the front door: {lost} of {made} lost in {took:.1?} ({}). Docker's port proxy takes \
         connections and resets them while nobody listens behind it, and these clients ask again at once. Restart it \
         when few come, or put a load balancer in front of two",
        outcome.losses()
    );
    assert!(lost < made, "nothing came through");
}

#[test]
#[ignore = "needs a Docker Engine: LAMEDUCK_DOCKER"]
fn the_image_runs_without_rights_and_is_steered_by_exec() {
    let Some(stack) = Stack::up(true) else { return };
    let id = stack.compose(&["ps", "-q", "front"]);
    let about = docker(&["inspect", "-f", "{{.Config.User}} {{.HostConfig.ReadonlyRootfs}}", id.trim()]);
    assert!(!about.starts_with("0") && !about.starts_with(' ') && about.trim().ends_with("true"), "{about}");
    stack.wait("healthy", || {
        docker(&["inspect", "-f", "{{.State.Health.Status}}", id.trim()]).trim() == "healthy"
    });
    stack.compose(&["exec", "-T", "front", "/lameduck", "hold", "--until-idle"]);
    // What the app asks for itself goes on, or it would wait for itself.
    let ask = "fetch('http://front:8080/').then((answer) => process.exit(answer.ok ? 0 : 1))";
    stack.compose(&["exec", "-T", "app", "node", "-e", ask]);
    stack.compose(&["exec", "-T", "front", "/lameduck", "resume"]);
}
