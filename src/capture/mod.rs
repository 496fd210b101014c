//! What the sidecar sees of the sockets that the shim has moved: its words, and who listens where.

pub mod listeners;
pub mod word;
