//! lameduck: a sidecar proxy that makes unmodified apps shut down gracefully.
//!
//! It counts the app's requests in flight. Asked to end, it refuses new work, waits for running work, and only then
//! lets the app get its SIGTERM. `ARCHITECTURE.md` has the details.
//!
//! # The path of a request
//!
//! ```text
//! client ─► proxy::accept ─► proxy::downstream ─► proxy::request ─► upstream ─► app
//!           listener,         first byte, gate,    upload and        kept or
//!           PROXY, TLS        head, ledger         response          new
//!                               │  ▲               side by side      connection
//!                               │  │                  └─ 101 ─► proxy::tunnel
//!               counted ────────┘  └── last byte written: not counted any more, next request or close
//!               (drain::gate, drain::ledger, metrics)
//!
//! signal, admin ─► control::runner ─► drain::machine: step(now, event, counts) → effects
//!                        └─► control::data_plane: implemented by proxy, whose every connection it wakes
//! ```
//!
//! # Modules
//!
//! | | |
//! |---|---|
//! | [`cli`], [`config`] | command line and environment → checked settings |
//! | [`capture`] | finds the ports that the app opens, and serves them |
//! | [`app`] | the only place that wires: bind, run, drain, exit code |
//! | [`proxy`] | the data plane: one thread per core, one task per connection |
//! | [`upstream`] | the app's servers: looked up, balanced; connections made, kept, retired before the app would close them |
//! | [`tls`] | certificates, reloaded on change; the TLS stream of either side |
//! | [`drain`] | the pure machine, the gate that counts, the ledger of what is in flight |
//! | [`control`] | the task that runs the machine, and the handle of its callers |
//! | [`admin`], [`readiness`], [`metrics`] | the probe and control listeners and their responses |
//! | [`client`] | `lameduck drain`, `resume`, `status`, `hold`, `swap`, `switch` |
//! | [`supervise`], [`signal`] | the child process of `lameduck run`; our own signals |
//! | [`inject`] | `lameduck inject`: a pure patch of a pod, and YAML edited in place |
//! | [`webhook`] | `lameduck webhook`: the same patch as a mutating admission webhook, and its certificates |
//! | [`capture`], [`netlink`] | words of the shim, who listens where, and the addresses of the pod |
//! | [`telemetry`], [`termination_log`], [`answer`] | logs; the container's last words; complete responses of the listeners above |
//! | [`allocator`] | keeps freed memory ready for the data plane |
//! | [`descriptors`], [`repeated`] | limits on open files; rate-limited log lines |
//!
//! # Module layers
//!
//! A module uses only modules below it, or its own parts: `ARCHITECTURE.md` draws the layers, `tests/tidy` checks them.

pub mod admin;
pub mod allocator;
pub mod answer;
pub mod app;
pub mod capture;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod descriptors;
pub mod drain;
pub mod inject;
pub mod metrics;
pub mod netlink;
pub mod proxy;
pub mod readiness;
pub mod repeated;
pub mod signal;
pub mod supervise;
pub mod telemetry;
pub mod termination_log;
pub mod tls;
pub mod upstream;
pub mod webhook;
