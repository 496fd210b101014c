//! All metric names and labels in one place. Counting is a plain add in the thread's own shard; names, sums over shards
//! and the text format are produced on a scrape.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};

/// Makes the list of endings: the variants, their labels, and all of them in order.
macro_rules! endings {
    ($($(#[$meta:meta])* $name:ident = $label:literal,)*) => {
        /// How a request ended. Endings caused by a drain are separate, since its verdict counts them.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Ended {
            $($(#[$meta])* $name,)*
        }

        impl Ended {
            /// All variants, in order.
            pub const ALL: [Self; [$($label),*].len()] = [$(Self::$name),*];

            /// Value in the access log and in the label `ended`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)*
                }
            }
        }
    };
}

endings! {
    /// The last byte of the app's response was written.
    #[default]
    Complete = "complete",
    /// The client closed the connection first.
    ClientGone = "client-gone",
    /// The client sent invalid HTTP, or too much, or too slowly; it got a 4xx, 501 or 505.
    Rejected = "rejected",
    /// The app closed the connection before its response was complete.
    AppGone = "app-gone",
    /// The app could not be reached within `--upstream-wait`.
    AppDown = "app-down",
    /// The app's response is not valid HTTP.
    AppBroken = "app-broken",
    /// A time limit expired: `--body-timeout` or `--tunnel-timeout` without any traffic, or `--answer-timeout` without
    /// a response.
    TimedOut = "timed-out",
    /// A limit on held or in-flight requests was exceeded. 503.
    Refused = "refused",
    /// A drain ended an event stream: on an event boundary, or, if compressed, where it was quiet.
    EventsEnded = "events-ended",
    /// A drain answered a long poll for the app.
    PollEnded = "poll-ended",
    /// A drain sent Close 1001 on a WebSocket.
    WebSocketEnded = "websocket-ended",
    /// A drain ended a quiet connection to a captured port.
    QuietEnded = "quiet-ended",
    /// At the deadline: the request was never sent to the app. 503.
    Unsent = "unsent",
    /// At the deadline: the app had the request but had not responded. 504.
    Unanswered = "unanswered",
    /// At the deadline: the response was partly sent, or a tunnel was open.
    Cut = "cut",
}

/// Upper bounds of the duration histogram, in milliseconds.
const BOUNDS_MS: [u64; 14] = [1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 60_000];

/// Counters of one thread. Only that thread writes them; padded so that no two threads share a cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Shard {
    /// Responses by status / 100; 0 counts requests without a response.
    statuses: [AtomicU64; 6],
    ended: [AtomicU64; Ended::ALL.len()],
    /// The same for health checks, which no drain's verdict counts.
    health_checks: [AtomicU64; Ended::ALL.len()],
    durations: [AtomicU64; BOUNDS_MS.len() + 1],
    duration_us: AtomicU64,
    /// Bytes of heads and bodies from clients.
    pub received: AtomicU64,
    /// Bytes of heads and bodies to clients.
    pub sent: AtomicU64,
    /// Requests that arrived, without health checks.
    pub arrivals: AtomicU64,
    /// Those that were the first request of their connection.
    pub newcomers: AtomicU64,
    /// Time of the latest one, in microseconds of the clock in `proxy::shared`; 0 for never.
    pub last_arrival_us: AtomicU64,
    /// Client connections accepted.
    pub accepted: AtomicU64,
    /// Connections made to the app.
    pub connects: AtomicU64,
    /// Requests retried on a new connection.
    pub retries: AtomicU64,
}

/// Adds to a counter that only one thread writes; cheaper than an atomic add.
pub fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed) + n, Ordering::Relaxed);
}

impl Shard {
    /// Counts a finished request.
    pub fn request(&self, status: u16, ended: Ended, took: Duration) {
        add(&self.ended[ended as usize], 1);
        self.answered(status, took);
    }

    /// Counts a finished health check.
    pub fn health_check(&self, status: u16, ended: Ended, took: Duration) {
        add(&self.health_checks[ended as usize], 1);
        self.answered(status, took);
    }

    fn answered(&self, status: u16, took: Duration) {
        add(&self.statuses[usize::from(status / 100).min(5)], 1);
        let ms = took.as_millis() as u64;
        let bucket = BOUNDS_MS.iter().position(|bound| ms < *bound).unwrap_or(BOUNDS_MS.len());
        add(&self.durations[bucket], 1);
        add(&self.duration_us, took.as_micros() as u64);
    }
}

/// Number of requests by ending, over all threads, without health checks.
pub fn ended(shards: &[std::sync::Arc<Shard>]) -> [u64; Ended::ALL.len()] {
    by_way(shards, |shard| &shard.ended)
}

