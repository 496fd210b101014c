//! A TLS peer that follows a script, made from a seed: first as a session of rustls, then with records made by hand
//! under that session's keys, right or wrong.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use rustls::crypto::cipher::{
    InboundOpaqueMessage, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
};
use rustls::crypto::ring::cipher_suite::{
    TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{
    ClientConfig, ClientConnection, Connection, ConnectionTrafficSecrets, ContentType, ProtocolVersion,
    RootCertStore, ServerConfig, ServerConnection,
};

/// Content types of records (RFC 8446 §5.1).
const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;

/// splitmix64: a seed gives the same numbers everywhere.
pub struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    fn size(&mut self) -> usize {
        let max = self.pick(&[2, 50, 500, 3_000, 18_000]);
        1 + self.below(max)
    }
}

/// What the peer does next.
#[derive(Debug)]
pub enum Step {
    /// Sends so many bytes.
    Data(usize),
    /// Changes its key and asks for ours to be changed.
    NewKey,
    /// Waits while the stream sends so many bytes, and reads at most so many at a time.
    Hear(usize, usize),
    /// Sends close_notify.
    Notify,
    /// Sends a record of this type with this content.
    Record(u8, Vec<u8>),
    /// Sends a record that does not decrypt.
    Tampered,
    /// Sends the beginning of a record.
    Part(usize),
    /// Sends these bytes as they are.
    Raw(Vec<u8>),
    /// Closes its sending side.
    Eof,
}

#[derive(Debug)]
pub struct Script {
    pub tls13: bool,
    /// Whether the stream is the server.
    pub server: bool,
    /// Whether the peer sends early data, which is refused (RFC 8446 §4.2.10).
    pub early: bool,
    max_fragment: Option<usize>,
    /// Maximum number of bytes that the peer sends at once.
    pub cut: usize,
    /// Whether the stream reads only after all bytes of a step have come.
    pub late: bool,
    /// Size of a read.
    pub room: usize,
    pub steps: Vec<Step>,
}

impl Script {
    /// The script of this seed.
    pub fn new(seed: u64) -> Self {
        let random = &mut Random(seed);
        let (tls13, server) = (random.below(3) > 0, random.below(3) > 0);
        let mut steps: Vec<_> = (0..random.below(5)).map(|_| Self::step(random, tls13)).collect();
        match random.below(4) {
            0 => {}
            1 => steps.push(Step::Notify),
            // What the other side's session has queued goes first, since from here on records are made by hand.
            _ => {
                steps.push(Step::Hear(1, 100));
                (0..1 + random.below(5)).for_each(|_| Self::record(random, &mut steps));
            }
        }
        steps.push(Step::Eof);
        Self {
            tls13,
            server,
            early: tls13 && server && random.below(4) == 0,
            max_fragment: random.pick(&[None, None, Some(64), Some(1_000)]),
            cut: random.pick(&[10, 300, 5_000, 100_000]),
            late: random.below(3) == 0,
            room: random.pick(&[50, 1_000, 16_384, 100_000]),
            steps,
        }
    }

    fn step(random: &mut Random, tls13: bool) -> Step {
        match random.below(7) {
            0 if tls13 => Step::NewKey,
            1 | 2 => {
                Step::Hear(random.size() * random.pick(&[1, 1, 10]), random.pick(&[500, 10_000, 200_000]))
            }
            _ => Step::Data(random.size()),
        }
    }

    fn record(random: &mut Random, steps: &mut Vec<Step>) {
        let byte = random.below(256) as u8;
        let record = match random.below(18) {
            0 | 1 => {
                let times = random.pick(&[1, 2, 30, 40]);
                return steps.extend((0..times).map(|_| Step::Record(DATA, Vec::new())));
            }
            2 | 3 => Step::Record(DATA, vec![byte; random.size().min(16_384)]),
            4 => Step::Record(DATA, vec![byte; 16_384 + random.below(400)]),
            5 => Step::Record(ALERT, vec![random.pick(&[1, 2]), random.pick(&[0, 90, 10, 100, byte])]),
            6 => Step::Record(ALERT, vec![1; random.pick(&[0, 1, 3, 4])]),
            7 => Step::Record(ALERT, vec![1, 0]),
            // KeyUpdate, of which only 0 and 1 exist.
            8 => Step::Record(HANDSHAKE, vec![24, 0, 0, 1, random.pick(&[0, 1, 1, 2])]),
            // The same in two records, with or without another one in between.
            9 => {
                steps.push(Step::Record(HANDSHAKE, vec![24, 0]));
                if byte.is_multiple_of(2) {
                    steps.push(Step::Record(DATA, vec![byte; 9]));
                }
                Step::Record(HANDSHAKE, vec![0, 1, 1])
            }
            // HelloRequest of TLS 1.2.
            10 => Step::Record(HANDSHAKE, vec![0; 4]),
            11 => Step::Record(HANDSHAKE, vec![random.pick(&[1, 2, 4, 20, byte]), 0, 0, 2, byte, byte]),
            // The beginning of a long message.
            12 => Step::Record(HANDSHAKE, [&[4, byte % 3, 255, 255][..], &[0; 900]].concat()),
            13 => Step::Record(CHANGE_CIPHER_SPEC, vec![1]),
            14 => Step::Raw(vec![CHANGE_CIPHER_SPEC, 3, 3, 0, 1, 1]),
            15 => Step::Raw((0..random.below(40)).map(|_| random.below(256) as u8).collect()),
            16 => Step::Tampered,
            _ => Step::Part(random.below(30)),
        };
        let cut = matches!(record, Step::Part(_));
        steps.push(record);
        if !cut {
            steps.push(Step::Record(DATA, vec![byte; 20]));
        }
    }
}

