//! While another version of the webhook takes over, no pod gets the old sidecar once the new replica is ready: the old
//! one passes its reviews on. Webhooks with self-made certificates, and an API server that stores what they write.

use crate::common;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::http::Client;
use common::port::Port;
use common::tls::{Authority, Secure};
use common::{LIMIT, wait_for};
use lameduck::cli::{Cluster, WebhookSettings};
use lameduck::webhook;
use lameduck::webhook::x509::{provider, roots};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tokio::sync::oneshot;

const NAME: &str = "duck.pond.svc";
const DEPLOYMENT: &str = include_str!("deployment.json");

/// What an API server stores: the Secret, and the webhook configuration.
struct Store {
    version: u64,
    secret: Value,
    config: Value,
}

impl Store {
    fn answer(&mut self, method: &str, of_secret: bool, body: &[u8]) -> (&'static str, Value) {
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        let version = json!(self.version.to_string());
        let object = if of_secret { &mut self.secret } else { &mut self.config };
        match method {
            "get" => return ("200 OK", object.clone()),
            "put" if body["metadata"]["resourceVersion"] != object["metadata"]["resourceVersion"] => {
                return ("409 Conflict", json!({ "message": "it has changed" }));
            }
            "put" => *object = body,
            // The caBundles.
            _ => {
                for op in body.as_array().expect("a JSON patch").iter().filter(|op| op["op"] == "add") {
                    object["webhooks"][0]["clientConfig"]["caBundle"] = op["value"].clone();
                }
            }
        }
        object["metadata"]["resourceVersion"] = version;
        self.version += 1;
        ("200 OK", object.clone())
    }
}

struct ApiServer {
    authority: Authority,
    port: u16,
    store: Arc<Mutex<Store>>,
}

impl ApiServer {
    fn start() -> Self {
        let authority = Authority::default();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let service = json!({ "name": "duck", "namespace": "pond" });
        let metadata = json!({ "resourceVersion": "0" });
        let store = Arc::new(Mutex::new(Store {
            version: 1,
            secret: json!({ "metadata": metadata }),
            config: json!({ "metadata": metadata, "webhooks": [{ "clientConfig": { "service": service } }] }),
        }));
        let (tls, shared) = (authority.server_config(&["127.0.0.1"]), Arc::clone(&store));
        thread::spawn(move || {
            while let Ok((tcp, _)) = listener.accept() {
                let (tls, shared) = (Arc::clone(&tls), Arc::clone(&shared));
                thread::spawn(move || serve(tcp, tls, &shared));
            }
        });
        fs::write(authority.dir.join("token"), "t").expect("written");
        fs::write(authority.dir.join("namespace"), "pond").expect("written");
        Self { authority, port, store }
    }

    /// The pod that a replica would have made of the Deployment's; none if it doesn't answer.
    fn review(&self, addr: SocketAddr) -> Option<String> {
        let text = self.post(addr, DEPLOYMENT)?;
        let answer: Value = serde_json::from_str(text.split_once("\r\n\r\n")?.1).expect("JSON");
        let patch = STANDARD.decode(answer["response"]["patch"].as_str()?).expect("base64");
        Some(String::from_utf8(patch).expect("text"))
    }

    /// A replica's response to a body; none if it can't be reached.
    fn post(&self, addr: SocketAddr, body: &str) -> Option<String> {
        TcpStream::connect(addr).ok()?;
        let bundle = self.store.lock().expect("not poisoned").config["webhooks"][0]["clientConfig"].clone();
        let bundle = STANDARD.decode(bundle["caBundle"].as_str()?).expect("base64");
        let mut trusted = RootCertStore::empty();
        trusted.add_parsable_certificates(roots(&bundle).into_iter().map(|root| root.der));
        let config = ClientConfig::builder_with_provider(provider());
        let config = config.with_safe_default_protocol_versions().expect("versions");
        let config = config.with_root_certificates(trusted).with_no_client_auth();
        let mut tls = Secure::try_connect(addr, NAME, config).ok()?;
        let length = body.len();
        tls.send(format!("POST /mutate HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {length}\r\n\r\n{body}"));
        Some(tls.read_to_end().0)
    }

    fn newest(&self) -> String {
        let secret = self.store.lock().expect("not poisoned").secret.clone();
        secret["metadata"]["annotations"]["lameduck.dev/newest-replica"].to_string()
    }
}

