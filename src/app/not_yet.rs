//! Why the app does not answer yet, and what listens instead.

use std::net::{IpAddr, SocketAddr};

use crate::capture::listeners::{Ports, is_mesh, ports};
use crate::config::{ReadyCheck, Settings, UpstreamAddr};
use crate::upstream;

/// Limit on addresses that the line names.
const MAX_NAMED: usize = 8;

/// Returns the line to log; `None` if the app has just begun to answer. `silent` is the address that does not answer;
/// `None` if the app has opened no port.
pub async fn why(silent: Option<&UpstreamAddr>, settings: &Settings) -> Option<String> {
    let ports = ports().unwrap_or_default();
    let Some(at) = silent else { return Some(no_port(&ports)) };
    let reason = match (upstream::connect(at).await, &settings.ready.check) {
        (Err(error), _) => format!("{error}{}", instead(at, &ports)),
        (Ok(_), ReadyCheck::Path(path)) => format!("GET {path} returns neither 2xx nor 3xx"),
        (Ok(_), ReadyCheck::Connect) => return None,
    };
    Some(format!("the app does not answer on {at} yet: {reason}"))
}

/// What to say of an app that has opened no port that could be captured.
fn no_port(ports: &Ports) -> String {
    let own: Vec<_> = ports.loopback.iter().filter(|addr| !is_mesh(addr.port())).collect();
    if own.is_empty() {
        return "the app listens on no port yet".to_owned();
    }
    format!("the app listens on {} only, which nobody outside the pod reaches", list(&own))
}

/// What listens instead of an app on this host; nothing of another host's is known.
fn instead(at: &UpstreamAddr, ports: &Ports) -> String {
    let here = |host: &str| host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    let Some((_, port)) = at.host_and_port().filter(|(host, _)| here(host)) else { return String::new() };
    let all = || ports.bypassed.iter().chain(&ports.loopback).filter(|addr| !is_mesh(addr.port()));
    let same: Vec<_> = all().filter(|addr| addr.port() == port).collect();
    if !same.is_empty() {
        return format!("; {} listens", list(&same));
    }
    match &all().collect::<Vec<_>>()[..] {
        [] => "; nothing listens on this host".to_owned(),
        others => format!("; what listens on this host is {}", list(others)),
    }
}

fn list(addrs: &[&SocketAddr]) -> String {
    let named: Vec<_> = addrs.iter().take(MAX_NAMED).map(ToString::to_string).collect();
    let more = addrs.len().saturating_sub(MAX_NAMED);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    named.join(", ") + &more
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(bypassed: &[&str], loopback: &[&str]) -> Ports {
        let addrs = |those: &[&str]| those.iter().map(|addr| addr.parse().unwrap()).collect();
        Ports { bypassed: addrs(bypassed), loopback: addrs(loopback), ..Ports::default() }
    }

    #[test]
    fn an_app_without_a_port_for_others_is_told_from_one_without_any() {
        assert_eq!(no_port(&ports(&[], &["127.0.0.1:15000"])), "the app listens on no port yet");
        assert_eq!(
            no_port(&ports(&[], &["127.0.0.1:5000", "[::1]:5001"])),
            "the app listens on 127.0.0.1:5000, [::1]:5001 only, which nobody outside the pod reaches"
        );
    }

    #[test]
    fn what_listens_instead_is_told_of_this_host_only() {
        let instead = |at: &str, ports| super::instead(&at.parse().unwrap(), &ports);
        let others = || ports(&["0.0.0.0:8080", "0.0.0.0:15006"], &["[::1]:3000"]);
        assert_eq!(instead("localhost:3000", others()), "; [::1]:3000 listens");
        assert_eq!(
            instead("127.0.0.1:4000", others()),
            "; what listens on this host is 0.0.0.0:8080, [::1]:3000"
        );
        assert_eq!(instead("127.0.0.1:4000", ports(&[], &[])), "; nothing listens on this host");
        assert_eq!(instead("app:3000", others()), "");
        let many: Vec<_> = (1..11).map(|port| format!("0.0.0.0:{port}")).collect();
        let many = ports(&many.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
        assert!(instead("127.0.0.1:4000", many).ends_with("0.0.0.0:8 and 2 more"));
    }
}
