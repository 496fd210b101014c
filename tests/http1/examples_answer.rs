//! The example apps and the tests' clients work as documented; without a proxy in between.

use crate::common;

use common::http::{Client, End, Fill};
use common::process::Node;
use common::websocket::{CLOSE, TEXT, WebSocket};

#[test]
fn the_slow_app_answers_in_every_way_it_promises() {
    let app = Node::slow();
    let mut client = Client::connect(app.addr);
    let mut ask = |method: &str, target: &str, headers: &[&str], body: &str| {
        client.request(method, target, headers);
        client.send(body);
        let head = client.head();
        client.body(method, head)
    };
    assert!(ask("GET", "/", &[], "").text().starts_with("hello from pid "));
    assert_eq!(ask("GET", "/slow?ms=20", &[], "").text(), "done after 20 ms\n");
    assert_eq!(ask("GET", "/stream?n=2&ms=1", &[], "").text(), "line 1 of 2\nline 2 of 2\n");
    assert_eq!(ask("GET", "/download?bytes=70000", &[], "").body.len(), 70_000);
    assert_eq!(ask("HEAD", "/download?bytes=70000", &[], "").head.header("content-length"), Some("70000"));
    assert_eq!(ask("GET", "/empty?status=304", &[], "").head.status, 304);
    assert_eq!(ask("POST", "/echo", &["Transfer-Encoding: chunked"], "2\r\nhi\r\n0\r\n\r\n").text(), "hi");
    // The SHA-256 of "abc" (FIPS 180-4's example).
    let upload = ask("POST", "/upload", &["Content-Length: 3"], "abc").text();
    assert!(upload.contains("ba7816bf") && upload.contains("\"bytes\":3"), "{upload}");

    let trailers = ask("GET", "/trailers", &[], "");
    assert_eq!((trailers.end, trailers.trailers.len()), (End::Whole, 1));
    let hints = ask("GET", "/hints", &[], "");
    assert_eq!(hints.head.status, 103);
    assert_eq!(client.answer().head.status, 200);
    client.request("GET", "/headers", &["X-aBc: 1", "X-abc: 2"]);
    let headers = client.answer();
    assert!(headers.text().contains(r#""X-aBc","1","X-abc","2""#), "{}", headers.text());
    assert_eq!(headers.head.headers.iter().filter(|(name, _)| name == "Set-Cookie").count(), 2);
    assert!(headers.head.headers.iter().any(|(name, _)| name == "X-oDD-cASE"));
}

#[test]
fn an_early_answer_comes_before_the_body_is_sent() {
    let app = Node::slow();
    let mut client = Client::connect(app.addr);
    client.request("POST", "/early", &["Content-Length: 1000000"]);
    assert_eq!(client.answer().head.status, 413);
}

#[test]
fn an_app_that_dies_cuts_its_answers() {
    let mut app = Node::slow();
    let (mut stream, mut hang) = (Client::connect(app.addr), Client::connect(app.addr));
    stream.get("/stream");
    hang.get("/hang");
    stream.wait_seen("line 1 of 10\n");
    app.wait_active(2);
    app.process.signal(rustix::process::Signal::TERM);
    assert!(matches!(stream.read_to_end().1, Fill::Fin | Fill::Rst));
    assert_eq!(hang.read_to_end().0, b"");
    assert_eq!(app.process.wait_exit(), 128 + 15, "an unmodified app dies of SIGTERM");
}

#[test]
fn the_chat_app_tells_everybody_what_one_says() {
    let app = Node::chat();
    let mut ada = WebSocket::open(app.addr, "/chat?name=ada");
    assert!(ada.receive().text().contains("joined"));
    let mut bob = WebSocket::open(app.addr, "/chat?name=bob");
    assert!(bob.receive().text().contains("bob") && ada.receive().text().contains("bob"));
    bob.send(TEXT, b"hello");
    assert!(ada.receive().text().contains("hello") && bob.receive().text().contains("hello"));
    bob.send(CLOSE, &1000_u16.to_be_bytes());
    assert_eq!(bob.receive().close_code(), Some(1000));
    bob.client.expect_fin();
    drop(bob);
    app.process.wait_line("bob's end", |line| (line == "bob left with code 1000").then_some(()));
    assert!(Client::ask(app.addr, "/history").text().contains("hello"));
    assert!(Client::ask(app.addr, "/").text().contains("<title>Chat</title>"));
}
