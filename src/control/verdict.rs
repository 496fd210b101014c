//! The verdict of a drain: what it lost.

use std::fmt;

use crate::metrics::Ended;

/// Endings in which a client loses something.
const LOST: [Ended; 5] = [Ended::Unsent, Ended::Unanswered, Ended::Cut, Ended::AppGone, Ended::AppDown];

/// The verdict of a drain. As text: `clean`, or what was lost, as in `2 cut, 1 unsent`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was lost.
    Clean,
    /// Number of lost requests for each kind of loss.
    Lost(Vec<(Ended, u64)>),
    /// The proxy ended before its drain did.
    Unknown,
}

impl Verdict {
    /// Makes the verdict from the number of requests per ending during the drain.
    pub fn of(ended: &[(Ended, u64)]) -> Self {
        let lost: Vec<_> = ended.iter().filter(|(way, n)| *n > 0 && LOST.contains(way)).copied().collect();
        if lost.is_empty() { Self::Clean } else { Self::Lost(lost) }
    }

    /// Whether nothing was lost.
    pub fn is_clean(&self) -> bool {
        *self == Self::Clean
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clean => f.write_str("clean"),
            Self::Unknown => f.write_str("the proxy has ended"),
            Self::Lost(lost) => {
                for (at, (way, n)) in lost.iter().enumerate() {
                    let comma = if at == 0 { "" } else { ", " };
                    write!(f, "{comma}{n} {}", way.name())?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_what_was_lost_and_nothing_else() {
        let ended = [(Ended::Complete, 7), (Ended::Unsent, 1), (Ended::Cut, 2), (Ended::AppGone, 0)];
        assert_eq!(Verdict::of(&ended).to_string(), "1 unsent, 2 cut");
        assert_eq!(Verdict::of(&ended[..1]), Verdict::Clean);
        assert_eq!(Verdict::Clean.to_string(), "clean");
    }
}