/// Configurations of both sides, which can speak one version with one cipher suite.
fn configs(script: &Script) -> (ClientConfig, ServerConfig) {
    let cipher_suites = vec![TLS13_CHACHA20_POLY1305_SHA256, TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256];
    let provider = Arc::new(CryptoProvider { cipher_suites, ..ring::default_provider() });
    let version = [if script.tls13 { &TLS13 } else { &TLS12 }];
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("a key");
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).expect("a root");
    let client = ClientConfig::builder_with_provider(provider.clone()).with_protocol_versions(&version);
    let mut client = client.expect("a version").with_root_certificates(roots).with_no_client_auth();
    let server = ServerConfig::builder_with_provider(provider).with_protocol_versions(&version);
    let server = server.expect("a version").with_no_client_auth();
    let mut server = server.with_single_cert(vec![made.cert.der().clone()], key).expect("a pair");
    (client.enable_secret_extraction, server.enable_secret_extraction) = (true, true);
    (client.max_fragment_size, server.max_fragment_size) = (script.max_fragment, script.max_fragment);
    (client, server)
}

/// The server's name.
pub fn name() -> ServerName<'static> {
    ServerName::try_from("localhost").expect("a name")
}

/// Gives the client a ticket of a server that would accept early data.
fn get_ticket(client: &mut ClientConfig, server: &ServerConfig) {
    client.enable_early_data = true;
    let mut server = server.clone();
    server.max_early_data_size = 1_000;
    let mut client: Connection =
        ClientConnection::new(Arc::new(client.clone()), name()).expect("a session").into();
    let mut server: Connection = ServerConnection::new(Arc::new(server)).expect("a session").into();
    while client.wants_write() || server.wants_write() {
        pass(&mut client, &mut server);
        pass(&mut server, &mut client);
    }
}

fn pass(from: &mut Connection, to: &mut Connection) {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).expect("room");
    }
    let mut left = &bytes[..];
    while !left.is_empty() {
        to.read_tls(&mut left).expect("records");
        to.process_new_packets().expect("records");
    }
}

#[derive(Clone)]
pub enum Config {
    Client(Arc<ClientConfig>),
    Server(Arc<ServerConfig>),
}

/// The peer: first a session of rustls, then records made by hand with that session's keys.
pub struct Peer {
    /// Its socket.
    pub tcp: TcpStream,
    session: Option<Connection>,
    by_hand: Option<ByHand>,
    /// Received and not decrypted yet.
    raw: Vec<u8>,
}

struct ByHand {
    version: ProtocolVersion,
    encrypter: (Box<dyn MessageEncrypter>, u64),
    decrypter: (Box<dyn MessageDecrypter>, u64),
}

impl ByHand {
    fn new(session: Connection, tls13: bool) -> Self {
        let secrets = session.dangerous_extract_secrets().expect("secrets");
        let (
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv },
            ConnectionTrafficSecrets::Chacha20Poly1305 { key: rx, iv: rx_iv },
        ) = (secrets.tx.1, secrets.rx.1)
        else {
            unreachable!("one cipher suite")
        };
        let (encrypter, decrypter) = if tls13 {
            let aead = TLS13_CHACHA20_POLY1305_SHA256.tls13().expect("TLS 1.3").aead_alg;
            (aead.encrypter(key, iv), aead.decrypter(rx, rx_iv))
        } else {
            let suite = TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256;
            let rustls::SupportedCipherSuite::Tls12(suite) = suite else { unreachable!("TLS 1.2") };
            let aead = suite.aead_alg;
            (aead.encrypter(key, iv.as_ref(), &[]), aead.decrypter(rx, rx_iv.as_ref()))
        };
        let version = if tls13 { ProtocolVersion::TLSv1_3 } else { ProtocolVersion::TLSv1_2 };
        Self { version, encrypter: (encrypter, secrets.tx.0), decrypter: (decrypter, secrets.rx.0) }
    }

    fn seal(&mut self, kind: u8, content: &[u8]) -> Vec<u8> {
        let (typ, payload) = (ContentType::from(kind), OutboundChunks::Single(content));
        let message = OutboundPlainMessage { typ, version: self.version, payload };
        self.encrypter.1 += 1;
        self.encrypter.0.encrypt(message, self.encrypter.1 - 1).expect("a record").encode()
    }

    fn open(&mut self, record: &[u8], heard: &mut Heard) {
        let mut content = record[5..].to_vec();
        let (typ, version) = (ContentType::from(record[0]), ProtocolVersion::TLSv1_2);
        let message = InboundOpaqueMessage::new(typ, version, &mut content);
        match self.decrypter.0.decrypt(message, self.decrypter.1) {
            Ok(message) if message.typ == ContentType::ApplicationData => heard.bytes.extend(message.payload),
            Ok(message) => heard.other.push(format!("{:?} {:?}", message.typ, message.payload)),
            // Under a new key, that of its answer to a KeyUpdate.
            Err(_) => heard.other.push("a record".to_owned()),
        }
        self.decrypter.1 += 1;
    }
}

