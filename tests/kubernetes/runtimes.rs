//! Capture with many runtimes: apps that know nothing of lameduck lose nothing in rolling restarts. Their ports have no
//! name and are not declared; their Services lead to numbers.

use std::io::Read;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::WARM;
use super::cluster::{Namespace, engine, inside};
use super::deploy::inject;
use super::images::image;
use super::load::Load;
use super::pods::GONE_WITHIN;
use super::recipes::{self, apps};

/// A Deployment with its Service.
const APP: &str = include_str!("runtimes/app.yaml");

/// One image for all of them.
const IMAGE: &str = "runtimes:1";

/// What the Node apps can serve, the slow one of the examples.
const ALL: &str = "keep-alive:1,new:1,slow:2,long:1,stream:1,upload:1,download:1,idle:1,events:1";
/// What the other apps can serve.
pub const PLAIN: &str = "keep-alive:1,new:1,slow:2,stream:1,upload:1,idle:1";
/// What nginx can serve by itself.
pub const STATIC: &str = "keep-alive:1,new:1,slow:2,upload:1,idle:1";

/// The app that speaks HTTP on one port and gRPC on another.
const TWO_PORTS: &str = "two-ports";
/// The Service of its second port.
const GRPC: &str = "
apiVersion: v1
kind: Service
metadata: {name: grpc}
spec:
  selector: {app: two-ports}
  ports: [{port: 80, targetPort: 50051}]
---
";

/// Number of requests that each app serves at least.
const REQUESTS: u64 = 300;

/// What a server takes for its own shutdown after the drain: gunicorn waits for kept connections, 2 s, and its workers.
const OWN_END: Duration = Duration::from_secs(4);

/// Number of Deployments that are restarted at a time: more only wait for the processor, their clients too.
const AT_ONCE: usize = 4;

/// One row of the matrix.
struct Runtime {
    /// Name of the Deployment and the Service.
    name: &'static str,
    /// What the image needs; none if something can't be had here.
    recipe: fn() -> Option<Vec<String>>,
    /// Commands of the containers.
    commands: &'static [&'static str],
    env: &'static [(&'static str, &'static str)],
    /// Number that the Service leads to.
    port: u16,
    /// Clients of the load.
    kinds: &'static str,
}

const RUNTIMES: &[Runtime] = &[
    Runtime {
        name: "node-port-80",
        recipe: recipes::node_apps,
        commands: &["node /slow/server.js"],
        env: &[("PORT", "80")],
        port: 80,
        kinds: ALL,
    },
    Runtime {
        name: "node-cluster",
        recipe: recipes::node_apps,
        commands: &["node /apps/cluster.js"],
        env: &[],
        port: 3000,
        kinds: ALL,
    },
    // Its port for gRPC has clients of its own.
    Runtime {
        name: TWO_PORTS,
        recipe: recipes::node_apps,
        commands: &["node /apps/grpc.js"],
        env: &[],
        port: 3000,
        kinds: ALL,
    },
    // Its server binds the pod's name, which the kubelet sets as HOSTNAME.
    Runtime {
        name: "next",
        recipe: recipes::next,
        commands: &["node /next/server.js"],
        env: &[],
        port: 3000,
        kinds: PLAIN,
    },
    Runtime {
        name: "gunicorn",
        recipe: recipes::python,
        commands: &["python3 -m gunicorn --bind 0.0.0.0:8000 --workers 2 --threads 12 wsgi:app"],
        env: &[],
        port: 8000,
        kinds: PLAIN,
    },
    Runtime {
        name: "uvicorn",
        recipe: recipes::python,
        commands: &["python3 -m uvicorn --host 0.0.0.0 --workers 2 asgi:app"],
        env: &[],
        port: 8000,
        kinds: PLAIN,
    },
    Runtime {
        name: "java",
        recipe: recipes::java,
        commands: &["/java/bin/java -Xmx64m -cp /classes App"],
        env: &[],
        port: 8080,
        kinds: PLAIN,
    },
    Runtime {
        name: "nginx",
        recipe: recipes::nginx,
        commands: &["nginx -c /apps/nginx.conf"],
        env: &[],
        port: 80,
        kinds: STATIC,
    },
    Runtime {
        name: "php",
        recipe: recipes::php,
        commands: &["php -S 0.0.0.0:8080 /apps/index.php"],
        env: &[("PHP_CLI_SERVER_WORKERS", "12")],
        port: 8080,
        kinds: PLAIN,
    },
    Runtime {
        name: "two-containers",
        recipe: recipes::nginx_and_fpm,
        commands: &["nginx -c /apps/nginx-fpm.conf", "php-fpm --fpm-config /apps/fpm.conf"],
        env: &[],
        port: 8080,
        kinds: PLAIN,
    },
    Runtime {
        name: "bun",
        recipe: recipes::bun,
        commands: &["bun /apps/bun.js"],
        env: &[],
        port: 8080,
        kinds: PLAIN,
    },
    Runtime {
        name: "deno",
        recipe: recipes::deno,
        commands: &["deno run --allow-net /apps/deno.js"],
        env: &[("DENO_DIR", "/tmp")],
        port: 8080,
        kinds: PLAIN,
    },
];

