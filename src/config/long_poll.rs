//! `--long-poll` and `--long-poll-answer`: which requests are long polls, and how they are answered when they must end.

use std::str::FromStr;

use clap::Args;

use super::target::is_target;

/// `--long-poll` and its related flag.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Drain")]
pub struct LongPolls {
    /// A request that only waits for news, as in /poll, /rooms/* or 'POST /connect'. Repeat the flag or separate by
    /// commas. One that is still waiting when streams end is answered by --long-poll-answer. socket.io needs no entry:
    /// its session is closed
    #[arg(long = "long-poll", value_name = "[METHOD ]/PATH", value_delimiter = ',')]
    pub routes: Vec<LongPollRoute>,
    /// Answer to a --long-poll that must end: a status, optionally with a Content-Type and a body, as in
    /// '200 application/json []' [default: 204]
    #[arg(
        long = "long-poll-answer",
        value_name = "ANSWER",
        requires = "routes",
        default_value = "204",
        hide_default_value = true
    )]
    pub answer: LongPollAnswer,
}

/// One `--long-poll`: a method and a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LongPollRoute {
    method: String,
    path: String,
    /// Match every path that begins with `path`.
    below: bool,
}

impl LongPollRoute {
    /// Whether a request with this method and target is a long poll. The query is ignored.
    pub fn is(&self, method: &[u8], target: &[u8]) -> bool {
        let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
        let here = match self.below {
            true => path.starts_with(self.path.as_bytes()),
            false => path == self.path.as_bytes(),
        };
        here && method == self.method.as_bytes()
    }
}

impl FromStr for LongPollRoute {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (method, path) = text.split_once(' ').unwrap_or(("GET", text));
        let (path, below) = path.strip_suffix('*').map_or((path, false), |path| (path, true));
        let plain = is_target(path) && !path.contains(['?', '*']);
        if method.is_empty() || !method.bytes().all(|b| b.is_ascii_uppercase()) || !plain {
            return Err(format!("'{text}' is not a long poll: write /PATH, /PATH/* or 'POST /PATH'"));
        }
        Ok(Self { method: method.to_owned(), path: path.to_owned(), below })
    }
}

/// `--long-poll-answer`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LongPollAnswer {
    /// Status code, 200 to 599.
    pub status: u16,
    /// `Content-Type` and body, if the answer has one.
    pub body: Option<(String, String)>,
}

impl Default for LongPollAnswer {
    fn default() -> Self {
        Self { status: 204, body: None }
    }
}

impl FromStr for LongPollAnswer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.splitn(3, ' ');
        let status = words.next().and_then(|status| status.parse().ok());
        let body = match (words.next(), words.next()) {
            (None, _) => Some(None),
            (Some(kind), Some(body)) if kind.contains('/') && kind.bytes().all(|b| b.is_ascii_graphic()) => {
                Some(Some((kind.to_owned(), body.to_owned())))
            }
            _ => None,
        };
        let (Some(status @ 200..=599), Some(body)) = (status, body) else {
            return Err(format!("'{text}' is not an answer: write 204, or '200 application/json []'"));
        };
        // RFC 9110 §15.3.5, §15.3.6, §15.4.5.
        if matches!(status, 204 | 205 | 304) && body.is_some() {
            return Err(format!("a {status} answer has no body"));
        }
        Ok(Self { status, body })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_a_method_and_a_path() {
        let is = |route: &str, method: &str, target: &str| {
            route.parse::<LongPollRoute>().unwrap().is(method.as_bytes(), target.as_bytes())
        };
        assert!(is("/poll", "GET", "/poll") && is("/poll", "GET", "/poll?since=7"));
        assert!(
            !is("/poll", "POST", "/poll") && !is("/poll", "GET", "/poll/7") && !is("/poll", "GET", "/pol")
        );
        assert!(is("/rooms/*", "GET", "/rooms/7") && !is("/rooms/*", "GET", "/rooms"));
        assert!(is("POST /connect", "POST", "/connect") && !is("POST /connect", "GET", "/connect"));
        for bad in ["", "poll", "get /poll", "GET", "/a?b", "/a*b", "/a b", " /a"] {
            assert!(bad.parse::<LongPollRoute>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_answer_is_a_status_and_perhaps_a_body() {
        let answer: LongPollAnswer = "200 application/json {\"news\": []}".parse().unwrap();
        let body = Some(("application/json".to_owned(), "{\"news\": []}".to_owned()));
        assert_eq!(answer, LongPollAnswer { status: 200, body });
        assert_eq!("204".parse(), Ok(LongPollAnswer::default()));
        for bad in ["", "2040", "101", "x", "200 json", "200 json []", "204 text/plain x", "200 text/plain"] {
            assert!(bad.parse::<LongPollAnswer>().is_err(), "{bad}");
        }
    }
}
