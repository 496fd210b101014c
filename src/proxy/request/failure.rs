//! What can go wrong with a request, and the response it gets.

use std::io;
use std::time::Duration;

use h2::Reason;

use crate::metrics::Ended;
use crate::proxy::http1::head::HeadOut;

/// Time limit for writing our own response to a failed request, and the last frames of a connection.
pub const LAST_WRITE_TIMEOUT: Duration = Duration::from_secs(1);
/// Limit on interim (1xx) responses to one request.
pub const MAX_INTERIM: u32 = 64;

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The client closed or reset its connection.
    ClientGone,
    /// The request's head can't be expressed in HTTP/2, which the app speaks.
    BadHead,
    /// The client's body violates its transfer coding.
    BadBody,
    /// The app closed or reset its connection.
    AppGone(Lost),
    /// The app's address refuses connections.
    AppDown,
    /// The app's address can't be reached.
    AppUnreachable,
    /// The app's response can't be parsed.
    AppBroken(&'static str),
    /// The app reset the HTTP/2 stream; the reason is passed on to the client.
    AppReset(Reason),
    /// The app has not processed the request: it refused the stream, or is going away.
    Unprocessed(Reason),
    /// Nothing moved within the time limit.
    TimedOut,
    /// The app's response did not begin in time.
    AppSlow,
    /// Too many requests are in flight.
    TooManyInFlight,
    /// The limit of open files leaves none for a connection to the app.
    NoMoreFiles,
    /// Too many requests, or too many bytes of them, are being held.
    HeldTooMany,
    /// The request was held for the maximum time.
    HeldTooLong,
    /// The drain's deadline has passed.
    Forced,
}

/// How the app's connection was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// By a reset, before any byte of the response.
    Reset,
    /// In order, before any byte of the response.
    Closed,
    /// Within the response.
    Midway,
}

impl Lost {
    /// How it was lost when a read `ended` like this; `unanswered` if before any byte of the response.
    pub fn by(ended: &io::Result<usize>, unanswered: bool) -> Self {
        match ended {
            _ if !unanswered => Self::Midway,
            // A missing TLS close_notify is an end too, though an unclean one.
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Self::Reset,
            _ => Self::Closed,
        }
    }
}

/// How far a request had progressed when it failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Progress {
    /// The app has received nothing.
    #[default]
    Unsent,
    /// The app has received at least part of the request.
    Sent,
    /// The response has begun to go to the client.
    Answering {
        /// Its status.
        status: u16,
        /// It is an event stream that the client can reopen.
        events: bool,
    },
}

/// Our own response to a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailureResponse {
    /// The status to send; `None` if a complete response is no longer possible.
    pub status: Option<u16>,
    /// For metrics and the access log.
    pub ended: Ended,
    /// The reason, as the response's text.
    pub why: &'static str,
}

impl Failure {
    /// Returns the response for the request's progress. A response that was cut off never gets a clean end.
    pub fn response(self, progress: Progress) -> FailureResponse {
        let (status, ended, why) = match (self, progress) {
            (Self::ClientGone, _) => (None, Ended::ClientGone, ""),
            (Self::BadHead, _) => {
                (Some(400), Ended::Rejected, "the request's head can't be expressed in HTTP/2")
            }
            (Self::BadBody, _) => (Some(400), Ended::Rejected, "the request's body can't be read"),
            (Self::AppGone(_), _) => {
                (Some(502), Ended::AppGone, "the app closed the connection without a whole answer")
            }
            (Self::AppDown, _) => (Some(503), Ended::AppDown, "the app does not accept connections"),
            (Self::AppUnreachable, _) => (Some(502), Ended::AppDown, "the app's address can't be reached"),
            (Self::AppBroken(why), _) => (Some(502), Ended::AppBroken, why),
            (Self::AppReset(_), _) => (Some(502), Ended::AppGone, "the app reset the stream"),
            (Self::Unprocessed(_), _) => (Some(503), Ended::AppGone, "the app did not process the request"),
            (Self::TimedOut, Progress::Unsent) => (Some(408), Ended::TimedOut, "the request came too slowly"),
            (Self::TimedOut, _) => (Some(408), Ended::TimedOut, "the request's body came too slowly"),
            (Self::AppSlow, _) => {
                (Some(504), Ended::TimedOut, "the app did not answer in time (--answer-timeout)")
            }
            (Self::TooManyInFlight, _) => {
                (Some(503), Ended::Refused, "too many requests are in flight (--max-in-flight)")
            }
            (Self::NoMoreFiles, _) => {
                (Some(503), Ended::Refused, "no more connections to the app may be open (ulimit -n)")
            }
            (Self::HeldTooMany, _) => {
                (Some(503), Ended::Refused, "too many requests are waiting for the app")
            }
            (Self::HeldTooLong, _) => (Some(503), Ended::Refused, "the request waited too long for the app"),
            (Self::Forced, Progress::Unsent) => {
                (Some(503), Ended::Unsent, "shutting down; the request was not processed, send it again")
            }
            (Self::Forced, Progress::Sent) => {
                (Some(504), Ended::Unanswered, "shutting down; the app did not answer in time")
            }
            (Self::Forced, Progress::Answering { .. }) => (None, Ended::Cut, "shutting down"),
        };
        FailureResponse { status: status.filter(|_| progress <= Progress::Sent), ended, why }
    }
}

/// Returns a complete response of our own, by HTTP/1.1. The connection closes after it.
pub fn answer(status: u16, why: &str, head_only: bool) -> Vec<u8> {
    let mut answer = Vec::new();
    let text = put_head(status, why, &mut answer);
    if !head_only {
        answer.extend_from_slice(text.as_bytes());
    }
    answer
}

/// Writes the head of a response of our own, and returns its text.
pub fn put_head(status: u16, why: &str, out: &mut impl HeadOut) -> String {
    let reason = match status {
        400 => "Bad Request",
        408 => "Request Timeout",
        414 => "URI Too Long",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        _ => "",
    };
    let text = format!("lameduck: {why}\n");
    out.status_line(status, reason.as_bytes());
    out.field("Content-Type", &[b"text/plain; charset=utf-8"]);
    out.field("Content-Length", &[text.len().to_string().as_bytes()]);
    if status == 503 {
        out.field("Retry-After", &[b"1"]);
    }
    out.connection(&[b"Connection: close\r\n\r\n"]);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_the_deadline_the_answer_tells_whether_the_app_has_the_request() {
        let status = |progress| Failure::Forced.response(progress).status;
        assert_eq!(status(Progress::Unsent), Some(503));
        assert_eq!(status(Progress::Sent), Some(504));
        assert_eq!(
            status(Progress::Answering { status: 200, events: false }),
            None,
            "a half-sent answer is cut, never ended"
        );
    }

    #[test]
    fn a_503_asks_to_come_again() {
        let answer = String::from_utf8(answer(503, "x", false)).unwrap();
        assert!(
            answer.contains("\r\nRetry-After: 1\r\n") && answer.contains("\r\nConnection: close\r\n"),
            "{answer}"
        );
    }
}
