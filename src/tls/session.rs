//! A TLS connection without its socket: bytes in, bytes out, no I/O. It holds no buffers while idle: data is
//! processed in the thread's scratch space, and only leftovers are kept.

use std::{fmt, io};

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::CertificateDer;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{CommonState, Error, InvalidMessage};

/// The session of either side.
pub enum Side {
    /// The client's.
    Client(UnbufferedClientConnection),
    /// The server's.
    Server(UnbufferedServerConnection),
}

impl fmt::Debug for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client(_) => "Client",
            Self::Server(_) => "Server",
        })
    }
}

/// The common interface of rustls' two kinds of sessions.
trait Records {
    type Data;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    /// Whether there is more to send.
    fn has_output(&self) -> bool;
}

impl Records for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn has_output(&self) -> bool {
        self.wants_write()
    }
}

impl Records for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn has_output(&self) -> bool {
        self.wants_write()
    }
}

/// A session.
#[derive(Debug)]
pub struct Session {
    side: Side,
    /// Received: part of a record, or of a handshake message.
    incoming: Vec<u8>,
    /// Decrypted and not read yet.
    plain: Vec<u8>,
    /// Bytes of `plain` already used.
    used: usize,
    /// Encrypted and not in the socket yet.
    outgoing: Vec<u8>,
    /// Bytes accepted from a writer of which at least the last one is still in `outgoing`.
    pub(super) taken: usize,
    /// The peer has sent close_notify.
    notified: bool,
    /// We have sent close_notify.
    close_notify_sent: bool,
    failed: bool,
}

/// What to send as soon as possible.
enum Say<'b, 'o> {
    Nothing,
    /// These bytes, encrypted into that room; `run` returns how many.
    Bytes(&'b [u8], &'o mut [u8]),
    /// close_notify.
    CloseNotify,
}

/// Overhead of a record, rounded up, in bytes.
const RECORD_OVERHEAD: usize = 64;

/// Returns the room that `bytes` need once encrypted, in bytes.
pub(super) fn encrypted(bytes: usize) -> usize {
    bytes + (bytes / (16 * 1024) + 2) * RECORD_OVERHEAD
}

impl Session {
    pub(super) fn new(side: Side) -> Self {
        Self {
            side,
            incoming: Vec::new(),
            plain: Vec::new(),
            used: 0,
            outgoing: Vec::new(),
            taken: 0,
            notified: false,
            close_notify_sent: false,
            failed: false,
        }
    }

    fn common(&self) -> &CommonState {
        match &self.side {
            Side::Client(client) => client,
            Side::Server(server) => server,
        }
    }

    pub(super) fn is_handshaking(&self) -> bool {
        self.common().is_handshaking()
    }

    pub(super) fn peer_certificate(&self) -> Option<&CertificateDer<'static>> {
        self.common().peer_certificates()?.first()
    }

    /// Returns the bytes decrypted and not read yet.
    pub(super) fn plain(&self) -> &[u8] {
        &self.plain[self.used..]
    }

    /// Marks the first `n` of these bytes as used.
    pub(super) fn consume(&mut self, n: usize) {
        self.used += n;
        if self.used == self.plain.len() {
            (self.plain, self.used) = (Vec::new(), 0);
        }
    }

    /// Whether nothing more will be decrypted.
    ///
    /// # Errors
    /// If the session has failed.
    pub(super) fn is_over(&self) -> io::Result<bool> {
        match self.failed {
            true => Err(io::ErrorKind::InvalidData.into()),
            false => Ok(self.notified),
        }
    }

    /// Returns how many received bytes wait for the rest of their record or message.
    pub(super) fn pending(&self) -> usize {
        self.incoming.len()
    }

    /// Returns the bytes to send.
    pub(super) fn outgoing(&mut self) -> &mut Vec<u8> {
        &mut self.outgoing
    }

    /// Begins or continues what needs nothing from the peer.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        self.say(Say::Nothing).map(drop).map_err(failure)
    }

    /// Processes received bytes, which are in `bytes` after room for [`Session::pending`] bytes. Plaintext goes to
    /// `put`, which returns how much it took; the rest is kept.
    ///
    /// # Errors
    /// What is wrong with the bytes. An alert for the peer is in [`Session::outgoing`], if it speaks TLS at all.
    pub(super) fn receive(
        &mut self,
        bytes: &mut [u8],
        mut put: impl FnMut(&[u8]) -> usize,
    ) -> io::Result<()> {
        bytes[..self.incoming.len()].copy_from_slice(&self.incoming);
        let mut kept = std::mem::take(&mut self.plain);
        let went = self.run(bytes, Say::Nothing, &mut |plain| {
            let n = if kept.is_empty() { put(plain) } else { 0 };
            kept.extend_from_slice(&plain[n..]);
        });
        self.plain = kept;
        match went {
            Ok((discard, _)) => {
                self.incoming = Vec::from(&bytes[discard..]);
                Ok(())
            }
            Err(why) => {
                self.failed = true;
                if self.is_handshaking() && is_plain(&why) {
                    self.outgoing = Vec::new();
                }
                Err(failure(why))
            }
        }
    }

    /// Encrypts `bytes` into `room`, which is [`encrypted`] long; returns how many bytes were encrypted.
    pub(super) fn encrypt(&mut self, bytes: &[u8], room: &mut [u8]) -> io::Result<usize> {
        self.say(Say::Bytes(bytes, room)).map_err(failure)
    }

    /// Sends close_notify, once.
    pub(super) fn send_close_notify(&mut self) {
        if !std::mem::replace(&mut self.close_notify_sent, true) && !self.failed {
            let _ = self.say(Say::CloseNotify);
        }
    }

    fn say(&mut self, say: Say<'_, '_>) -> Result<usize, Error> {
        let (mut incoming, mut kept) = (std::mem::take(&mut self.incoming), std::mem::take(&mut self.plain));
        let went = self.run(&mut incoming, say, &mut |plain| kept.extend_from_slice(plain));
        (self.incoming, self.plain) = (incoming, kept);
        self.failed |= went.is_err();
        let (done, written) = went?;
        self.incoming.drain(..done);
        Ok(written)
    }

    /// Runs until the peer has to send something; an alert for it is in `outgoing` too. Returns how many of the
    /// `incoming` bytes were processed, and how many bytes were encrypted.
    fn run(
        &mut self,
        incoming: &mut [u8],
        say: Say<'_, '_>,
        plain: &mut dyn FnMut(&[u8]),
    ) -> Result<(usize, usize), Error> {
        let Self { side, outgoing, notified, .. } = self;
        match side {
            Side::Client(client) => run(client, incoming, say, plain, outgoing, notified),
            Side::Server(server) => run(server, incoming, say, plain, outgoing, notified),
        }
    }
}

