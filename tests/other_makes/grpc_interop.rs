//! gRPC's own interoperability tests (grpc/grpc, doc/interop-test-descriptions.md) pass through the proxy.
//!
//! ```text
//! GOBIN=$PWD/interop go install google.golang.org/grpc/interop/{client,server}@v1.85.0
//! GRPC_INTEROP=interop cargo test --test other_makes grpc_interop -- --ignored --nocapture
//! ```

use crate::common;

use std::env;
use std::path::PathBuf;
use std::process::Command;

use common::port::Port;
use common::process::{Lameduck, Process};
use common::tls::Authority;
use common::wait_for;

/// All cases of grpc-go's client, except those that need a cloud's credentials (`compute_engine_*`,
/// `service_account_creds`, `jwt_token_creds`, `per_rpc_creds`, `oauth2_auth_token`, `google_default_credentials`)
/// and `pick_first_unary`, for which the client itself must resolve several servers.
const CASES: [&str; 14] = [
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "timeout_on_sleeping_server",
    "cancel_after_begin",
    "cancel_after_first_response",
    "status_code_and_message",
    "special_status_message",
    "custom_metadata",
    "unimplemented_method",
    "unimplemented_service",
];
/// Cases that read load reports, for which the client needs its own load balancer.
const WITH_BALANCER: [&str; 2] = ["orca_per_rpc", "orca_oob"];
const BALANCER: &str = r#"{"loadBalancingConfig":[{"test_backend_metrics_load_balancer":{}}]}"#;

/// Runs all cases through a proxy, over TLS if there is an authority.
fn pass(authority: Option<&Authority>) {
    let Some(programs) = env::var_os("GRPC_INTEROP").map(PathBuf::from) else {
        panic!("GRPC_INTEROP must name the folder with grpc-go's interop client and server");
    };
    let port = Port::reserve();
    let mut server = Command::new(programs.join("server"));
    let _server = Process::start("server", server.args(["--port", &port.number().to_string()]));
    let upstream = port.addr.to_string();
    let (proxy, listen, ca) = match authority {
        None => (Lameduck::proxy_to(&upstream, &[]), None, None),
        Some(authority) => {
            let (proxy, listen) = authority.proxy(&upstream, &[]);
            (proxy, Some(listen), Some(authority.file()))
        }
    };
    let listen = listen.unwrap_or(proxy.listen).port().to_string();
    wait_for("the server", || (proxy.ready().head.status == 200).then_some(()));
    let mut failed = Vec::new();
    let cases = CASES.iter().map(|case| (case, None));
    for (case, balancer) in cases.chain(WITH_BALANCER.iter().map(|case| (case, Some(BALANCER)))) {
        let mut client = Command::new(programs.join("client"));
        client.args(["--server_host", "127.0.0.1", "--server_port", &listen, "--test_case", case]);
        if let Some(ca) = &ca {
            client.args(["--use_tls", "--use_test_ca", "--ca_file", ca]);
            client.args(["--server_host_override", "localhost"]);
        }
        client.args(balancer.map(|config| format!("--service_config_json={config}")));
        let mut client = Process::start(case, &mut client);
        let code = client.wait_exit();
        println!("{case}: {}", if code == 0 { "passed" } else { "FAILED" });
        if code != 0 {
            failed.push(format!("{case}: {}", client.output()));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
#[ignore = "needs grpc-go's interop client and server: GRPC_INTEROP"]
fn every_case_without_credentials_passes_without_tls() {
    println!(
        "left out: the cases that need a cloud's credentials, and pick_first_unary, which needs several servers"
    );
    pass(None);
}

#[test]
#[ignore = "needs grpc-go's interop client and server: GRPC_INTEROP"]
fn every_case_without_credentials_passes_with_tls() {
    pass(Some(&Authority::default()));
}