fn serve(tcp: TcpStream, tls: Arc<rustls::ServerConfig>, store: &Mutex<Store>) {
    let Ok(mut client) = Secure::accept(tcp, tls) else { return };
    while let Some(Ok(())) = client.fill(LIMIT) {
        let head = client.until("\r\n\r\n").to_ascii_lowercase();
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
        let body = client.take(length.map_or(0, |length| length.parse().expect("a length")));
        let method = head.split(' ').next().unwrap_or_default();
        let (status, answer) =
            store.lock().expect("not poisoned").answer(method, head.contains("/secrets"), &body);
        let answer = answer.to_string();
        client.send(format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{answer}", answer.len()));
    }
}

/// A running webhook.
struct Replica {
    review: Port,
    probe: Port,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Replica {
    fn start(api: &ApiServer, image: &str) -> Self {
        Self::with_certificates(api, image, None)
    }

    /// `tls_dir`: from files.
    fn with_certificates(api: &ApiServer, image: &str, tls_dir: Option<PathBuf>) -> Self {
        let (review, probe) = (Port::reserve(), Port::reserve());
        let settings = WebhookSettings {
            listen: review.addr,
            probe_listen: Some(probe.addr),
            tls_dir,
            secret: "tls".to_owned(),
            service: "duck".to_owned(),
            config: Some("ducks".to_owned()),
            cluster: Some(Cluster {
                host: "127.0.0.1".to_owned(),
                port: api.port,
                account: api.authority.dir.clone(),
            }),
            image: image.to_owned(),
            pull_policy: None,
            resources: Default::default(),
            lame_duck: Duration::from_secs(4),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let stopped = async { drop(stopped.await) };
            runtime.expect("a runtime").block_on(webhook::run(settings, stopped)).expect("it starts");
        });
        Self { review, probe, stop: Some(stop), thread: Some(thread) }
    }

    fn is_ready(&self) -> bool {
        TcpStream::connect(self.probe.addr).is_ok()
            && Client::ask(self.probe.addr, "/readyz").head.status == 200
    }

    /// SIGTERM.
    fn terminate(&mut self) {
        drop(self.stop.take());
    }

    fn wait_exit(mut self) {
        self.terminate();
        self.thread.take().expect("a thread").join().expect("no panic");
    }
}

#[test]
fn once_a_new_version_is_ready_no_replica_adds_the_old_sidecar() {
    let api = ApiServer::start();
    let mut old = Replica::start(&api, "lameduck:old");
    wait_for("the old replica", || old.is_ready().then_some(()));
    let image = |replica: &Replica| {
        let patch = api.review(replica.review.addr).expect("an answer with a patch");
        ["lameduck:old", "lameduck:new"].into_iter().find(|image| patch.contains(image)).expect("an image")
    };
    assert_eq!(image(&old), "lameduck:old");

    let new = Replica::start(&api, "lameduck:new");
    wait_for("the new replica", || {
        // Pods are created all the time.
        image(&old);
        new.is_ready().then_some(())
    });
    assert_eq!((image(&old), image(&new)), ("lameduck:new", "lameduck:new"));
    // What the new one refuses says nothing of it.
    let refused = api.post(old.review.addr, "no review").expect("an answer");
    assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
    assert_eq!(image(&old), "lameduck:new");
    old.terminate();
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        assert_eq!(image(&old), "lameduck:new", "in its lame duck");
    }
    old.wait_exit();
    assert_eq!(image(&new), "lameduck:new");

    // Going back is the same.
    let back = Replica::start(&api, "lameduck:old");
    wait_for("the replica of before", || back.is_ready().then_some(()));
    assert_eq!((image(&new), image(&back)), ("lameduck:old", "lameduck:old"));

    // The newest one is gone: the other answers at once, and names itself.
    back.wait_exit();
    assert_eq!(image(&new), "lameduck:new");
    wait_for("its own name", || api.newest().contains("lameduck:new").then_some(()));
    new.wait_exit();
}

#[test]
fn with_certificates_from_files_the_secret_names_the_newest_replica_too() {
    let api = ApiServer::start();
    let dir = api.authority.dir.join("server");
    api.authority.sign(&[NAME]).write(&dir);
    let bundle = STANDARD.encode(fs::read(api.authority.file()).expect("a CA"));
    api.store.lock().expect("not poisoned").config["webhooks"][0]["clientConfig"]["caBundle"] = json!(bundle);
    let old = Replica::with_certificates(&api, "lameduck:old", Some(dir.clone()));
    wait_for("the old replica", || old.is_ready().then_some(()));
    let new = Replica::with_certificates(&api, "lameduck:new", Some(dir));
    wait_for("the new replica", || new.is_ready().then_some(()));
    let patch = api.review(old.review.addr).expect("an answer with a patch");
    assert!(patch.contains("lameduck:new"), "{patch}");
    assert!(
        api.store.lock().expect("not poisoned").secret.get("data").is_none(),
        "no certificate is written"
    );
    old.wait_exit();
    new.wait_exit();
}

#[test]
fn a_replica_of_the_same_version_is_ready_without_a_wait_and_is_not_followed() {
    let api = ApiServer::start();
    let first = Replica::start(&api, "lameduck:1");
    wait_for("the first replica", || first.is_ready().then_some(()));
    let began = Instant::now();
    let second = Replica::start(&api, "lameduck:1");
    wait_for("the second replica", || second.is_ready().then_some(()));
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    assert!(api.newest().contains(&second.review.addr.to_string()), "{}", api.newest());
    second.wait_exit();
    for _ in 0..3 {
        assert!(api.review(first.review.addr).is_some());
    }
    first.wait_exit();
}
