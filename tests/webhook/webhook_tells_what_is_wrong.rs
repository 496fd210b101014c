//! The webhook logs once, with the reason, a certificate that the API server won't accept, or a caBundle that it won't
//! store.

use crate::common;

use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::LIMIT;
use common::process::temporary_directory;
use common::tls::{Authority, Secure};
use lameduck::cli::{Cluster, WebhookSettings};
use lameduck::webhook;
use rcgen::generate_simple_self_signed;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// An API server with this webhook configuration, which it does not allow to change, and at first without a Secret.
fn api_server(authority: &Authority, ca_bundle: &str) -> Cluster {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let tls = authority.server_config(&["127.0.0.1"]);
    let service = json!({ "name": "duck", "namespace": "pond" });
    let client_config = json!({ "service": service, "caBundle": STANDARD.encode(ca_bundle) });
    let config =
        json!({ "metadata": { "resourceVersion": "7" }, "webhooks": [{ "clientConfig": client_config }] });
    thread::spawn(move || {
        let mut secret = Value::Null;
        while let Ok((tcp, _)) = listener.accept() {
            let Ok(mut client) = Secure::accept(tcp, Arc::clone(&tls)) else { continue };
            while let Some(Ok(())) = client.fill(LIMIT) {
                let head = client.until("\r\n\r\n").to_ascii_lowercase();
                let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
                let body = client.take(length.map_or(0, |length| length.parse().expect("a length")));
                let method = head.split(' ').next().unwrap_or_default();
                let (status, answer) = match (method, head.contains("/secrets")) {
                    ("post", true) => {
                        secret = serde_json::from_slice(&body).expect("JSON");
                        ("201 Created", secret.clone())
                    }
                    ("get", true) if secret.is_null() => ("404 Not Found", Value::Null),
                    ("get", true) => ("200 OK", secret.clone()),
                    ("get", false) => ("200 OK", config.clone()),
                    _ => ("422 Unprocessable Entity", json!({ "message": "caBundle: not to my taste" })),
                };
                let answer = answer.to_string();
                client.send(format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{answer}", answer.len()));
            }
        }
    });
    let account = authority.dir.clone();
    fs::write(account.join("token"), "t").expect("written");
    fs::write(account.join("namespace"), "pond").expect("written");
    Cluster { host: "127.0.0.1".to_owned(), port, account }
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("not poisoned").extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn warnings(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().expect("not poisoned").clone()).expect("text");
        text.lines().filter(|line| line.contains("WARN")).map(str::to_owned).collect()
    }
}

/// Runs a webhook until a few checks after its first warning; returns all its warnings.
fn warnings(cluster: Cluster, tls_dir: Option<&Path>) -> Vec<String> {
    let settings = WebhookSettings {
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        probe_listen: None,
        tls_dir: tls_dir.map(Path::to_owned),
        secret: "tls".to_owned(),
        service: "duck".to_owned(),
        config: Some("ducks".to_owned()),
        cluster: Some(cluster),
        image: "x".to_owned(),
        pull_policy: None,
        resources: Default::default(),
        lame_duck: Duration::ZERO,
    };
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let told = async {
        let end = Instant::now() + LIMIT;
        while log.warnings().is_empty() && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Time for at least two more checks.
        tokio::time::sleep(Duration::from_secs(3)).await;
    };
    runtime.block_on(webhook::run(settings, told)).expect("it starts");
    log.warnings()
}

#[test]
fn a_certificate_for_another_name_that_is_trusted_itself() {
    let made = generate_simple_self_signed(["other.pond.svc".to_owned()]).expect("a certificate");
    let dir = temporary_directory();
    fs::write(dir.join("tls.crt"), made.cert.pem()).expect("written");
    fs::write(dir.join("tls.key"), made.signing_key.serialize_pem()).expect("written");
    let authority = Authority::default();
    let told = warnings(api_server(&authority, &made.cert.pem()), Some(&dir));
    assert_eq!(told.len(), 1, "{told:?}");
    let words = "a caBundle of the webhook configuration ducks doesn't verify the certificate";
    assert!(told[0].contains(words), "{told:?}");
    assert!(told[0].contains("not valid for name \"duck.pond.svc\""), "{told:?}");
    assert!(told[0].contains("other.pond.svc"), "{told:?}");
    let _ = fs::remove_dir_all(dir);
}

#[test]
fn a_certificate_of_another_authority() {
    let (authority, other) = (Authority::default(), Authority::default());
    let dir = authority.dir.join("server");
    other.sign(&["duck.pond.svc"]).write(&dir);
    let trusted = fs::read_to_string(authority.file()).expect("a CA");
    let told = warnings(api_server(&authority, &trusted), Some(&dir));
    assert!(told.len() == 1 && told[0].contains("none of its authorities has signed it"), "{told:?}");
}

#[test]
fn a_ca_bundle_that_the_api_server_will_not_take() {
    let authority = Authority::default();
    let told = warnings(api_server(&authority, ""), None);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("422 Unprocessable Entity: caBundle: not to my taste"), "{told:?}");
}
