//! Formats `lameduck status` and the progress of a drain. Pure.

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Deserialize;

/// Number of oldest requests in the table.
const MAX_ROWS: usize = 10;

/// Response of `GET /status`.
#[derive(Deserialize)]
pub(super) struct ProxyState {
    phase: String,
    trigger: Option<String>,
    pub(super) in_flight: u64,
    pub(super) running: u64,
    pub(super) held: u64,
    connections: u64,
    age_ms: Option<u64>,
    deadline_ms: Option<i64>,
    verdict: Option<String>,
    pub(super) hold: Option<HoldReply>,
    pub(super) upstream: Option<String>,
    #[serde(default)]
    switched: bool,
    #[serde(default)]
    servers: Vec<Server>,
    probe: Option<SocketAddr>,
    #[serde(default)]
    captured: Vec<u16>,
    #[serde(default)]
    bypassed: Vec<BypassedReply>,
    pub(super) ready: bool,
    reasons: Vec<String>,
}

impl ProxyState {
    /// Time until a drain cuts what still runs; none without a drain, a deadline or running work.
    pub(super) fn time_left(&self) -> Option<Duration> {
        let running = self.phase != "serving" && self.phase != "drained";
        self.deadline_ms.filter(|_| running).map(|left| Duration::from_millis(left.max(0) as u64))
    }
}

/// A hold by an operator.
#[derive(Deserialize)]
pub(super) struct HoldReply {
    left_ms: u64,
    idle: bool,
}

/// One of the app's addresses.
#[derive(Deserialize)]
struct Server {
    address: String,
    in_flight: u64,
    down: bool,
}

/// A port that clients reach past the proxy.
#[derive(Deserialize)]
struct BypassedReply {
    address: SocketAddr,
    advice: String,
}

/// An entry of `GET /ledger`.
#[derive(Deserialize)]
pub(super) struct Row {
    method: String,
    path: String,
    age_ms: u64,
    class: String,
    peer: String,
}

/// `draining: 3 in flight, 12s`.
pub(super) fn progress(state: &ProxyState, elapsed: Duration) -> String {
    let left = deadline(state).map(|left| format!(", {left}")).unwrap_or_default();
    format!("{}: {} in flight, {}s{left}", state.phase, state.in_flight, elapsed.as_secs())
}

/// `waiting for running requests: 3 running, 12 held, 4.0s`.
pub(super) fn swapping(what: &str, running: u64, held: u64, elapsed: Duration) -> String {
    format!("{what}: {running} running, {held} held, {}", seconds(elapsed.as_millis() as u64))
}

/// A finished drain has no deadline any more.
fn deadline(state: &ProxyState) -> Option<String> {
    let left = state.deadline_ms.filter(|_| state.phase != "drained")?;
    let time = seconds(left.unsigned_abs());
    Some(if left < 0 { format!("{time} past the deadline") } else { format!("{time} until the deadline") })
}

/// The state, then the oldest requests in flight; ends with a newline.
pub(super) fn table(state: &ProxyState, mut rows: Vec<Row>) -> String {
    let mut phase = state.phase.clone();
    if let Some(trigger) = &state.trigger {
        let _ = write!(phase, ", by {trigger}");
    }
    if let Some(age) = state.age_ms {
        let _ = write!(phase, ", began {} ago", seconds(age));
    }
    if let Some(left) = deadline(state) {
        let _ = write!(phase, ", {left}");
    }
    if let Some(HoldReply { left_ms, idle }) = &state.hold {
        let what = if *idle { "idle" } else { "waiting for running requests" };
        let _ = write!(phase, ", holding new requests ({what}) for at most {} more", seconds(*left_ms));
    }
    let ready = if state.ready { "yes".to_owned() } else { format!("no: {}", state.reasons.join("; ")) };
    let ProxyState { in_flight, running, held, connections, .. } = state;
    let mut text = format!(
        "phase        {phase}\nready        {ready}\n\
         in flight    {in_flight} ({running} running, {held} held)\nconnections  {connections}\n"
    );
    if !state.captured.is_empty() {
        let ports: Vec<_> = state.captured.iter().map(u16::to_string).collect();
        let _ = writeln!(text, "captured     {}", ports.join(", "));
    }
    for BypassedReply { address, advice } in &state.bypassed {
        let _ = writeln!(text, "bypassed     {address}: {advice}");
    }
    if let Some(upstream) = &state.upstream {
        let by = if state.switched { " (set by lameduck switch; overrides --upstream)" } else { "" };
        let _ = writeln!(text, "upstream     {upstream}{by}");
        for Server { address, in_flight, down } in state.servers.iter().filter(|_| state.servers.len() > 1) {
            let down = if *down { ", down" } else { "" };
            let _ = writeln!(text, "             {address}: {in_flight} in flight{down}");
        }
    }
    if let Some(probe) = state.probe {
        let _ = writeln!(text, "probe        {probe}");
    }
    if let Some(verdict) = &state.verdict {
        let _ = writeln!(text, "verdict      {verdict}");
    }
    if rows.is_empty() {
        return text;
    }
    rows.sort_by_key(|row| std::cmp::Reverse(row.age_ms));
    let _ = writeln!(text, "\n{:>9}  {:<12} {:<22} REQUEST", "AGE", "CLASS", "PEER");
    for Row { method, path, age_ms, class, peer } in rows.iter().take(MAX_ROWS) {
        let (age, request) = (seconds(*age_ms), printable(&format!("{method} {path}")));
        let _ = writeln!(text, "{age:>9}  {class:<12} {:<22} {request}", printable(peer));
    }
    if rows.len() > MAX_ROWS {
        let _ = writeln!(text, "{:>9}  and {} younger", "", rows.len() - MAX_ROWS);
    }
    text
}