impl Runtime {
    fn manifest(&self) -> String {
        app(self.name, IMAGE, self.commands, self.env, self.port)
    }
}

/// A captured Deployment of two pods with a container for each command, and the Service that leads to this port. Only the
/// first container has a probe.
pub fn app(name: &str, image: &str, commands: &[&str], env: &[(&str, &str)], port: u16) -> String {
    let env: Vec<_> = env.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
    let container = |(n, command): (usize, &&str)| {
        let mut container = json!({
            "name": format!("app{n}"),
            "image": image,
            "imagePullPolicy": "Never",
            "command": command.split(' ').collect::<Vec<_>>(),
            "env": env,
            "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
        });
        if n == 0 {
            let get = json!({"path": "/", "port": port});
            container["readinessProbe"] = json!({"httpGet": get, "periodSeconds": 2, "timeoutSeconds": 5});
        }
        container
    };
    let containers: Vec<_> = commands.iter().enumerate().map(container).collect();
    APP.replace("NAME", name)
        .replace("CONTAINERS", &json!(containers).to_string())
        .replace("NUMBER", &port.to_string())
}

/// The rows whose programs can be had here, with the image built; the others are printed.
fn built() -> Vec<&'static Runtime> {
    let folder = format!("{}:/apps", apps().display());
    let mut parts = vec!["--file".to_owned(), folder];
    let mut rows = Vec::new();
    for runtime in RUNTIMES {
        match (runtime.recipe)() {
            Some(more) => {
                parts.extend(more);
                rows.push(runtime);
            }
            None => eprintln!("LEFT OUT: {}: its programs can't be had here", runtime.name),
        }
    }
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    image(&engine().expect("an engine"), IMAGE, &parts);
    rows
}

/// A client of plain grpc-go that calls without a pause, on one connection at a time.
struct Caller(Child);

impl Caller {
    /// Starts it; none without Go, which is printed.
    fn start(ns: &Namespace) -> Option<Self> {
        let program = recipes::grpc_client().or_else(|| {
            eprintln!("LEFT OUT: gRPC: its client can't be built here");
            None
        })?;
        let mut command = inside(program.to_str().expect("a path in UTF-8"));
        command.args(["call", "4", &ns.address("grpc")]).stdout(Stdio::piped());
        Some(Self(command.spawn().expect("the client")))
    }

    fn expect_no_call_failed(mut self) {
        let id = Pid::from_raw(self.0.id() as i32).expect("a process");
        kill_process(id, Signal::TERM).expect("a signal");
        let mut text = String::new();
        self.0.stdout.take().expect("a pipe").read_to_string(&mut text).expect("its output");
        println!("gRPC: {}", text.lines().last().unwrap_or_default());
        assert!(text.contains("failed 0") && !text.contains("calls 0 "), "{text}");
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs a cluster"]
fn rolling_restarts_of_captured_runtimes_lose_nothing() {
    let Some(ns) = Namespace::new("runtimes") else { return };
    let rows = built();
    let apps: String = rows.iter().map(|row| row.manifest()).collect();
    ns.apply(&inject(&(apps + GRPC)));
    ns.rolled_out();
    let requests = REQUESTS.to_string();
    let load = |row: &&Runtime| ns.load(row.name, &["--requests", &requests, "--kinds", row.kinds]);
    let mut loads: Vec<_> = rows.iter().map(load).collect();
    let callers: Vec<_> = (0..3).filter_map(|_| Caller::start(&ns)).collect();
    sleep(WARM);
    for some in rows.chunks(AT_ONCE) {
        ns.restart(&some.iter().map(|row| row.name).collect::<Vec<_>>());
    }
    ns.pods.wait_gone(2 * rows.len());
    callers.into_iter().for_each(Caller::expect_no_call_failed);
    loads.iter_mut().for_each(Load::end);
    let outcomes: Vec<_> = loads.into_iter().map(Load::finish).collect();
    for outcome in outcomes {
        outcome.expect_nothing_lost(REQUESTS);
    }
    ns.pods.expect_clean_drains(2 * rows.len(), GONE_WITHIN + OWN_END);
}
