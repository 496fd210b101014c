//! A killed app fails the requests that it was working on, and nothing else: later requests wait for the next instance.

use crate::common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use common::http::Client;
use common::process::{Lameduck, Node};
use common::{MOMENT, wait_for};
use socket2::SockRef;

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

fn listener(addr: SocketAddr) -> TcpListener {
    TcpListener::bind(addr).expect("the port")
}

/// The next connection with an unread request. The proxy's readiness checks connect too, but send nothing.
fn unread(listener: &TcpListener) -> TcpStream {
    loop {
        let (stream, _) = listener.accept().expect("a connection");
        if stream.peek(&mut [0]).is_ok_and(|n| n > 0) {
            return stream;
        }
    }
}

/// Closes the port at once. Dropping the socket is not enough: a child that another test has just forked keeps it open
/// until it executes its program.
fn stop_listening(listener: TcpListener) {
    SockRef::from(&listener).shutdown(Shutdown::Both).expect("it listened");
}

/// Number of the proxy's retries so far.
fn retries(proxy: &Lameduck) -> u32 {
    proxy.metric("lameduck_upstream_retries_total") as u32
}

fn read(stream: &mut TcpStream) {
    assert!(stream.read(&mut [0; 4096]).expect("a request") > 0);
}

/// An app, a proxy, a client whose request was answered, and the app's connection, which is idle now.
fn rests() -> (TcpListener, Lameduck, Client, TcpStream) {
    let app = listener((Ipv4Addr::LOCALHOST, 0).into());
    let proxy = Lameduck::proxy(app.local_addr().expect("its address"), &["--threads", "1"]);
    let mut client = proxy.client();
    client.send(GET);
    let mut rests = unread(&app);
    read(&mut rests);
    rests.write_all(OK).expect("sent");
    assert_eq!(client.answer().text(), "ok");
    (app, proxy, client, rests)
}

#[test]
fn a_retry_that_comes_to_a_closing_port_waits_for_the_next_app() {
    let (app, proxy, mut client, mut resting) = rests();
    let addr = app.local_addr().expect("its address");
    client.send(GET);
    read(&mut resting);
    drop(resting);
    // The retry is never read: closing the port resets its connection.
    let retried = unread(&app);
    stop_listening(app);
    drop(retried);
    wait_for("the second retry", || (retries(&proxy) == 2).then_some(()));
    let _next = Node::held_at(addr.port());
    let answer = client.answer();
    assert_eq!(answer.head.status, 200, "{}", answer.text());
}

#[test]
fn apps_that_die_one_after_the_other_are_not_tried_for_ever() {
    let (mut app, proxy, mut client, mut resting) = rests();
    let addr = app.local_addr().expect("its address");
    client.send(GET);
    read(&mut resting);
    drop(resting);
    let mut died = 1;
    let answer = thread::scope(|threads| {
        let answer = threads.spawn(|| client.answer());
        while !answer.is_finished() && died < 20 {
            app.set_nonblocking(true).expect("set");
            let retried = loop {
                match app.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false).expect("set");
                        if stream.peek(&mut [0]).is_ok_and(|n| n > 0) {
                            break Some(stream);
                        }
                    }
                    Err(_) if answer.is_finished() => break None,
                    Err(_) => thread::sleep(MOMENT / 100),
                }
            };
            if let Some(retried) = retried {
                stop_listening(app);
                drop(retried);
                died += 1;
                // The port must stay closed until the proxy has seen that it is.
                let decided = || answer.is_finished() || retries(&proxy) >= died;
                wait_for("the proxy's decision", || decided().then_some(()));
                app = listener(addr);
            }
        }
        answer.join().expect("an answer")
    });
    assert_eq!((answer.head.status, died), (502, 5), "{}", answer.text());
}

#[test]
fn only_what_is_in_flight_at_the_kill_may_fail() {
    let mut app = Node::held();
    let port = app.addr.port();
    let proxy = Lameduck::proxy(app.addr, &[]);
    let (over, addr) = (AtomicBool::new(false), proxy.listen);
    thread::scope(|threads| {
        let clients: Vec<_> = (0..24)
            .map(|_| {
                threads.spawn(|| {
                    let (mut client, mut failed) = (Client::connect(addr), vec![]);
                    let mut asked = 0;
                    while !over.load(Ordering::Relaxed) {
                        let begun = Instant::now();
                        client.send(GET);
                        let answer = client.answer();
                        asked += 1;
                        if answer.head.status != 200 {
                            failed.push((begun, answer.head.status, answer.text()));
                            client = Client::connect(addr);
                        }
                    }
                    (asked, failed)
                })
            })
            .collect();
        let kills: Vec<_> = (0..5)
            .map(|_| {
                thread::sleep(MOMENT);
                app.process.signal(rustix::process::Signal::KILL);
                let killed = Instant::now();
                app.process.kill();
                app = Node::held_at(port);
                killed
            })
            .collect();
        thread::sleep(MOMENT);
        over.store(true, Ordering::Relaxed);
        let (mut all, mut lost) = (0, vec![]);
        for client in clients {
            let (asked, failed) = client.join().expect("answers");
            all += asked;
            lost.extend(failed);
        }
        // Even a request that was sent over an idle connection is retried.
        eprintln!("{} of {all} lost", lost.len());
        assert!(all > 500, "too little load: {all}");
        for (begun, status, text) in &lost {
            let in_flight = kills.iter().any(|kill| begun < kill && kill.duration_since(*begun) < MOMENT);
            assert!(in_flight, "{status} {text} for a request that came after the kill");
        }
    });
}
