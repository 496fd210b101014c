//! Recognises health checks: those of kubelets, load balancers and monitors by their known user agents, and those
//! that the user named. Pure.

use crate::config::HealthCheck;

/// gRPC's own health check, from any client.
const GRPC_PATH: &str = "/grpc.health.v1.Health/Check";

/// The properties of a request that matter here.
pub struct Asked<'a> {
    /// The method.
    pub method: &'a str,
    /// Path and query.
    pub path: &'a str,
    /// `User-Agent`.
    pub agent: Option<&'a [u8]>,
    /// HTTP/1.0 without a `Host`.
    pub hostless: bool,
    /// No body follows the head.
    pub bodiless: bool,
    /// It asks for a stream or a tunnel, which no health check does.
    pub lasts: bool,
}

/// Whether the request is a known health check or one of the `named` ones. Any client can claim a user agent, so the
/// agent counts only on a harmless request: no body, and a method that changes nothing.
pub fn is_health_check(asked: &Asked<'_>, named: &[HealthCheck]) -> bool {
    if asked.lasts {
        return false;
    }
    let path_named =
        |check: &HealthCheck| matches!(check, HealthCheck::Path(path) if is_at(asked.path, path));
    if asked.path == GRPC_PATH || named.iter().any(path_named) {
        return true;
    }
    if !asked.bodiless || !matches!(asked.method, "GET" | "HEAD" | "OPTIONS") {
        return false;
    }
    let Some(agent) = asked.agent else { return asked.hostless };
    let agent_named =
        |check: &HealthCheck| matches!(check, HealthCheck::Agent(text) if contains(agent, text));
    is_known(agent) || named.iter().any(agent_named)
}

fn is_at(asked: &str, path: &str) -> bool {
    asked.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('?'))
}

fn contains(agent: &[u8], text: &str) -> bool {
    memchr::memmem::find(agent, text.as_bytes()).is_some()
}

/// Matches by the first byte, so that the check costs a browser's request almost nothing.
fn is_known(agent: &[u8]) -> bool {
    let begins: &[&[u8]] = match agent.first() {
        Some(b'A') => &[b"Amazon-Route53-Health-Check", b"Azure Traffic Manager Endpoint Monitor"],
        Some(b'B') => &[b"Blackbox Exporter/", b"Better Uptime Bot", b"Better Stack Better Uptime Bot"],
        Some(b'C') => &[b"Consul Health Check", b"Checkly/"],
        Some(b'D') => &[b"Datadog/Synthetics", b"Datadog Agent/"],
        Some(b'E') => &[b"ELB-HealthChecker/", b"Envoy/HC", b"Edge Health Probe"],
        Some(b'G') => &[b"GoogleHC/", b"GoogleStackdriverMonitoring-UptimeChecks"],
        // HAProxy sends no agent by default; this is the customary one.
        Some(b'H') => &[b"HAProxy", b"HealthCheck/", b"HetrixTools"],
        Some(b'K') => &[b"Knative-Activator-Probe", b"Knative-Ingress-Probe"],
        Some(b'L') => &[b"Load Balancer Agent"],
        Some(b'M') => return is_known_browser_like(agent),
        Some(b'N') => &[b"NodePing"],
        Some(b'P') => &[b"Prometheus/", b"Pingdom.com_bot"],
        Some(b'S') => &[b"SentryUptimeBot/", b"Site24x7", b"StatusCake"],
        Some(b'U') => &[b"Uptime-Kuma/", b"UptimeRobot/"],
        Some(b'c') => &[b"check_http/"],
        Some(b'h') => &[b"haproxy"],
        Some(b'k') => &[b"kube-probe/", b"kamal-proxy"],
        // Another lameduck, for which this one is the app.
        Some(b'l') => &[b"lameduck-probe/"],
        Some(b'u') => &[b"updown.io"],
        _ => return false,
    };
    begins.iter().any(|begin| agent.starts_with(begin))
}

