//! TLS, from clients and to the app.

#[path = "../common/mod.rs"]
mod common;

mod scripted_peer;
mod tls_certificates;
mod tls_client_certificates;
mod tls_ends;
mod tls_start_of_a_request;
mod tls_stream_reads_like_rustls;
mod tls_terminates;
mod tls_to_the_app;
