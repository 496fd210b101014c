//! HTTP/2 and gRPC, from clients and to the app.

#[path = "../common/mod.rs"]
mod common;

mod grpc;
mod http2;
mod http2_drain;
mod http2_floods;
mod upstream_http2;
