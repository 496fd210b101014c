//! Several `lameduck run` on one machine do not see each other, and a port that one has is in use for the others, as
//! without lameduck.

use crate::common;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use common::http::Client;
use common::port::Port;
use common::process::{Lameduck, OWN_PORTS, lameduck};
use serde_json::json;

const APP: &str = "
    const server = require('http').createServer((req, res) => res.end(process.argv[1]));
    server.on('error', (error) => { console.log('the app got', error.code); process.exit(4); });
    server.listen(process.argv[1]);";

fn run_on(port: &Port) -> Lameduck {
    let number = port.number();
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, number));
    Lameduck::run_at(lameduck(), at, &[], &["node", "-e", APP, &number.to_string()])
}

#[test]
fn each_serves_and_ends_its_own_app_only() {
    let ports = [Port::reserve_everywhere(), Port::reserve_everywhere()];
    let [mut first, second] = ports.each_ref().map(run_on);
    for (run, port) in [&first, &second].into_iter().zip(&ports) {
        assert_eq!(Client::ask(run.listen, "/").text(), port.number().to_string());
        let status = run.status().expect("a status");
        assert_eq!((&status["captured"], &status["bypassed"]), (&json!([port.number()]), &json!([])));
    }
    first.terminate();
    assert_eq!(first.process.wait_exit(), 128 + 15);
    assert_eq!(Client::ask(second.listen, "/").text(), ports[1].number().to_string());
}

/// The app hears it and does what it does without lameduck: exit, or take another port.
#[test]
fn a_port_of_another_run_or_program_is_in_use() {
    let reserved = Port::reserve_everywhere();
    let first = run_on(&reserved);
    let somebody = TcpListener::bind("127.0.0.1:0").expect("a port");
    for port in [first.listen.port(), somebody.local_addr().expect("its address").port()] {
        let (code, output) = Lameduck::run_to_its_end(&[OWN_PORTS], &["node", "-e", APP, &port.to_string()]);
        assert_eq!(code, 4, "{output}");
        assert!(output.contains("the app got EADDRINUSE"), "{output}");
        assert!(output.contains("another program listens there"), "{output}");
    }
    assert_eq!(Client::ask(first.listen, "/").text(), reserved.number().to_string());
}

#[test]
fn an_app_can_take_another_port_when_one_is_in_use() {
    let reserved = [Port::reserve_everywhere(), Port::reserve_everywhere()];
    let _first = run_on(&reserved[0]);
    let tries = "
        const server = require('http').createServer((req, res) => res.end('the second choice'));
        server.once('error', () => server.listen(process.argv[2]));
        server.listen(process.argv[1]);";
    let [taken, free] = reserved.each_ref().map(|port| port.number().to_string());
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, reserved[1].number()));
    let second = Lameduck::run_at(lameduck(), at, &[], &["node", "-e", tries, &taken, &free]);
    assert_eq!(Client::ask(second.listen, "/").text(), "the second choice");
}
