//! `--health-check`: how to recognise health checks in addition to the well-known ones.

use std::str::FromStr;

use super::target::is_target;

/// How to recognise a health check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthCheck {
    /// Its path is this one; the query is ignored.
    Path(String),
    /// Its `User-Agent` contains this text.
    Agent(String),
}

impl FromStr for HealthCheck {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        match text.strip_prefix("agent:") {
            Some(agent) if is_text(agent.trim()) => Ok(Self::Agent(agent.trim().to_owned())),
            Some(_) => Err(format!("'{text}' names no agent: write agent: and a part of its User-Agent")),
            None if is_target(text) && !text.contains('?') => Ok(Self::Path(text.to_owned())),
            None => {
                Err(format!("'{text}' is neither a path without a query, as in /healthz, nor agent:TEXT"))
            }
        }
    }
}

/// Whether this is non-empty, visible ASCII with spaces, as a header value allows.
fn is_text(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_health_check_is_a_path_or_a_part_of_an_agent() {
        assert_eq!("/healthz".parse(), Ok(HealthCheck::Path("/healthz".into())));
        assert_eq!(" agent:Own Monitor/".parse(), Ok(HealthCheck::Agent("Own Monitor/".into())));
        for bad in ["", "healthz", "/a?b", "agent:", "agent: ", "agent:ä", "/a b"] {
            assert!(bad.parse::<HealthCheck>().is_err(), "{bad}");
        }
    }
}
