//! URLs of the app that lameduck calls in a drain.

use std::str::FromStr;

use clap::Args;
use hyper::header::{HeaderName, HeaderValue};

use super::addresses::UpstreamAddr;
use super::target::is_target;

/// A path of the app, or a full URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppUrl {
    /// Destination; `None` is the app.
    pub at: Option<UpstreamAddr>,
    /// Path and query of the request.
    pub target: String,
}

/// `--after-drain` and its headers: one GET.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AfterDrain {
    /// Destination.
    pub url: AppUrl,
    /// Header fields of the request.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// Where the app says how much it is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BusyUrl {
    /// The URL without its fragment.
    pub url: AppUrl,
    /// JSON pointer to the number in the response (RFC 6901 §6: a fragment); empty for the whole.
    pub pointer: String,
}

/// How the app learns of a drain, and says when it has nothing more to do.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Drain")]
pub struct TellSettings {
    /// POST to send when a drain begins, so that the app fetches no new work: a /PATH of the app, or
    /// http(s)://HOST:PORT/PATH. It is repeated once a second until the response is a 2xx, for 10 s at most; the drain waits for it
    #[arg(long, value_name = "URL")]
    pub on_drain_url: Option<AppUrl>,
    /// GET to send once a second during a drain, which waits until the response is 0 or false: a /PATH of the app, or
    /// http(s)://HOST:PORT/PATH. A JSON pointer behind # says where in the response it stands, as in
    /// /health#/activeRequests
    #[arg(long, value_name = "URL")]
    pub busy_url: Option<BusyUrl>,
}

impl FromStr for AppUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!("'{text}' is neither a path that begins with / nor http://HOST:PORT/PATH (or https://)")
        };
        let (at, target) = match text.split_once("://").filter(|_| !text.starts_with('/')) {
            None => (None, text),
            Some((_, rest)) => {
                let (_, target) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                let place = &text[..text.len() - target.len()];
                (Some(place.parse().map_err(|_| bad())?), if target.is_empty() { "/" } else { target })
            }
        };
        is_target(target).then(|| Self { at, target: target.to_owned() }).ok_or_else(bad)
    }
}

impl FromStr for BusyUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (url, pointer) = text.split_once('#').unwrap_or((text, ""));
        match pointer.is_empty() || pointer.starts_with('/') {
            true => Ok(Self { url: url.parse()?, pointer: pointer.to_owned() }),
            false => Err(format!("'#{pointer}' is not a JSON pointer: write #/activeRequests")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_is_the_fragment_of_a_url() {
        let busy: BusyUrl = "/health?x=1#/a/0".parse().unwrap();
        assert_eq!((busy.url.target.as_str(), busy.pointer.as_str()), ("/health?x=1", "/a/0"));
        let busy: BusyUrl = "http://127.0.0.1:9/busy".parse().unwrap();
        assert_eq!((busy.url.at, busy.pointer.as_str()), ("127.0.0.1:9".parse().ok(), ""));
        for bad in ["busy", "/busy#a", "ftp://x/busy", "/a b"] {
            assert!(bad.parse::<BusyUrl>().is_err(), "{bad}");
        }
    }
}
