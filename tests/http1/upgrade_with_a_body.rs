//! A request with a body may ask for an upgrade, as `docker exec` and `docker attach` do: the body goes to the app, and
//! the tunnel starts after its last byte.

use crate::common;

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use common::MOMENT;
use common::app::RawApp;
use common::http::Client;
use common::process::{Lameduck, Process};

const SWITCHES: &str = "HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\n\
                        Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n";

fn exec(framing: &str) -> String {
    format!(
        "POST /v1.47/exec/0123/start HTTP/1.1\r\nHost: docker\r\nUser-Agent: Docker-Client/28.2.2 (linux)\r\n{framing}\r\n\
         Connection: Upgrade\r\nContent-Type: application/json\r\nUpgrade: tcp\r\n\r\n"
    )
}

/// Accepts the upgrade once the whole request has arrived, as the Docker Engine does; Node would not wait for the body.
const ENGINE: &str = r"
const server = require('node:net').createServer((socket) => {
  let seen = '';
  const ask = (chunk) => {
    seen += chunk;
    const [head, body] = seen.split('\r\n\r\n');
    const length = Number(/content-length: (\d+)/i.exec(head)?.[1] ?? 0);
    if (body === undefined || body.length < length) return;
    socket.off('data', ask);
    if (!/upgrade: tcp/i.test(head)) return socket.end('HTTP/1.1 400 no upgrade\r\nContent-Length: 0\r\n\r\n');
    socket.write('HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n' + body);
    socket.on('data', (line) => socket.write(`echo ${line}`));
    socket.on('end', () => socket.end('bye'));
  };
  socket.on('data', ask).on('error', () => {});
});
server.listen(0, () => console.log(`listens on port ${server.address().port}`));
";

#[test]
fn an_exec_is_joined_to_its_process() {
    let engine = Process::start("node", Command::new("node").args(["-e", ENGINE]));
    let port =
        engine.wait_line("the port", |line| line.split_once("listens on port ")?.1.parse::<u16>().ok());
    let proxy = Lameduck::proxy(SocketAddr::from(([127, 0, 0, 1], port)), &[]);
    let mut client = proxy.client();
    client.send(exec("Content-Length: 28") + r#"{"Detach":false,"Tty":false}"#);
    assert_eq!(client.head().status, 101);
    assert_eq!(client.take(28), br#"{"Detach":false,"Tty":false}"#);
    for word in ["ls", "id"] {
        client.send(word);
        assert_eq!(client.take(7), format!("echo {word}").as_bytes());
    }
    proxy.wait_in_flight(1);
    client.shutdown();
    assert_eq!(client.take(3), b"bye");
    client.expect_fin();
    proxy.wait_in_flight(0);
}

#[test]
fn the_app_sees_the_upgrade_and_the_body_however_it_is_framed() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    for (framing, body) in
        [("Content-Length: 2", "hi"), ("Transfer-Encoding: chunked", "2\r\nhi\r\n0\r\n\r\n")]
    {
        let mut client = proxy.client();
        client.send(exec(framing) + body + "first words");
        let mut asked = app.asked();
        for line in [framing, "Connection: Upgrade", "Upgrade: tcp"] {
            assert!(asked.has_line(line), "{line} is gone from {}", asked.head);
        }
        assert_eq!(asked.take(body.len()), body);
        asked.send(SWITCHES);
        let head = client.head();
        assert!(head.status == 101 && head.has("connection", "Upgrade") && head.has("upgrade", "tcp"));
        assert_eq!(asked.take(11), "first words");
        asked.send("answer");
        assert_eq!(client.take(6), b"answer");
    }
}

#[test]
fn an_app_that_agrees_early_gets_the_rest_of_the_body_first() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let body = "x".repeat(300_000);
    let mut client = proxy.client();
    client.send(exec("Content-Length: 300000") + &body[..1000]);
    let mut asked = app.asked();
    asked.send(SWITCHES);
    assert_eq!(client.head().status, 101);
    client.send(&body[1000..]);
    client.send("behind");
    assert_eq!(asked.take(300_006), body + "behind");
    asked.send("answer");
    assert_eq!(client.take(6), b"answer");
}

#[test]
fn a_refusal_is_an_answer_like_any_other() {
    let app = RawApp::start();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let mut client: Client = proxy.client();
    client.send(exec("Content-Length: 2") + "hi");
    let mut asked = app.asked();
    assert_eq!(asked.take(2), "hi");
    asked.send("HTTP/1.1 409 Conflict\r\nContent-Length: 4\r\n\r\nbusy");
    assert_eq!(client.answer().text(), "busy");
    assert!(client.is_quiet_for(MOMENT.min(Duration::from_millis(100))), "the connection is kept");
}
