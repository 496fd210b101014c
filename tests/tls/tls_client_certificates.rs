//! With --tls-client-ca the app learns a client's identity from its certificate, and no client can claim another's.

use crate::common;

use std::net::SocketAddr;

use common::app::{Asked, RawApp};
use common::tls::{Authority, Made, Secure};
use rcgen::DnType;
use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};

const ANSWER: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS12, &TLS13];

fn connect(
    authority: &Authority,
    addr: SocketAddr,
    version: &'static SupportedProtocolVersion,
    own: Option<&Made>,
) -> Result<Secure, String> {
    let mut secure = Secure::try_connect(addr, "localhost", authority.client_config(&[version], own))?;
    // With TLS 1.3, the server rejects a certificate only after the client has completed its handshake.
    secure.get("/");
    Ok(secure)
}

/// The fields that tell the app its client's identity.
fn told(asked: &Asked) -> Vec<&str> {
    let lines = asked.head.split("\r\n");
    lines.filter(|line| line.to_lowercase().replace('_', "-").starts_with("x-client-cert")).collect()
}

#[test]
fn the_subject_of_a_verified_certificate_reaches_the_app() {
    let authority = Authority::default();
    let app = RawApp::start();
    let ca = authority.file();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &["--tls-client-ca", &ca]);
    let subject =
        [(DnType::OrganizationName, "Shop, Ltd"), (DnType::CommonName, "ada\r\nX-Client-Cert-Subject: x")];
    let ada = authority.sign_subject(&["ada.test"], &subject);
    for version in VERSIONS {
        let mut client = connect(&authority, addr, version, Some(&ada)).expect("accepted");
        let mut asked = app.asked();
        let subject = "X-Client-Cert-Subject: CN=ada\\0d\\0aX-Client-Cert-Subject: x,O=Shop\\, Ltd";
        assert_eq!(told(&asked), [subject]);
        asked.send(ANSWER);
        client.until("\r\n\r\nhi");
        // The client's own fields of this name are removed in any spelling, on every request.
        client.send(
            "GET / HTTP/1.1\r\nHost: a\r\nx-client-cert-subject: CN=root\r\nX_Client_Cert_Subject: CN=root\r\n\
             Connection: x-client-cert-subject\r\n\r\n",
        );
        asked.next();
        assert_eq!(told(&asked), [subject]);
        // Unanswered, the proxy would retry the request and send it to the app during the next round.
        asked.send(ANSWER);
        client.until("\r\n\r\nhi");
    }
}

#[test]
fn a_client_without_a_valid_certificate_is_refused() {
    let (authority, other) = (Authority::default(), Authority::default());
    let app = RawApp::start();
    let ca = authority.file();
    let (_proxy, addr) = authority.proxy(&app.addr.to_string(), &["--tls-client-ca", &ca]);
    let strange = other.sign(&["ada.test"]);
    for version in VERSIONS {
        for own in [None, Some(&strange)] {
            let refused = connect(&authority, addr, version, own)
                .and_then(|mut secure| secure.try_fill().map(|()| panic!("answered")));
            let why = refused.unwrap_err();
            assert!(why.contains("fatal alert"), "the client must get an alert: {why}");
        }
    }
    assert!(app.asked_within(common::MOMENT).is_none());
}

#[test]
fn no_client_without_a_certificate_can_claim_a_subject() {
    let authority = Authority::default();
    let app = RawApp::start();
    let ca = authority.file();
    let args = ["--tls-client-ca", &ca, "--tls-client-auth", "request"];
    let (proxy, addr) = authority.proxy(&app.addr.to_string(), &args);
    let claim = "GET / HTTP/1.1\r\nHost: a\r\nX-Client-Cert-Subject: CN=root\r\nX-Client-Cert_Subject: CN=root\r\n\r\n";
    let mut secure = authority.client(addr);
    secure.send(claim);
    assert_eq!(told(&app.asked()), [""; 0]);
    // The plain listener serves the same app.
    let mut plain = proxy.client();
    plain.send(claim);
    assert_eq!(told(&app.asked()), [""; 0]);
}

#[test]
fn without_client_certificates_the_field_is_like_any_other() {
    let app = RawApp::start();
    let proxy = common::process::Lameduck::proxy(app.addr, &[]);
    let mut plain = proxy.client();
    // Another proxy in front of this one may have set the field.
    plain.send("GET / HTTP/1.1\r\nHost: a\r\nX-Client-Cert-Subject: CN=ada\r\n\r\n");
    assert_eq!(told(&app.asked()), ["X-Client-Cert-Subject: CN=ada"]);
}
