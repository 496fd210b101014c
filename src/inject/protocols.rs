//! What a port speaks, by its names and its number. Pure.

use serde_json::{Map, Value};

use super::json::{containers, is_tcp, ports};
use super::model::Annotations;
use crate::config::{CaptureProtocol, CaptureRule};

/// Protocols of databases, queues and the like, by the names that their ports and `appProtocol` have, and their numbers.
/// A client's connection to one lives as long as the client, and a peer is often known by its address, which a proxy hides.
const OTHERS: [(&[&str], &[u16]); 18] = [
    (&["mysql", "mysqlx", "mariadb"], &[3306, 33060]),
    (&["postgres", "postgresql", "pgsql", "pgbouncer"], &[5432]),
    (&["redis", "valkey", "sentinel"], &[6379, 16379, 26379]),
    (&["mongo", "mongodb", "mongod", "mongos"], &[27017, 27018, 27019]),
    (&["kafka"], &[9092]),
    (&["zookeeper", "zk"], &[2181, 2888, 3888]),
    (&["amqp", "amqps", "rabbitmq"], &[5671, 5672]),
    (&["nats"], &[4222]),
    (&["mqtt", "mqtts"], &[1883, 8883]),
    (&["memcached", "memcache"], &[11211]),
    (&["cassandra", "cql"], &[9042]),
    (&["mssql", "sqlserver"], &[1433]),
    (&["oracle", "tns"], &[1521]),
    (&["etcd"], &[2379, 2380]),
    (&["ldap", "ldaps"], &[389, 636]),
    (&["smtp", "smtps", "submission", "imap", "imaps", "pop3", "pop3s"], &[25, 110, 143, 465, 587, 993, 995]),
    (&["ssh", "sftp", "ftp"], &[21, 22]),
    (&["dns"], &[53]),
];
/// First words of the names of ports that speak HTTP, whatever their numbers.
const HTTP: [&str; 8] = ["http", "http2", "https", "h2c", "grpc", "web", "api", "ws"];
/// Words in the names of ports that say nothing of what the app is for.
const BESIDE: [&str; 3] = ["metrics", "prometheus", "exporter"];

/// A port, as far as its pod and its Services tell.
struct KnownPort {
    /// Number on which the app listens, if it is known.
    number: Option<u16>,
    speaks: Language,
}

#[derive(PartialEq)]
enum Language {
    /// HTTP, or nobody knows.
    Http,
    /// HTTP for monitoring.
    Beside,
    /// Something else, by its name or number.
    Other(String),
}

impl KnownPort {
    fn other(&self) -> Option<&str> {
        if let Language::Other(name) = &self.speaks { Some(name) } else { None }
    }
}

/// Why the app should not be served unasked: each port that a Service leads to is known not to be HTTP. Without a Service
/// in sight, each port that the app's containers declare. Ports for monitoring don't count.
pub fn none_is_http(
    spec: &Map<String, Value>,
    services: &[Value],
    annotations: &Annotations,
) -> Option<String> {
    let for_clients = |port: &KnownPort| port.speaks != Language::Beside;
    let mut all: Vec<_> = services.iter().map(|port| of_service(spec, port)).filter(for_clients).collect();
    if all.is_empty() {
        let wanted = annotations.container.as_deref();
        let apps = containers(spec)
            .filter(|app| wanted.is_none_or(|wanted| app.get("name").is_some_and(|name| name == wanted)));
        all = apps.flat_map(tcp_ports).map(of_container).filter(for_clients).collect();
    }
    let ruled = |port: &KnownPort| annotations.ports.iter().any(|rule| Some(rule.port) == port.number);
    let mut others: Vec<&str> = all.iter().filter_map(KnownPort::other).collect();
    if others.is_empty() || others.len() < all.len() || all.iter().any(ruled) {
        return None;
    }
    others.sort_unstable();
    others.dedup();
    Some(format!(
        "it serves no HTTP ({}): to drain its connections nevertheless, annotate lameduck.dev/capture: loopback",
        others.join(", ")
    ))
}

/// Rules for captured ports that are known not to be HTTP: the proxy need not wait for their first bytes.
pub fn rules(spec: &Map<String, Value>, annotations: &Annotations) -> Vec<CaptureRule> {
    let mut rules = annotations.ports.clone();
    for port in declared(spec).map(of_container).filter(|port| port.other().is_some()) {
        if let Some(port) = port.number.filter(|port| rules.iter().all(|rule| rule.port != *port)) {
            rules.push(CaptureRule { port, protocol: CaptureProtocol::Tcp });
        }
    }
    rules
}

/// TCP ports that the containers declare.
fn declared(spec: &Map<String, Value>) -> impl Iterator<Item = &Map<String, Value>> {
    containers(spec).flat_map(tcp_ports)
}

fn tcp_ports(container: &Map<String, Value>) -> impl Iterator<Item = &Map<String, Value>> {
    ports(container).filter_map(Value::as_object).filter(|port| is_tcp(port))
}

fn of_container(port: &Map<String, Value>) -> KnownPort {
    let number = number(port.get("containerPort"));
    known(&[port.get("name")], &[number], number)
}

/// Its own names come first: the pod's may say no more than "main".
fn of_service(spec: &Map<String, Value>, port: &Value) -> KnownPort {
    let target = port.get("targetPort").filter(|target| !target.is_null()).or(port.get("port"));
    let mut all = declared(spec);
    let found = all.find(|declared| match target {
        Some(Value::String(name)) => declared.get("name").and_then(Value::as_str) == Some(name),
        target => target == declared.get("containerPort"),
    });
    let listens = number(found.map_or(target, |found| found.get("containerPort")));
    let names =
        [port.get("appProtocol"), port.get("name"), target, found.and_then(|found| found.get("name"))];
    known(&names, &[listens, number(port.get("port"))], listens)
}

fn number(value: Option<&Value>) -> Option<u16> {
    value.and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok())
}

fn known(names: &[Option<&Value>], numbers: &[Option<u16>], number: Option<u16>) -> KnownPort {
    let speaks = names.iter().filter_map(|name| name.and_then(Value::as_str)).find_map(by_name);
    let other = |number: &&u16| OTHERS.iter().any(|(_, others)| others.contains(number));
    let by_number = || Some(Language::Other(format!("port {}", numbers.iter().flatten().find(other)?)));
    KnownPort { number, speaks: speaks.or_else(by_number).unwrap_or(Language::Http) }
}

/// What a name says: "kubernetes.io/h2c", "tcp-redis"; none if that is nothing.
fn by_name(name: &str) -> Option<Language> {
    let lower = name.to_lowercase();
    let words: Vec<&str> = lower.split(['-', '_', '/', '.']).collect();
    let has = |known: &[&str]| words.iter().any(|word| known.contains(word));
    if has(&BESIDE) {
        Some(Language::Beside)
    } else if has(&HTTP) {
        Some(Language::Http)
    } else if OTHERS.iter().any(|(names, _)| has(names)) {
        Some(Language::Other(name.to_owned()))
    } else {
        None
    }
}
