//! Divides the file descriptors that this process may open.

use crate::config::Settings;
use crate::descriptors::{self, Shares};

/// Connection limits below this cause a warning.
const FEW_CONNECTIONS: u64 = 1000;

/// Each connection is an open file: clients must not use the last ones, or `/readyz` could not respond.
pub fn share_files(settings: &mut Settings) -> Shares {
    let limit = descriptors::raise();
    let shares = descriptors::divide(limit, descriptors::open(), settings.threads as u64);
    let (wanted, most) = (settings.limits.max_connections, descriptors::most_of_one_side(shares.data));
    if most < wanted {
        let why = format!(
            "--max-connections is {wanted}, which exceeds this process's limit on open files (ulimit -n)"
        );
        match most < FEW_CONNECTIONS {
            true => tracing::warn!(open_files = limit, max_connections = most, "{why}"),
            false => tracing::info!(open_files = limit, max_connections = most, "{why}"),
        }
    }
    settings.limits.max_connections = wanted.min(most);
    settings.limits.max_files = shares.data;
    shares
}