/// Matches `Mozilla/5.0 (compatible; NAME/…)`, also with `+` for the space.
fn is_known_browser_like(agent: &[u8]) -> bool {
    let comment = agent.strip_prefix(b"Mozilla/5.0").and_then(|rest| rest.get(1..));
    let name = comment.and_then(|comment| comment.strip_prefix(b"(compatible;")).unwrap_or_default();
    let begins: [&[u8]; 3] = [b"UptimeRobot/", b"Cloudflare-Healthchecks/", b"Cloudflare-Traffic-Manager/"];
    begins.iter().any(|begin| name.trim_ascii_start().starts_with(begin))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get<'a>(path: &'a str, agent: Option<&'a str>) -> Asked<'a> {
        let agent = agent.map(str::as_bytes);
        Asked { method: "GET", path, agent, hostless: false, bodiless: true, lasts: false }
    }

    #[test]
    fn kubelets_load_balancers_and_monitors_are_known_by_their_agent() {
        for agent in [
            "kube-probe/1.34",
            "ELB-HealthChecker/2.0",
            "Amazon-Route53-Health-Check-Service (ref 6b4f1794; report http://amzn.to/1vsZADi)",
            "GoogleHC/1.0",
            "GoogleStackdriverMonitoring-UptimeChecks(https://cloud.google.com/monitoring)",
            "Load Balancer Agent",
            "Edge Health Probe",
            "Azure Traffic Manager Endpoint Monitor",
            "Envoy/HC",
            "HAProxy",
            "Consul Health Check",
            "kamal-proxy",
            "Blackbox Exporter/0.27.0",
            "Prometheus/3.5.0",
            "lameduck-probe/0.1.0",
            "check_http/v2.3.3 (monitoring-plugins 2.3.3)",
            "Uptime-Kuma/1.23.13",
            "Pingdom.com_bot_version_1.4_(http://www.pingdom.com/)",
            "Better Uptime Bot Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36",
            "Mozilla/5.0+(compatible; UptimeRobot/2.0; http://www.uptimerobot.com/)",
            "Mozilla/5.0 (compatible;Cloudflare-Healthchecks/1.0;+https://www.cloudflare.com/; healthcheck-id: f867e0)",
        ] {
            assert!(is_health_check(&get("/", Some(agent)), &[]), "{agent}");
        }
        for agent in [
            "Mozilla/5.0 (X11; Linux x86_64; rv:142.0) Gecko/20100101 Firefox/142.0",
            "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
            "Mozilla/5.0",
            "curl/8.14.1",
            "Go-http-client/1.1",
            "not kube-probe/1.34",
            "",
        ] {
            assert!(!is_health_check(&get("/", Some(agent)), &[]), "{agent}");
        }
    }

    #[test]
    fn one_without_agent_and_host_is_a_check_and_one_with_either_is_none() {
        assert!(is_health_check(&Asked { hostless: true, ..get("/", None) }, &[]));
        assert!(!is_health_check(&get("/", None), &[]));
        assert!(!is_health_check(&Asked { hostless: true, ..get("/", Some("ApacheBench/2.3")) }, &[]));
    }

    #[test]
    fn those_that_are_named_are_found_by_their_whole_path_or_a_part_of_their_agent() {
        let named = ["/healthz", "agent:Own Monitor"].map(|text| text.parse().unwrap());
        for (path, agent, is) in [
            ("/healthz", None, true),
            ("/healthz?full=1", None, true),
            ("/healthz/", None, false),
            ("/healthzz", None, false),
            ("/api/healthz", None, false),
            ("/", Some("Mozilla/5.0 (Own Monitor 3)"), true),
            ("/", Some("own monitor"), false),
        ] {
            assert_eq!(is_health_check(&get(path, agent), &named), is, "{path} {agent:?}");
        }
        // The user named the path, so any method counts; an agent can be claimed by any client.
        let post = |path, agent| Asked { method: "POST", bodiless: false, ..get(path, agent) };
        assert!(is_health_check(&post("/healthz", None), &named));
        assert!(!is_health_check(&post("/", Some("Own Monitor")), &named));
        assert!(!is_health_check(&Asked { lasts: true, ..get("/healthz", None) }, &named));
    }
}
