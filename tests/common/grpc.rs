//! A gRPC app and a gRPC client in plain Node, as processes: no packages are needed.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use super::port::Port;
use super::process::Process;

fn script(name: &str, args: &[&str], env: &[(&str, &str)]) -> Process {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common").join(name);
    Process::start(name, Command::new("node").arg(script).args(args).envs(env.iter().copied()))
}

/// `grpc_app.js`: HTTP/2 without TLS; the path selects what it does. Its port stays reserved after its end.
pub struct App {
    /// The process, which reports what happens to each call.
    pub process: Process,
    /// Address on which it listens.
    pub addr: SocketAddr,
    _port: Port,
}

impl App {
    /// Listens on a newly reserved port.
    pub fn start() -> Self {
        Self::start_with(Port::reserve(), "100")
    }

    /// Listens on this port, with this limit on concurrent streams per connection.
    pub fn start_with(port: Port, streams: &str) -> Self {
        let env = [("PORT", &*port.number().to_string()), ("STREAMS", streams)];
        let process = script("grpc_app.js", &[], &env);
        process.wait_line("that it listens", |line| line.contains("listens on port ").then_some(()));
        Self { process, addr: port.addr, _port: port }
    }

    /// Waits until it has written this line.
    pub fn wait(&self, line: &str) {
        self.process.wait_line(line, |written| (written == line).then_some(()));
    }
}

/// One call by `grpc_client.js`.
pub struct Call(pub Process);

impl Call {
    /// Begins a call with these messages, and ends the request; without messages the request stays open.
    pub fn begin(to: SocketAddr, path: &str, messages: &[&str]) -> Self {
        Self(script("grpc_client.js", &[&[&*to.to_string(), path], messages].concat(), &[]))
    }

    /// The text after this word on its line, which may already be written.
    pub fn wait(&self, word: &str) -> String {
        let after = |line: &str| Some(line.strip_prefix(word)?.trim().to_owned());
        self.0.wait_line(word, after)
    }

    /// The same, parsed as JSON: for `head`, `data`, `trailers` or `trailers-only`.
    pub fn json(&self, word: &str) -> Value {
        serde_json::from_str(&self.wait(word)).expect("JSON")
    }

    /// Resets the stream with CANCEL.
    pub fn cancel(&self) {
        self.0.signal(Signal::USR2);
    }
}
