//! When only the app restarts, nothing is lost: requests wait for it, and connections stay open.

use crate::common;

use std::time::{Duration, Instant};

use common::http::{Client, End};
use common::process::{Lameduck, Node, TOKEN};
use common::websocket::WebSocket;
use common::{MOMENT, wait_for};

#[test]
fn requests_wait_for_an_app_that_crashed() {
    let mut app = Node::held();
    let port = app.addr.port();
    let proxy = Lameduck::proxy(app.addr, &["--upstream-wait", "60s"]);
    // When the app dies, the proxy's pool has connections to it.
    let mut clients: Vec<_> = (0..20).map(|_| proxy.client()).collect();
    clients.iter_mut().for_each(|client| client.get("/"));
    clients.iter_mut().for_each(|client| assert_eq!(client.answer().head.status, 200));

    app.process.kill();
    clients.iter_mut().for_each(|client| client.get("/"));
    proxy.wait_in_flight(20);
    assert!(clients.iter_mut().all(|client| client.is_quiet_for(MOMENT / 10)), "answered without an app");
    wait_for("not ready", || (proxy.ready().head.status == 503).then_some(()));

    let app = Node::held_at(port);
    clients.iter_mut().for_each(|client| assert_eq!(client.answer().head.status, 200));
    wait_for("ready again", || (proxy.ready().head.status == 200).then_some(()));
    drop(app);
}

#[test]
fn streams_end_before_an_app_that_restarts_would_cut_them() {
    let (slow, chat) = (Node::slow(), Node::chat());
    let patient = ["--sidecar", "ordinary", "--restart-grace", "60s"];
    let (proxy, chats) = (Lameduck::proxy(slow.addr, &patient), Lameduck::proxy(chat.addr, &patient));
    let mut client = proxy.client();
    client.request("GET", "/events?ms=400", &["Accept: text/event-stream"]);
    let head = client.head();
    client.wait_seen("id: 1\n");
    let mut socket = WebSocket::open(chats.listen, "/chat?name=ada");
    socket.receive();

    let mut hooks = [&proxy, &chats].map(|proxy| proxy.hook("/drain?hook=app", Some(TOKEN)));
    let events = client.body("GET", head);
    assert!(events.end == End::Whole && events.text().ends_with("\n\n"), "{:?}", events.text());
    socket.expect_close(1001);
    // Nothing else is running, so the hook returns before `--restart-grace` is over.
    hooks.iter_mut().for_each(|hook| assert!(hook.answer().text().contains("app-may-stop")));
}

#[test]
fn the_apps_hook_alone_holds_requests_until_it_is_back() {
    let mut app = Node::held();
    let port = app.addr.port();
    let mut proxy = Lameduck::proxy(app.addr, &["--sidecar", "ordinary"]);
    let (mut running, mut idle) = (proxy.client(), proxy.client());
    idle.get("/");
    idle.answer();
    running.get("/wait");
    app.wait_active(1);

    let mut hook = proxy.hook("/drain?hook=app", Some(TOKEN));
    // Only after two seconds without the sidecar's hook it is a restart. Until then requests are served.
    let mut held = wait_for("a new request that is held", || {
        let mut client = proxy.client();
        client.get("/");
        wait_for("its answer, or that it is held", || {
            let held = proxy.status().is_some_and(|status| status["held"] == 1);
            (held || !client.is_quiet_for(MOMENT / 10)).then_some(held)
        })
        .then_some(client)
    });
    assert!(hook.is_quiet_for(MOMENT), "the hook returned while a request ran");
    app.release();
    assert_eq!(running.answer().text(), "released\n");
    assert_eq!(hook.answer().head.status, 200);

    app.process.kill();
    assert!(
        held.is_quiet_for(MOMENT),
        "answered without an app: {:?}\n{:?}",
        held.answer(),
        proxy.process.output()
    );
    let app = Node::held_at(port);
    let expected = Client::ask(app.addr, "/").text();
    assert_eq!(held.answer().text(), expected);
    idle.get("/");
    let answer = idle.answer();
    assert_eq!(answer.text(), expected);
    assert!(!answer.head.has("connection", "close"), "{:?}", answer.head);
    proxy.wait_phase("serving");
    proxy.terminate();
    proxy.expect_clean_exit();
}

/// Waits until requests are held, because only the app's hook came; returns a client whose request is held.
fn held_request(proxy: &Lameduck) -> Client {
    wait_for("a restart", || proxy.ready().text().contains("requests are held").then_some(()));
    let mut held = proxy.client();
    held.get("/");
    proxy.wait_status("a held request", |status| status["held"] == 1);
    held
}

/// An app at its connection limit (`server.maxConnections`) closes each new connection at once, which looks like a
/// restart.
#[test]
fn a_port_that_blinks_before_the_hook_is_released_hides_no_restart() {
    let mut app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--sidecar", "ordinary", "--restart-grace", "60s"]);
    let (mut running, mut direct) = (proxy.client(), Client::connect(app.addr));
    running.get("/wait");
    app.wait_active(1);
    direct.get("/full");
    direct.answer();
    let mut hook = proxy.hook("/drain?hook=app", Some(TOKEN));
    let mut held = held_request(&proxy);
    std::thread::sleep(MOMENT);
    direct.get("/roomy");
    direct.answer();
    // Longer than a connection must stay open to count as the app's return.
    std::thread::sleep(Duration::from_millis(1500));
    app.release();
    assert_eq!(running.answer().text(), "released\n");
    assert!(hook.answer().text().contains("app-may-stop"));

    let (began, port) = (Instant::now(), app.addr.port());
    app.process.kill();
    let app = Node::held_at(port);
    assert_eq!(held.answer().text(), Client::ask(app.addr, "/").text());
    assert!(began.elapsed() < Duration::from_secs(10), "held for {:?}", began.elapsed());
}

#[test]
fn an_app_that_was_only_full_when_its_hook_was_released_is_not_yet_back() {
    let mut app = Node::held();
    let proxy = Lameduck::proxy(app.addr, &["--sidecar", "ordinary", "--restart-grace", "60s"]);
    let (mut running, mut direct) = (proxy.client(), Client::connect(app.addr));
    running.get("/wait");
    app.wait_active(1);
    direct.get("/full");
    direct.answer();
    let mut hook = proxy.hook("/drain?hook=app", Some(TOKEN));
    let mut held = held_request(&proxy);
    direct.get("/release");
    direct.answer();
    assert_eq!(running.answer().text(), "released\n");
    assert!(hook.answer().text().contains("app-may-stop"));
    std::thread::sleep(MOMENT);
    direct.get("/roomy");
    direct.answer();
    assert!(held.is_quiet_for(Duration::from_millis(1500)), "sent to an app that is about to stop");

    let port = app.addr.port();
    app.process.kill();
    let app = Node::held_at(port);
    assert_eq!(held.answer().text(), Client::ask(app.addr, "/").text());
}
