//! How far a request has come, and who is to move next. Cells, because both directions update it concurrently in one
//! task; each holds one state, so that no two of them can contradict each other.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::failure::Progress;
use crate::config::Limits;
use crate::proxy::request_log::Totals;

/// Silence limit after an early response, for both sides: the client was told that the connection closes, and the app
/// may not want the rest of the request.
const EARLY_RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The state of one request.
#[derive(Debug, Default)]
pub struct Flow {
    progress: Cell<Progress>,
    upload: Cell<Upload>,
    waits: Cell<Waits>,
    after: Cell<After>,
    /// Bytes of the request's body received.
    received: Cell<u64>,
    /// Bytes written to the client.
    written: Cell<u64>,
}

/// How far the request has come from the client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Upload {
    /// Its last byte has not been passed on.
    #[default]
    Sending,
    /// Its last byte was passed on.
    Done,
    /// The client's next request has arrived as well.
    Pipelined,
    /// The client has closed its sending side since.
    HalfClosed,
}

/// What becomes of the client's connection after the response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// It serves the next request.
    #[default]
    Stays,
    /// It closes, and an HTTP/1.1 client was told so.
    Closes,
    /// It closes, because the app has begun to close its connections.
    AppGoes,
}

/// What the client owes. If it owes nothing, the app is the one taking time.
#[derive(Clone, Copy, Debug, Default)]
struct Waits {
    /// Bytes of its request.
    body: bool,
    /// Room for bytes of the response.
    room: bool,
    /// The response is complete and the request is not.
    early: bool,
}

impl Flow {
    /// Returns how far the request has come to the app; decides how a failure is answered.
    pub fn progress(&self) -> Progress {
        self.progress.get()
    }

    /// Whether the response has begun to go to the client.
    pub fn is_answering(&self) -> bool {
        matches!(self.progress.get(), Progress::Answering { .. })
    }

    /// Whether the response is an event stream that the client can reopen.
    pub fn streams_events(&self) -> bool {
        matches!(self.progress.get(), Progress::Answering { events: true, .. })
    }

    /// The app has received at least part of the request.
    pub fn reached_app(&self) {
        reached(&self.progress);
    }

    /// The app says that it did not look at what it has received.
    pub fn was_left_unread(&self) {
        if self.progress.get() == Progress::Sent {
            self.progress.set(Progress::Unsent);
        }
    }

    /// The response begins to go to the client: the app's or our own. `events` if it is an event stream that the
    /// client can reopen.
    pub fn answers(&self, status: u16, events: bool) {
        self.progress.set(Progress::Answering { status, events });
    }

    /// Writes the start of a request; see [`send`].
    ///
    /// # Errors
    /// If the app accepts no more bytes.
    pub async fn send(
        &self,
        app: &mut (impl AsyncWrite + Unpin),
        bytes: &[u8],
        first: usize,
    ) -> io::Result<()> {
        send(app, bytes, first, &self.progress).await
    }

    /// Returns how far the request has come from the client.
    pub fn upload(&self) -> Upload {
        self.upload.get()
    }

    /// Whether the last byte of the request was passed on.
    pub fn is_uploaded(&self) -> bool {
        self.upload.get() != Upload::Sending
    }

    /// The request has come this far.
    pub fn uploaded(&self, upload: Upload) {
        self.upload.set(upload);
    }

    /// Counts `n` bytes of the request's body.
    pub fn received(&self, n: usize) {
        self.received.set(self.received.get() + n as u64);
    }

    /// Counts `n` bytes written to the client.
    pub fn wrote(&self, n: usize) {
        self.written.set(self.written.get() + n as u64);
    }

    /// The client owes bytes of its request, or no more.
    pub fn waits_for_body(&self, waits: bool) {
        self.waits.set(Waits { body: waits, ..self.waits.get() });
    }

    /// The client owes room for bytes of the response, or no more.
    pub fn waits_for_room(&self, waits: bool) {
        self.waits.set(Waits { room: waits, ..self.waits.get() });
    }

    /// The complete response was sent before the complete request was received.
    pub fn answered_early(&self) {
        self.waits.set(Waits { early: true, ..self.waits.get() });
    }

    /// Whether part of a write to the client may be in the socket.
    pub fn is_writing(&self) -> bool {
        self.waits.get().room
    }

    /// Whether the client owes nothing and can only wait.
    pub fn client_waits(&self) -> bool {
        let Waits { body, room, .. } = self.waits.get();
        !body && !room
    }

    /// Returns how long the side that is waited for may be silent; zero for no limit.
    pub fn silence_limit(&self, limits: &Limits) -> Duration {
        match (self.client_waits(), self.waits.get().early) {
            (_, true) => limits.body_timeout.min(EARLY_RESPONSE_TIMEOUT),
            (false, false) => limits.body_timeout,
            // Now the app has to take the request and begin its response. Without `--answer-timeout` only the drain
            // limits that time.
            (true, false) if self.is_answering() => Duration::ZERO,
            (true, false) => limits.answer_timeout,
        }
    }

    /// Returns what becomes of the client's connection.
    pub fn after(&self) -> After {
        self.after.get()
    }

    /// Decides what becomes of the client's connection.
    pub fn then(&self, after: After) {
        self.after.set(after);
    }

    /// The response has no clean end, so the client's connection closes.
    pub fn breaks_off(&self) {
        if self.after.get() == After::Stays {
            self.after.set(After::Closes);
        }
    }

    /// The totals for the request log.
    pub fn totals(&self) -> Totals {
        let status = match self.progress.get() {
            Progress::Answering { status, .. } => status,
            Progress::Unsent | Progress::Sent => 0,
        };
        Totals { status, received: self.received.get(), sent: self.written.get() }
    }
}

/// Writes the start of a request, with its `first` bytes as one write. `progress` says at any time, even if this is
/// dropped half-way, whether the app may have read part of it: with TLS a write of more than one record becomes
/// several, and some of them may have arrived when it fails.
///
/// # Errors
/// If the app accepts no more bytes.
pub async fn send(
    app: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    first: usize,
    progress: &Cell<Progress>,
) -> io::Result<()> {
    let (mut at, mut end) = (0, bytes.len().min(first));
    while at < bytes.len() {
        match app.write(&bytes[at..end]).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => at += n,
        }
        reached(progress);
        if at == end {
            end = bytes.len();
        }
    }
    Ok(())
}

fn reached(progress: &Cell<Progress>) {
    if progress.get() == Progress::Unsent {
        progress.set(Progress::Sent);
    }
}
