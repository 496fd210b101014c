//! The targets, and whether a run meets them.

use serde_json::{Value, json};

use crate::proxy::Proxy;
use crate::report::{Report, median, number, table};

/// What a figure is compared with.
enum Goal {
    /// Ratio of the first proxy's figure to the second's, median over the rounds.
    Ratio(Proxy, Proxy),
    /// Latency that lameduck adds to a direct request, relative to that of nginx.
    Added,
    /// Ratio of lameduck's figure to another one of its own.
    Growth(&'static str),
    /// lameduck's figure itself.
    Value,
}

struct Target {
    figure: &'static str,
    goal: Goal,
    most: f64,
    stretch: Option<f64>,
}

const fn target(figure: &'static str, goal: Goal, most: f64, stretch: Option<f64>) -> Target {
    Target { figure, goal, most, stretch }
}

const fn ratio(figure: &'static str, peer: Proxy, most: f64, stretch: Option<f64>) -> Target {
    target(figure, Goal::Ratio(Proxy::Lameduck, peer), most, stretch)
}

const fn added(figure: &'static str) -> Target {
    target(figure, Goal::Added, 1.1, Some(1.0))
}

const fn growth(figure: &'static str, from: &'static str) -> Target {
    target(figure, Goal::Growth(from), 1.15, None)
}

const fn value(figure: &'static str, most: f64, stretch: Option<f64>) -> Target {
    target(figure, Goal::Value, most, stretch)
}

const CPU_64: &str = "CPU per request, 64 connections";
const H2C: &str = "CPU per h2c request, 16 × 10 streams";
const GRPC: &str = "CPU per gRPC call, 16 × 10 streams";
const BESIDE_1_OPEN: &str = "CPU per request beside 1 open";
const BESIDE_1_IN_FLIGHT: &str = "CPU per request beside 1 in flight";

const TARGETS: [Target; 35] = [
    ratio(CPU_64, Proxy::Nginx, 1.0, Some(0.93)),
    ratio(CPU_64, Proxy::Haproxy, 0.95, None),
    ratio(CPU_64, Proxy::Envoy, 0.40, None),
    ratio(CPU_64, Proxy::HaproxyTcp, 1.17, None),
    target(CPU_64, Goal::Ratio(Proxy::LameduckUnix, Proxy::Nginx), 0.85, Some(0.80)),
    ratio("CPU per request, 1 connection", Proxy::Nginx, 1.0, Some(0.87)),
    ratio("CPU per request, 64 KB answer", Proxy::Nginx, 1.0, None),
    ratio("CPU per request, 1 MB answer", Proxy::Nginx, 1.0, None),
    ratio("CPU per request, 1 MB upload", Proxy::Nginx, 1.0, None),
    added("latency p50, 1 connection"),
    added("latency p99, 1 connection"),
    added("latency p50, 64 connections"),
    added("latency p99, 64 connections"),
    added("latency p50, 200 requests/s"),
    added("latency p99, 200 requests/s"),
    value("per idle connection", 650.0, Some(400.0)),
    value("per idle WebSocket", 2200.0, Some(1100.0)),
    value("resident at start (RSS)", 8.0, None),
    value("resident with 10,000 idle (RSS)", 15.0, None),
    value("start to first answer", 10.0, None),
    value("binary", 8.0, None),
    value("image", 8.5, None),
    value("10,000 connections at once: failed", 0.0, None),
    value("drain of 10,000 idle", 100.0, None),
    value("data-plane threads at 0.1 CPU", 1.0, None),
    ratio("latency p99, 500 requests/s at 0.1 CPU", Proxy::Nginx, 1.1, None),
    ratio(H2C, Proxy::Nginx, 1.0, None),
    ratio(H2C, Proxy::Envoy, 0.40, None),
    ratio(GRPC, Proxy::Nginx, 1.0, None),
    ratio(GRPC, Proxy::Envoy, 0.40, None),
    ratio("CPU per TLS handshake and request", Proxy::Nginx, 1.0, None),
    growth("CPU per request beside 100 open", BESIDE_1_OPEN),
    growth("CPU per request beside 10,000 open", BESIDE_1_OPEN),
    growth("CPU per request beside 100 in flight", BESIDE_1_IN_FLIGHT),
    growth("CPU per request beside 10,000 in flight", BESIDE_1_IN_FLIGHT),
];

impl Target {
    fn measured(&self, report: &Report) -> Option<f64> {
        match self.goal {
            Goal::Ratio(ours, peer) => report.ratio(self.figure, ours, peer),
            Goal::Value => report.median(self.figure, Proxy::Lameduck),
            Goal::Growth(from) => {
                let (ours, base) = (report.samples(self.figure)?, report.samples(from)?);
                let by_round = |(ours, base): (&f64, &f64)| ours / base;
                median(&ours.iter().zip(base).map(by_round).collect::<Vec<_>>())
            }
            Goal::Added => {
                let added = |proxy| report.difference(self.figure, proxy, Proxy::Direct);
                Some(added(Proxy::Lameduck)? / added(Proxy::Nginx)?)
            }
        }
    }

    /// The direct request was no faster than through nginx: the machine was too busy for this figure.
    fn is_noise(&self, report: &Report) -> bool {
        let added = || report.difference(self.figure, Proxy::Nginx, Proxy::Direct);
        matches!(self.goal, Goal::Added) && added().is_some_and(|added| added <= 0.0)
    }

    /// Describes the comparison.
    fn name(&self) -> String {
        let figure = self.figure;
        match self.goal {
            Goal::Ratio(Proxy::LameduckUnix, peer) => {
                format!("{figure}, app by unix socket / {}", peer.name())
            }
            Goal::Ratio(_, peer) => format!("{figure} / {}", peer.name()),
            Goal::Added => format!("{figure}, added / nginx"),
            Goal::Growth(from) => format!("{figure} / {}", from.trim_start_matches("CPU per request ")),
            Goal::Value => figure.to_owned(),
        }
    }

    /// Formats a value with its unit; a ratio has none.
    fn text(&self, report: &Report, value: f64) -> String {
        match self.goal {
            Goal::Value => format!("{} {}", number(value), report.unit(self.figure)),
            _ => format!("{value:.2}×"),
        }
    }

    fn verdict(&self, report: &Report, measured: f64) -> &'static str {
        match self.stretch {
            _ if self.is_noise(report) => "lost in the noise",
            Some(stretch) if measured <= stretch => "ok, stretch met",
            _ if measured <= self.most => "ok",
            _ => "short",
        }
    }
}

/// The targets as a Markdown table: measured, target, verdict.
pub fn markdown(report: &Report) -> String {
    let mut rows = vec![["figure", "measured", "target", ""].map(str::to_owned).to_vec()];
    for target in &TARGETS {
        let measured = target.measured(report);
        let stretch = target.stretch.map(|stretch| format!(" (stretch {})", target.text(report, stretch)));
        rows.push(vec![
            target.name(),
            measured.map_or_else(|| "not measured".to_owned(), |value| target.text(report, value)),
            format!("≤ {}{}", target.text(report, target.most), stretch.unwrap_or_default()),
            measured.map_or("", |value| target.verdict(report, value)).to_owned(),
        ]);
    }
    table(&rows)
}

/// The targets as JSON.
pub fn json(report: &Report) -> Value {
    let target = |target: &Target| {
        let measured = target.measured(report);
        json!({
            "figure": target.name(), "measured": measured, "target": target.most, "stretch": target.stretch,
            "verdict": measured.map(|measured| target.verdict(report, measured)),
        })
    };
    TARGETS.iter().map(target).collect()
}
