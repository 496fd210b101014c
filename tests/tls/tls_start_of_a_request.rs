//! A request that an app with TLS may have read in part never counts as unsent, however little the socket accepted.

use crate::common;

use std::cell::Cell;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::thread;

use common::tls::{Authority, Secure};
use common::{LIMIT, MOMENT, http2::run};
use lameduck::proxy::request::exchange::send;
use lameduck::proxy::request::failure::Progress;
use lameduck::tls::stream::{ONE_RECORD, Side, Tls};
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use socket2::SockRef;

/// Size of the request's beginning, in bytes: several records.
const BYTES: usize = 60_000;

/// Sends the beginning of a request over a socket with a send buffer of `room` bytes. The app reads only after the
/// request was given up. Returns the recorded progress and the number of bytes that the app could read.
fn given_up(authority: &Authority, room: usize) -> (Progress, usize) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    SockRef::from(&listener).set_recv_buffer_size(4096).expect("a small buffer");
    let (addr, config) =
        (listener.local_addr().expect("its address"), authority.server_config(&["localhost"]));
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let app = thread::spawn(move || {
        let mut app = Secure::accept(listener.accept().expect("accepted").0, config).expect("a handshake");
        gone.recv_timeout(2 * LIMIT).expect("the request is given up");
        while let Some(Ok(())) = app.fill(MOMENT) {}
        app.read().len()
    });
    run(async {
        let tcp = tokio::net::TcpStream::connect(addr).await.expect("connected");
        SockRef::from(&tcp).set_send_buffer_size(room).expect("a small buffer");
        let config = Arc::new(authority.client_config(&[&rustls::version::TLS13], None));
        let name = ServerName::try_from("localhost").expect("a name");
        let session = UnbufferedClientConnection::new(config, name).expect("a session");
        let mut tls = Tls::new(tcp, Side::Client(session));
        std::future::poll_fn(|cx| tls.poll_handshake(cx)).await.expect("a handshake");
        let progress = Cell::default();
        let bytes = vec![b'x'; BYTES];
        let sending = async { send(&mut tls.split().1, &bytes, ONE_RECORD, &progress).await };
        // By then the socket accepts no more, or has accepted everything.
        let _ = tokio::time::timeout(MOMENT, sending).await;
        go.send(()).expect("the app waits");
        // The app reads before `tls` is dropped: a close with unread input would reset the connection.
        (progress.get(), app.join().expect("the app"))
    })
}

#[test]
fn a_request_of_which_the_app_could_read_anything_counts_as_sent() {
    let authority = Authority::default();
    let given_up: Vec<_> =
        [1, 8_000, 16_000, 24_000, 48_000, 100_000].map(|room| given_up(&authority, room)).into();
    eprintln!("{given_up:?}");
    for (said, read) in &given_up {
        assert_eq!(*said >= Progress::Sent, *read > 0, "{given_up:?}");
    }
    assert!(
        given_up.iter().any(|(_, read)| *read == 0),
        "no case in which the app could read nothing: {given_up:?}"
    );
    assert!(
        given_up.iter().any(|(_, read)| (1..BYTES).contains(read)),
        "no case in which the app could read a part: {given_up:?}"
    );
}