fn by_way(
    shards: &[std::sync::Arc<Shard>],
    counts: fn(&Shard) -> &[AtomicU64; Ended::ALL.len()],
) -> [u64; Ended::ALL.len()] {
    std::array::from_fn(|way| shards.iter().map(|shard| counts(shard)[way].load(Ordering::Relaxed)).sum())
}

/// Current values, as opposed to counters.
#[derive(Clone, Debug, Default)]
pub struct Now {
    /// Requests and tunnels in flight.
    pub in_flight: u64,
    /// Held ones among them.
    pub held: u64,
    /// Open client connections.
    pub connections: u64,
    /// Number of the phase: 0 for serving to 4 for drained.
    pub phase: u64,
    /// The readiness verdict.
    pub ready: bool,
    /// Finished drains: clean ones, and those that cut something.
    pub drains: [u64; 2],
    /// Duration of the last drain in seconds.
    pub last_drain: Option<f64>,
    /// Ports that the app opened and capture does not protect, each with the reason.
    pub bypassed: Vec<(u16, &'static str)>,
    /// Leases that are out; they are in flight too.
    pub leases: u64,
    /// Access log lines dropped because stdout was too slow.
    pub log_dropped: u64,
}

/// All metrics in Prometheus text format, version 0.0.4.
pub fn render(shards: &[std::sync::Arc<Shard>], now: &Now) -> String {
    let sum = |pick: fn(&Shard) -> &AtomicU64| -> u64 {
        shards.iter().map(|shard| pick(shard).load(Ordering::Relaxed)).sum()
    };
    let drains = [(Some(("verdict", "clean")), now.drains[0]), (Some(("verdict", "cut")), now.drains[1])];
    let mut families = requests(shards);
    families.extend([
        counter(
            "lameduck_received_bytes_total",
            "Bytes received from clients.",
            sum(|shard| &shard.received),
        ),
        counter("lameduck_sent_bytes_total", "Bytes sent to clients.", sum(|shard| &shard.sent)),
        counter("lameduck_connections_total", "Client connections accepted.", sum(|shard| &shard.accepted)),
        counter(
            "lameduck_upstream_connects_total",
            "Connections made to the app.",
            sum(|shard| &shard.connects),
        ),
        counter(
            "lameduck_upstream_retries_total",
            "Requests to the app that were sent again.",
            sum(|shard| &shard.retries),
        ),
        counters("lameduck_drains_total", "Completed drains by verdict.", &drains),
        counter("lameduck_access_log_dropped_total", "Access log lines dropped.", now.log_dropped),
    ]);
    families.extend(gauges(now));
    text(&families)
}

/// Requests by status, ending and duration.
fn requests(shards: &[std::sync::Arc<Shard>]) -> Vec<MetricFamily> {
    let of_status = |n: usize| shards.iter().map(|shard| shard.statuses[n].load(Ordering::Relaxed)).sum();
    let codes = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];
    let by_code: Vec<_> =
        codes.iter().enumerate().map(|(n, code)| (Some(("code", *code)), of_status(n))).collect();
    let (work, checks) = (ended(shards), by_way(shards, |shard| &shard.health_checks));
    let by_end = |count: &dyn Fn(usize) -> u64| -> Vec<_> {
        Ended::ALL.iter().map(|way| (Some(("ended", way.name())), count(*way as usize))).collect()
    };
    vec![
        counters(
            "lameduck_requests_total",
            "Requests by status class of the response, without --tcp connections.",
            &by_code,
        ),
        counters(
            "lameduck_requests_ended_total",
            "Requests and --tcp connections by how they ended.",
            &by_end(&|way| work[way] + checks[way]),
        ),
        counters(
            "lameduck_health_checks_total",
            "Health checks among the requests, by how they ended.",
            &by_end(&|way| checks[way]),
        ),
        durations(shards),
    ]
}

fn gauges(now: &Now) -> Vec<MetricFamily> {
    let mut families = vec![
        gauge(
            "lameduck_in_flight",
            "Requests, tunnels, --tcp connections and leases in flight.",
            now.in_flight as f64,
        ),
        gauge("lameduck_held", "Requests held while the app restarts.", now.held as f64),
        gauge(
            "lameduck_leases",
            "Leases that are out: work of the app that is no request.",
            now.leases as f64,
        ),
        gauge("lameduck_connections", "Open client connections.", now.connections as f64),
        gauge(
            "lameduck_phase",
            "0 serving, 1 lame duck, 2 draining, 3 forcing, 4 drained.",
            now.phase as f64,
        ),
        gauge("lameduck_ready", "1 while /readyz answers 200.", f64::from(u8::from(now.ready))),
    ];
    if !now.bypassed.is_empty() {
        let help = "1 for each port that clients reach past lameduck.";
        let port =
            |(port, reason): &(u16, &str)| gauge_of(1.0, &[("port", &port.to_string()), ("reason", reason)]);
        let ports = now.bypassed.iter().map(port).collect();
        families.push(family("lameduck_port_bypassed", help, MetricType::GAUGE, ports));
    }
    if let Some(seconds) = now.last_drain {
        families.push(gauge("lameduck_last_drain_seconds", "Duration of the last drain.", seconds));
    }
    families
}

