//! Programs of other makes, through the proxy. Each test is ignored, as it needs one; `.ci/run` gets them.

#[path = "../common/mod.rs"]
mod common;

mod clients_of_other_makes;
mod grpc_interop;
mod grpc_rollout;
mod http2_conformance;
mod package_managers;
