//! Long polls: which requests they are, and what ends one for the app. Pure; no sockets.

use crate::config::{LongPollAnswer, LongPolls};

/// The kind of a long poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LongPoll {
    /// An engine.io poll (the transport of socket.io), with its protocol version, 3 or 4.
    EngineIo(u8),
    /// A path named by `--long-poll`.
    Named,
}

impl LongPoll {
    /// Returns the kind of long poll that a request with this method and target is, if any.
    pub fn of(polls: &LongPolls, method: &[u8], target: &[u8]) -> Option<Self> {
        let named = || polls.routes.iter().any(|route| route.is(method, target)).then_some(Self::Named);
        engine_io(method, target).or_else(named)
    }

    /// Returns status, `Content-Type` and body. engine.io gets the packet "close": the session lives in the app's
    /// memory and ends with the app, so the client has to open a new one, which it does at once. (After a "noop" it
    /// would ask for the old session, at an app that doesn't know it.) The app sees the poll's connection close and
    /// ends the session too.
    pub fn answer(self, named: &LongPollAnswer) -> (u16, Option<(&str, &str)>) {
        match self {
            Self::EngineIo(3) => (200, Some(("text/plain; charset=UTF-8", "1:1"))),
            Self::EngineIo(_) => (200, Some(("text/plain; charset=UTF-8", "1"))),
            Self::Named => (named.status, named.body.as_ref().map(|(kind, body)| (&**kind, &**body))),
        }
    }
}

/// `GET /any/path?EIO=4&transport=polling&sid=…` polls an open session. Without `sid` it opens one, which is answered
/// at once; with `j` it wants a script (JSONP), which is left to the app.
fn engine_io(method: &[u8], target: &[u8]) -> Option<LongPoll> {
    if method != b"GET" {
        return None;
    }
    let query = &target[memchr::memchr(b'?', target)? + 1..];
    let (mut version, mut polling, mut session) = (None, false, false);
    for pair in query.split(|byte| *byte == b'&') {
        match pair {
            b"EIO=3" => version = Some(3),
            b"EIO=4" => version = Some(4),
            b"transport=polling" => polling = true,
            _ if pair.starts_with(b"j=") => return None,
            _ => session |= pair.starts_with(b"sid=") && pair.len() > b"sid=".len(),
        }
    }
    version.filter(|_| polling && session).map(LongPoll::EngineIo)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_ios_waiting_get_is_told_from_its_other_requests() {
        let of = |method: &str, target: &str| engine_io(method.as_bytes(), target.as_bytes());
        let poll = "/socket.io/?EIO=4&transport=polling&t=PQ1x&sid=lv_VI97HAXpY6yYWAAAC";
        assert_eq!(of("GET", poll), Some(LongPoll::EngineIo(4)));
        assert_eq!(of("GET", "/x?token=1&EIO=3&transport=polling&sid=a"), Some(LongPoll::EngineIo(3)));
        assert_eq!(of("POST", poll), None);
        for other in [
            "/",
            "/socket.io/?EIO=4&transport=polling&t=PQ1x",
            "/socket.io/?EIO=4&transport=polling&sid=",
            "/socket.io/?EIO=4&transport=websocket&sid=a",
            "/socket.io/?EIO=3&transport=polling&sid=a&j=0",
            "/socket.io/?transport=polling&sid=a",
            "/EIO=4&transport=polling&sid=a",
        ] {
            assert_eq!(of("GET", other), None, "{other}");
        }
    }
}
