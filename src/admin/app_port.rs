//! The probe of a captured port. A `tcpSocket` probe of it says nothing of the app, because it is our socket that accepts.

use std::net::SocketAddr;
use std::time::Duration;

use hyper::StatusCode;

use super::Admin;
use crate::answer::{Answer, text};
use crate::capture::listeners::ports;
use crate::proxy::captured::from_here;
use crate::upstream;

/// Prefix of the path: `/app-port/3000` connects to the app's port 3000.
pub(super) const PREFIX: &str = "/app-port/";
/// Time limit for a connect: an app whose accept queue is full for so long is not well.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

impl Admin {
    /// Returns 200 if the app itself accepts a connection on this port, else 503. Only ports that clients can reach
    /// anyway are tried, so this says nothing of others.
    pub(super) async fn app_port(&self, path: &str) -> Answer {
        let port = path[PREFIX.len()..].parse().ok().filter(|port| *port != 0);
        let Some(port) = port else {
            return text(StatusCode::NOT_FOUND, "not a port: write /app-port/3000");
        };
        let Some(addr) = self.captured.app(port).or_else(|| unmoved(port)) else {
            return text(StatusCode::SERVICE_UNAVAILABLE, "the app has not opened this port");
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, upstream::connect(&from_here(addr))).await {
            Ok(Ok(_)) => text(StatusCode::OK, "ok"),
            _ => text(StatusCode::SERVICE_UNAVAILABLE, "the app does not accept connections on this port"),
        }
    }
}

/// Returns where somebody listens who did not move, perhaps since the last look: such an app sends no word.
fn unmoved(port: u16) -> Option<SocketAddr> {
    ports().ok()?.bypassed.into_iter().find(|addr| addr.port() == port)
}