/// Cuts the text to the terminal's size, so that no line wraps and the top stays visible.
pub(super) fn fit(text: &str, columns: usize, rows: usize) -> String {
    let lines = text.lines().take(rows.saturating_sub(1));
    lines.map(|line| line.chars().take(columns).chain(['\n']).collect::<String>()).collect()
}

fn seconds(ms: u64) -> String {
    format!("{}.{}s", ms / 1000, ms % 1000 / 100)
}

/// Replaces control characters: text from outside must not control the terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(more: &str) -> ProxyState {
        let known = r#""in_flight":3,"running":2,"held":1,"connections":7"#;
        serde_json::from_str(&format!("{{{known},{more}}}")).unwrap()
    }

    fn row(age_ms: u64, path: &str) -> Row {
        let (method, class, peer) = ("GET".into(), "stream".into(), "10.0.0.7:4242".into());
        Row { method, path: path.into(), age_ms, class, peer }
    }

    #[test]
    fn a_serving_proxy_is_told_in_four_lines() {
        let state = state(r#""phase":"serving","ready":true,"reasons":[]"#);
        assert_eq!(
            table(&state, vec![]),
            "phase        serving\nready        yes\nin flight    3 (2 running, 1 held)\nconnections  7\n"
        );
    }

    #[test]
    fn a_drain_is_told_with_its_cause_its_times_and_the_oldest_first() {
        let state = state(
            r#""phase":"draining","trigger":"operator","age_ms":3210,"deadline_ms":21800,
               "verdict":"1 cut","ready":false,"reasons":["a","b"]"#,
        );
        let text = table(&state, vec![row(1200, "/young"), row(12_345, "/old\x1b[2J")]);
        for line in [
            "phase        draining, by operator, began 3.2s ago, 21.8s until the deadline",
            "ready        no: a; b",
            "verdict      1 cut",
            "    12.3s  stream       10.0.0.7:4242          GET /old?[2J",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert!(text.find("/old") < text.find("/young"));
        let line = progress(&state, Duration::from_secs(4));
        assert_eq!(line, "draining: 3 in flight, 4s, 21.8s until the deadline");
    }

    #[test]
    fn a_hold_and_a_switch_are_told() {
        let state = state(
            r#""phase":"serving","hold":{"left_ms":5500,"idle":false},"upstream":"green:3000","switched":true,
               "servers":[{"address":"10.0.0.2:3000","in_flight":2,"down":false},
                          {"address":"10.0.0.3:3000","in_flight":0,"down":true}],"ready":true,"reasons":[]"#,
        );
        let text = table(&state, vec![]);
        for line in [
            "phase        serving, holding new requests (waiting for running requests) for at most 5.5s more\n",
            "upstream     green:3000 (set by lameduck switch; overrides --upstream)\n",
            "             10.0.0.2:3000: 2 in flight\n             10.0.0.3:3000: 0 in flight, down\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
        let line = swapping("waiting", 2, 1, Duration::from_millis(1200));
        assert_eq!(line, "waiting: 2 running, 1 held, 1.2s");
    }

    #[test]
    fn a_drain_that_is_over_has_no_deadline() {
        let state = state(
            r#""phase":"drained","age_ms":9000,"deadline_ms":-1000,"verdict":"clean","ready":false,"reasons":[]"#,
        );
        assert!(table(&state, vec![]).starts_with("phase        drained, began 9.0s ago\nready"));
    }

    #[test]
    fn on_a_terminal_no_line_wraps_and_the_top_stays() {
        assert_eq!(fit("a long line\nübrig\nmore\nlast\n", 4, 4), "a lo\nübri\nmore\n");
        assert_eq!(fit("", 4, 0), "");
    }

    #[test]
    fn only_the_ten_oldest_are_shown() {
        let state = state(r#""phase":"serving","ready":true,"reasons":[]"#);
        let text = table(&state, (0..12).map(|n| row(n, "/x")).collect());
        assert_eq!(text.matches("GET /x").count(), MAX_ROWS);
        assert!(text.ends_with("and 2 younger\n"), "{text}");
    }
}
