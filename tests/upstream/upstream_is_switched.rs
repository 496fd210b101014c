//! `lameduck switch`: new requests go to another upstream, and the old one finishes its own.

use crate::common;

use common::port::Port;
use common::process::{Lameduck, Node, Process};
use common::websocket::WebSocket;
use common::{MOMENT, http::Client};

#[test]
fn new_requests_go_to_the_new_one_and_the_old_one_becomes_idle() {
    let (blue, green) = (Node::held(), Node::held());
    let proxy = Lameduck::proxy(blue.addr, &[]);
    let (mut running, mut kept) = (proxy.client(), proxy.client());
    kept.get("/");
    assert_eq!(kept.answer().text(), Client::ask(blue.addr, "/").text());
    running.get("/wait");
    blue.wait_active(1);

    let to = green.addr.to_string();
    let mut switch = proxy.command(&["switch", &to]);
    proxy.wait_status("the switch", |status| status["upstream"] == *to && status["switched"] == true);
    kept.get("/");
    assert_eq!(kept.answer().text(), Client::ask(green.addr, "/").text());
    std::thread::sleep(MOMENT);
    assert!(switch.exited().is_none(), "it returned while a request ran");
    blue.release();
    assert_eq!(running.answer().text(), "released\n");
    assert_eq!(switch.wait_exit(), 0);

    assert!(proxy.command_output(&["switch", "--back"]).status.success());
    kept.get("/");
    assert_eq!(kept.answer().text(), Client::ask(blue.addr, "/").text());
    assert_eq!(proxy.status().expect("a status")["switched"], false);
}

#[test]
fn one_that_does_not_answer_changes_nothing() {
    let blue = Node::held();
    let proxy = Lameduck::proxy(blue.addr, &[]);
    let nobody = Port::reserve();
    let failed = proxy.command_output(&["switch", &nobody.addr.to_string(), "--timeout", "300ms"]);
    assert_eq!(failed.status.code(), Some(1));
    let told = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(told.contains(&format!("{} was kept", blue.addr)), "{told}");
    let mut client = proxy.client();
    client.get("/");
    assert_eq!(client.answer().head.status, 200);
}

#[test]
fn the_proxy_itself_is_refused() {
    let blue = Node::held();
    let proxy = Lameduck::proxy(blue.addr, &[]);
    let (listen, port) = (proxy.listen, proxy.listen.port());
    for own in [listen.to_string(), format!("localhost:{port}")] {
        let refused = proxy.command_output(&["switch", &own]);
        assert_eq!(refused.status.code(), Some(1));
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(told.contains(&format!("{own} is this proxy itself")), "{told}");
    }
    assert_eq!(proxy.status().expect("a status")["switched"], false);
    assert_eq!(Client::ask(proxy.listen, "/").head.status, 200);
}

#[test]
fn the_choice_outlives_the_proxy_and_overrides_its_upstream() {
    let (blue, green) = (Node::held(), Node::held());
    let mut proxy = Lameduck::proxy(blue.addr, &[]);
    assert!(proxy.command_output(&["switch", &green.addr.to_string()]).status.success());
    proxy.terminate();
    proxy.expect_clean_exit();
    let mut again = common::process::lameduck();
    again.args(["proxy", "--upstream", &blue.addr.to_string(), "--listen", "127.0.0.1:0"]);
    again.args(["--probe-listen", "off", "--log-format", "json", "--control"]).arg(&proxy.control);
    let again = Process::start("lameduck again", &mut again);
    let listen = again.wait_line("its address", |line| {
        serde_json::from_str::<serde_json::Value>(line).ok()?["listen"].as_str()?.parse().ok()
    });
    assert_eq!(Client::ask(listen, "/").text(), Client::ask(green.addr, "/").text());
}

#[test]
fn websockets_of_the_old_one_hear_1001_and_those_of_the_new_one_stay() {
    let (blue, green) = (Node::chat(), Node::chat());
    let proxy = Lameduck::proxy(blue.addr, &["--stream-spread", "500ms"]);
    let mut old = WebSocket::open(proxy.listen, "/chat?name=ada");
    assert!(old.receive().text().contains("joined"));
    let mut switch = proxy.command(&["switch", &green.addr.to_string()]);
    proxy.wait_status("the switch", |status| status["switched"] == true);
    let mut new = WebSocket::open(proxy.listen, "/chat?name=bob");
    assert!(new.receive().text().contains("joined"));
    old.expect_close(1001);
    assert_eq!(switch.wait_exit(), 0);
    new.send(common::websocket::TEXT, b"hello");
    assert!(new.receive().text().contains("hello"));
}
