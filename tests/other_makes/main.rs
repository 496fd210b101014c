//! Third-party programs through the proxy. Each test is ignored, since it needs one; `.ci/run` installs them.

#[path = "../common/mod.rs"]
mod common;

mod clients_of_other_makes;
mod grpc_interop;
mod grpc_rollout;
mod http2_conformance;
mod package_managers;