/// What the peer received: bytes of the application, and other records.
#[derive(Default, PartialEq)]
pub struct Heard {
    /// The application's bytes.
    pub bytes: Vec<u8>,
    /// Other records.
    pub other: Vec<String>,
}

impl Peer {
    /// The peer at this socket, and the stream's configuration.
    pub fn new(script: &Script, tcp: TcpStream) -> (Self, Config) {
        let (mut client, server) = configs(script);
        if script.early {
            get_ticket(&mut client, &server);
        }
        let (client, server) = (Arc::new(client), Arc::new(server));
        let (session, config) = if script.server {
            let mut session = ClientConnection::new(client, name()).expect("a session");
            if let Some(mut early) = session.early_data() {
                early.write_all(b"early").expect("room");
            }
            (session.into(), Config::Server(server))
        } else {
            (ServerConnection::new(server).expect("a session").into(), Config::Client(client))
        };
        (Self { tcp, session: Some(session), by_hand: None, raw: Vec::new() }, config)
    }

    fn session(&mut self) -> &mut Connection {
        self.session.as_mut().expect("records are not made by hand yet")
    }

    /// Whether the session's handshake is not complete yet.
    pub fn is_handshaking(&mut self) -> bool {
        self.session().is_handshaking()
    }

    /// Bytes that the session has to send.
    pub fn outgoing(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.session().wants_write() {
            self.session().write_tls(&mut bytes).expect("room");
        }
        bytes
    }

    /// Receives at most so many bytes, without waiting; false at the end.
    pub fn receive(&mut self, most: usize) -> bool {
        let mut bytes = vec![0; most];
        match (&self.tcp).read(&mut bytes) {
            Ok(n) => {
                self.raw.extend(&bytes[..n]);
                n > 0
            }
            Err(why) => why.kind() == ErrorKind::WouldBlock,
        }
    }

    /// Decrypts what was received.
    pub fn hear(&mut self, heard: &mut Heard) {
        while let Some(session) = &mut self.session
            && !self.raw.is_empty()
        {
            let mut left = &self.raw[..];
            let read = session.read_tls(&mut left).unwrap_or(0);
            self.raw = left.to_vec();
            if let Err(why) = session.process_new_packets() {
                heard.other.push(format!("{why:?}"));
                self.raw.clear();
            }
            let _ = session.reader().read_to_end(&mut heard.bytes);
            if read == 0 {
                break;
            }
        }
        while let Some(by_hand) = &mut self.by_hand
            && self.raw.len() >= 5
        {
            let length = 5 + usize::from(self.raw[3]) * 256 + usize::from(self.raw[4]);
            if self.raw.len() < length {
                break;
            }
            by_hand.open(&self.raw.drain(..length).collect::<Vec<_>>(), heard);
        }
    }

    /// The bytes that a step sends.
    pub fn say(&mut self, step: &Step, tls13: bool) -> Vec<u8> {
        match step {
            Step::Data(n) => {
                let bytes: Vec<_> = (0..*n).map(|n| (n % 251) as u8).collect();
                self.session().set_buffer_limit(None);
                self.session().writer().write_all(&bytes).expect("room");
                return self.outgoing();
            }
            Step::NewKey => {
                self.session().refresh_traffic_keys().expect("TLS 1.3");
                return self.outgoing();
            }
            Step::Notify => {
                self.session().send_close_notify();
                return self.outgoing();
            }
            Step::Raw(bytes) => return bytes.clone(),
            Step::Hear(..) | Step::Eof => return Vec::new(),
            Step::Record(..) | Step::Tampered | Step::Part(_) => {}
        }
        let mut bytes = Vec::new();
        if self.session.is_some() {
            bytes = self.outgoing();
            self.by_hand = self.session.take().map(|session| ByHand::new(session, tls13));
        }
        let by_hand = self.by_hand.as_mut().expect("made above");
        bytes.extend(match step {
            Step::Record(kind, content) => by_hand.seal(*kind, content),
            Step::Part(n) => by_hand.seal(DATA, &[7; 30])[..1 + n].to_vec(),
            _ => {
                let mut record = by_hand.seal(DATA, &[7; 30]);
                record[20] ^= 1;
                record
            }
        });
        bytes
    }
}
