//! Where a listener's connections lead, as one thread sees it.

use std::sync::Arc;

use super::captured::CapturedPort;
use crate::upstream::Pool;

/// The destination of a listener's connections.
#[derive(Debug)]
pub struct Route {
    /// Connections to the app.
    pub pool: Pool,
    /// The `Host` for a request without one.
    pub host: String,
    /// Its clients are in this pod: a captured port by loopback.
    pub local: bool,
    /// The captured port; `None` for `--upstream` and `--tcp`.
    pub captured: Option<Arc<CapturedPort>>,
}
