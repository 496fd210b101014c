//! TLS by rustls: certificates, the two sides' configurations, and a stream whose halves need no lock.
//!
//! ```text
//! server   --tls-dir, watched → which certificate a name gets, whose clients are let in ─► stream ◄─ proxy
//! client   --upstream-ca, --upstream-name → whom the app has to be                        ─► stream ◄─ upstream
//! ```

pub mod certificate;
pub mod client;
pub mod server;
mod session;
pub mod stream;
pub mod subject;

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, ring};

/// What is spoken inside, by its names of ALPN (RFC 7301).
pub const HTTP1: &[u8] = b"http/1.1";
/// The same for HTTP/2.
pub const HTTP2: &[u8] = b"h2";
/// What clients may speak, the best first.
pub const PROTOCOLS: [&[u8]; 2] = [HTTP2, HTTP1];

/// The cryptography that everything here uses.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(ring::default_provider()));
    PROVIDER.clone()
}