/// Metric families in Prometheus text format, version 0.0.4.
pub fn text(families: &[MetricFamily]) -> String {
    prometheus::TextEncoder::new().encode_to_string(families).unwrap_or_default()
}

/// Label of a counter, if any, and its value.
pub type Labelled = (Option<(&'static str, &'static str)>, u64);

fn counter(name: &str, help: &str, value: u64) -> MetricFamily {
    counters(name, help, &[(None, value)])
}

/// Counters with one name and different labels.
pub fn counters(name: &str, help: &str, values: &[Labelled]) -> MetricFamily {
    let metrics = values.iter().map(|(label, value)| {
        let mut counter = Counter::default();
        counter.set_value(*value as f64);
        let mut metric = labelled(label.as_slice());
        metric.set_counter(counter);
        metric
    });
    family(name, help, MetricType::COUNTER, metrics.collect())
}

/// A gauge.
pub fn gauge(name: &str, help: &str, value: f64) -> MetricFamily {
    family(name, help, MetricType::GAUGE, vec![gauge_of(value, &[])])
}

fn gauge_of(value: f64, labels: &[(&str, &str)]) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = labelled(labels);
    metric.set_gauge(gauge);
    metric
}

fn durations(shards: &[std::sync::Arc<Shard>]) -> MetricFamily {
    let sum = |pick: &dyn Fn(&Shard) -> u64| shards.iter().map(|shard| pick(shard)).sum::<u64>();
    let counts: Vec<_> =
        (0..=BOUNDS_MS.len()).map(|at| sum(&|shard| shard.durations[at].load(Ordering::Relaxed))).collect();
    let us = sum(&|shard| shard.duration_us.load(Ordering::Relaxed));
    let help = "Time from a request's first byte to the last byte of its response.";
    histogram("lameduck_request_duration_seconds", help, &BOUNDS_MS, &counts, us)
}

/// A histogram of durations. `counts` has one entry per bucket, not cumulative, and a last one above all bounds; `us`
/// is the sum of all durations in microseconds.
pub fn histogram(name: &str, help: &str, bounds_ms: &[u64], counts: &[u64], us: u64) -> MetricFamily {
    let mut below = 0;
    let mut buckets = Vec::new();
    for (at, count) in counts.iter().enumerate() {
        below += count;
        // The encoder adds the last bucket itself; one of ours would be written as `inf` instead of `+Inf`.
        if let Some(ms) = bounds_ms.get(at) {
            let mut bucket = Bucket::default();
            bucket.set_cumulative_count(below);
            bucket.set_upper_bound(*ms as f64 / 1e3);
            buckets.push(bucket);
        }
    }
    let mut histogram = Histogram::default();
    histogram.set_sample_count(below);
    histogram.set_sample_sum(us as f64 / 1e6);
    histogram.set_bucket(buckets);
    let mut metric = labelled(&[]);
    metric.set_histogram(histogram);
    family(name, help, MetricType::HISTOGRAM, vec![metric])
}

fn labelled(labels: &[(&str, &str)]) -> Metric {
    let label = |(name, value): &(&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    let mut metric = Metric::default();
    metric.set_label(labels.iter().map(label).collect());
    metric
}

fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn shards_add_up_in_the_text() {
        let shards = [Arc::new(Shard::default()), Arc::new(Shard::default())];
        for shard in &shards {
            shard.request(200, Ended::Complete, Duration::from_millis(3));
        }
        let text = render(&shards, &Now { in_flight: 1, ..Now::default() });
        for line in [
            "lameduck_requests_total{code=\"2xx\"} 2",
            "lameduck_requests_ended_total{ended=\"complete\"} 2",
            "lameduck_request_duration_seconds_bucket{le=\"0.005\"} 2",
            "lameduck_request_duration_seconds_bucket{le=\"+Inf\"} 2",
            "lameduck_request_duration_seconds_sum 0.006",
            "lameduck_in_flight 1",
        ] {
            assert!(text.contains(line), "{line} is not in:\n{text}");
        }
    }
}
