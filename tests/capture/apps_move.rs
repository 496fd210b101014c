//! Real apps move, and work there as before; a program that makes its own system calls stays where it is.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use lameduck::capture::listeners::{Ports, ports};
use lameduck::config::APP_IP;

use crate::common::process::{Lameduck, Process, lameduck};
use crate::common::{LIMIT, wait_for};
use crate::{POD, POD_V6, compile, file, folder, in_pod, preloaded};

/// Response to `GET /` on the port of the moved app.
fn get(addr: (&str, u16)) -> String {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    write!(stream, "GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn moved(ports: &[u16]) -> Ports {
    Ports { moved: ports.iter().map(|port| at(*port)).collect(), ..Ports::default() }
}

/// Where a moved app listens on this port.
fn at(port: u16) -> SocketAddr {
    (APP_IP, port).into()
}

/// Waits until the app listens, and expects it nowhere else.
fn expect_moved(app: &Process, port: u16) -> String {
    wait_for(&format!("port {port}: {}", app.output()), || {
        (ports().unwrap().moved.contains(&at(port))).then_some(())
    });
    assert_eq!(ports().unwrap(), moved(&[port]));
    get(("127.77.0.1", port))
}

#[test]
fn node_moves() {
    let serve = |listen: &str| {
        format!("require('http').createServer((req, res) => res.end('hello')).listen({listen})")
    };
    for listen in ["3000", "3000, '0.0.0.0'", "3000, '::'", &format!("3000, '{POD}'"), "{ port: 3000 }"] {
        in_pod(|| {
            let app = Process::start("node", preloaded("node").args(["-e", &serve(listen)]));
            assert!(expect_moved(&app, 3000).ends_with("hello"), "{listen}");
        });
    }
}

#[test]
fn a_node_cluster_moves_however_it_shares_the_socket() {
    let script = "const cluster = require('cluster');
        if (cluster.isPrimary) { for (let n = 0; n < 3; n++) cluster.fork(); }
        else require('http').createServer((req, res) => res.end('worker')).listen(3000, () => console.log('worker'));";
    for policy in ["rr", "none"] {
        in_pod(|| {
            let mut command = preloaded("node");
            let app = Process::start(
                "node",
                command.arg(file("cluster.js", script)).env("NODE_CLUSTER_SCHED_POLICY", policy),
            );
            wait_for("three workers", || (app.output().lines().count() == 3).then_some(()));
            for _ in 0..10 {
                assert!(expect_moved(&app, 3000).ends_with("worker"), "{policy}");
            }
        });
    }
}

#[test]
fn python_moves() {
    for module in [&["http.server", "8000"][..], &["http.server", "8000", "--bind", POD]] {
        in_pod(|| {
            let app =
                Process::start("python", preloaded("python3").arg("-um").args(module).current_dir(folder()));
            assert!(expect_moved(&app, 8000).contains("200 OK"), "{module:?}");
        });
    }
}

#[test]
fn java_moves() {
    if Command::new("java").arg("-version").output().is_err() {
        return eprintln!("LEFT OUT: java is not installed");
    }
    let source = folder().join("Serve.java");
    let text = "import com.sun.net.httpserver.*; import java.net.*;
        public class Serve { public static void main(String[] args) throws Exception {
          HttpServer server = HttpServer.create(new InetSocketAddress(8080), 0);
          server.createContext(\"/\", exchange -> { exchange.sendResponseHeaders(200, 4);
            exchange.getResponseBody().write(\"java\".getBytes()); exchange.close(); });
          server.start(); } }";
    fs::write(&source, text).unwrap();
    in_pod(|| {
        let app = Process::start("java", preloaded("java").arg(&source));
        assert!(expect_moved(&app, 8080).ends_with("java"));
    });
}

#[test]
fn nginx_moves_with_its_ipv6_socket() {
    if Command::new("nginx").arg("-v").output().is_err() {
        return eprintln!("LEFT OUT: nginx is not installed");
    }
    let dir = folder().join("capture-nginx");
    fs::create_dir_all(&dir).unwrap();
    let config = format!(
        "daemon off; error_log stderr; pid {0}/pid; events {{}} http {{ access_log off; client_body_temp_path {0}/b; \
         proxy_temp_path {0}/p; fastcgi_temp_path {0}/f; uwsgi_temp_path {0}/u; scgi_temp_path {0}/s; \
         server {{ listen 80; listen [::]:80; return 200 nginx; }} }}",
        dir.display()
    );
    fs::write(dir.join("conf"), config).unwrap();
    in_pod(|| {
        let _proxy =
            Lameduck::start_as(lameduck(), &["proxy", "--capture"], &["--listen", "127.0.0.1:1"], &[]);
        let app = Process::start("nginx", preloaded("nginx").arg("-c").arg(dir.join("conf")));
        wait_for("port 80", || ports().unwrap().moved.contains(&at(80)).then_some(()));
        // By itself, and by the proxy on the addresses that nginx asked for.
        for ip in ["127.77.0.1", "127.0.0.1", "::1", POD, POD_V6] {
            assert!(get((ip, 80)).ends_with("nginx"), "{ip}");
        }
        // A reload keeps the sockets.
        app.signal(rustix::process::Signal::HUP);
        for ip in ["127.77.0.1", "::1"] {
            assert!(get((ip, 80)).ends_with("nginx"), "{ip}");
        }
    });
}

/// As Go does by default: no loader, and so no shim.
#[test]
fn a_static_program_is_bypassed() {
    let program = compile("cc", "sockets", &["-static", "-pthread"]).unwrap();
    in_pod(|| {
        let app = Process::start("static", preloaded(program).args(["tcp4,0.0.0.0,3000,listen", "hold"]));
        app.wait_line("its socket", |line| line.contains("name 0.0.0.0:3000").then_some(()));
        assert_eq!(
            ports().unwrap(),
            Ports { bypassed: ["0.0.0.0:3000".parse().unwrap()].into(), ..Ports::default() }
        );
    });
}

#[test]
fn go_is_bypassed_as_it_makes_its_own_system_calls() {
    if Command::new("go").arg("version").output().is_err() {
        return eprintln!("LEFT OUT: go is not installed");
    }
    let dir = folder().join("capture-go");
    fs::create_dir_all(&dir).unwrap();
    let text = "package main\nimport \"net/http\"\nfunc main() { http.ListenAndServe(\":3000\", nil) }";
    fs::write(dir.join("main.go"), text).unwrap();
    let mut build = Command::new("go");
    build.args(["build", "-o", "app", "main.go"]).env("CGO_ENABLED", "0").current_dir(&dir);
    assert!(build.status().unwrap().success());
    in_pod(|| {
        let app = Process::start("go", &mut preloaded(dir.join("app")));
        let bypassed =
            wait_for(&app.output(), || Some(ports().unwrap().bypassed).filter(|some| !some.is_empty()));
        assert_eq!(bypassed, ["[::]:3000".parse().unwrap()].into());
        assert!(get((POD, 3000)).contains("404"));
    });
}