fn run<C: Records>(
    session: &mut C,
    incoming: &mut [u8],
    mut say: Say<'_, '_>,
    plain: &mut dyn FnMut(&[u8]),
    outgoing: &mut Vec<u8>,
    notified: &mut bool,
) -> Result<(usize, usize), Error> {
    let (mut done, mut failed) = (0, None);
    loop {
        let UnbufferedStatus { mut discard, state } = session.process(&mut incoming[done..]);
        let mut said = None;
        let state = match state {
            // The alert, if any, comes next.
            Err(why) if failed.is_none() => {
                failed = Some(why);
                done += discard;
                continue;
            }
            Err(again) => return Err(failed.unwrap_or(again)),
            Ok(state) => state,
        };
        match state {
            ConnectionState::ReadTraffic(mut records) => {
                while let Some(record) = records.next_record() {
                    let record = record?;
                    discard += record.discard;
                    plain(record.payload);
                }
            }
            ConnectionState::EncodeTlsData(mut message) => {
                let start = outgoing.len();
                if let Err(EncodeError::InsufficientSize(needed)) = message.encode(&mut []) {
                    outgoing.resize(start + needed.required_size, 0);
                    message.encode(&mut outgoing[start..]).map_err(|why| Error::General(why.to_string()))?;
                }
            }
            // The record is in `outgoing`, which keeps the order.
            ConnectionState::TransmitTlsData(sent) => sent.done(),
            ConnectionState::PeerClosed => *notified = true,
            ConnectionState::WriteTraffic(mut traffic) => {
                said = Some(match std::mem::replace(&mut say, Say::Nothing) {
                    Say::Nothing => 0,
                    Say::Bytes(bytes, room) => traffic.encrypt(bytes, room).map_err(cant_encrypt)?,
                    Say::CloseNotify => {
                        let start = outgoing.len();
                        outgoing.resize(start + encrypted(0), 0);
                        let n = traffic.queue_close_notify(&mut outgoing[start..]).map_err(cant_encrypt)?;
                        outgoing.truncate(start + n);
                        0
                    }
                });
            }
            // The handshake waits for the peer, or there is nothing to send. (There is no early data.)
            _ => said = Some(0),
        }
        done += discard;
        // An alert may come last, such as that of a TLS 1.3 server after its hello.
        match failed {
            Some(why) if !session.has_output() => return Err(why),
            unsaid => failed = unsaid,
        }
        if let Some(written) = said {
            return Ok((done, written));
        }
    }
}

fn cant_encrypt(why: EncryptError) -> Error {
    Error::General(why.to_string())
}

fn failure(why: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Whether the bytes are not TLS at all.
pub(super) fn is_plain(why: &Error) -> bool {
    matches!(why, Error::InvalidMessage(InvalidMessage::InvalidContentType))
}
