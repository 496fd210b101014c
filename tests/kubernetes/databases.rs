//! Databases, captured by annotation: clients work, and a drain waits for what the server owes an answer.

use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::cluster::{Namespace, engine, inside};
use super::deploy::inject;
use super::images::image;
use super::recipes;

const DATABASES: &str = include_str!("databases.yaml");

/// Time limit for a query to be seen by its server.
const LIMIT: Duration = Duration::from_secs(60);

/// A client of MariaDB or Redis on the cluster's network.
fn client(ns: &Namespace, database: &str, arguments: &[&str]) -> Command {
    let address = ns.address(database);
    let (host, port) = address.split_once(':').expect("a port");
    let mut command = inside(if database == "redis" { "redis-cli" } else { "mariadb" });
    if database == "mariadb" {
        command.args(["--no-defaults", "--protocol=tcp", "--skip-column-names", "-P", port]);
    } else {
        command.args(["-p", port]);
    }
    command.args(["-h", host]).args(arguments);
    command
}

fn ask(ns: &Namespace, database: &str, arguments: &[&str]) -> String {
    let output = client(ns, database, arguments).output().expect("the client");
    answer(&output)
}

fn answer(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && error.is_empty(), "{:?} {error}", output.status);
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn start(ns: &Namespace, database: &str, arguments: &[&str]) -> Child {
    let mut client = client(ns, database, arguments);
    client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the client")
}

/// Asks until the answer contains this text. A Service's address refuses connections until kube-proxy knows its pod.
fn wait_answer(ns: &Namespace, database: &str, arguments: &[&str], text: &str) {
    let end = Instant::now() + LIMIT;
    loop {
        let output = client(ns, database, arguments).output().expect("the client");
        if output.status.success() && String::from_utf8_lossy(&output.stdout).contains(text) {
            return;
        }
        assert!(Instant::now() < end, "{database}: no {text} within {LIMIT:?}: {output:?}");
        sleep(Duration::from_millis(100));
    }
}

/// Waits until both answer.
fn wait_reachable(ns: &Namespace) {
    wait_answer(ns, "redis", &["PING"], "PONG");
    wait_answer(ns, "mariadb", &["-e", "SELECT 6 * 7"], "42");
}

#[test]
#[ignore = "needs a cluster"]
fn a_drain_of_mariadb_or_redis_cuts_no_query() {
    let Some(ns) = Namespace::new("databases") else { return };
    let Some(parts) = recipes::databases() else { return eprintln!("LEFT OUT: no MariaDB or no Redis here") };
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    image(&engine().expect("an engine"), "databases:1", &parts);
    ns.apply(&inject(DATABASES));
    ns.rolled_out();
    wait_reachable(&ns);
    assert_eq!(ask(&ns, "redis", &["SET", "before", "kept"]), "OK");
    assert_eq!(ask(&ns, "redis", &["GET", "before"]), "kept");

    // Longer than the connection may be quiet.
    let query = start(&ns, "mariadb", &["-e", "SELECT SLEEP(15), 'slept'"]);
    let pop = start(&ns, "redis", &["BLPOP", "queue", "60"]);
    wait_answer(&ns, "mariadb", &["-e", "SHOW PROCESSLIST"], "SLEEP(15)");
    wait_answer(&ns, "redis", &["CLIENT", "LIST"], "cmd=blpop");
    let pods = ns.living();
    let redis = pods.iter().find(|name| name.starts_with("redis")).expect("a pod of Redis");
    let delete: Vec<&str> =
        ["delete", "pod", "--wait=false"].into_iter().chain(pods.iter().map(String::as_str)).collect();
    ns.kubectl(&delete);
    ns.pods.wait("the draining phase", |seen| {
        pods.iter().all(|pod| seen[pod].line("new connections are refused").is_some())
    });
    // By then a quiet connection would be closed.
    sleep(Duration::from_secs(7));
    ns.kubectl(&["exec", redis, "-c", "redis", "--", "redis-cli", "RPUSH", "queue", "pushed"]);
    assert_eq!(answer(&pop.wait_with_output().expect("it ends")), "queue\npushed");
    assert_eq!(answer(&query.wait_with_output().expect("it ends")), "0\tslept");
    ns.pods.expect_clean_drains(2, super::pods::GONE_WITHIN);

    ns.rolled_out();
    wait_reachable(&ns);
}
