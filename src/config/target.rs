//! What may be asked for: a request's path and query.

/// Whether this begins with `/` and has visible ASCII only.
pub fn is_target(path: &str) -> bool {
    path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic())
}
