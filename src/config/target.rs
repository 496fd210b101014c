//! The target of a request: path and query.

/// Whether this begins with `/` and contains only visible ASCII.
pub fn is_target(path: &str) -> bool {
    path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic())
}
