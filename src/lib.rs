//! lameduck: a sidecar proxy that makes unmodified apps shut down gracefully.
//!
//! It counts what the app works on. Told to go, it stops new work, waits for the work that is running, and only then
//! lets the app get its SIGTERM. `ARCHITECTURE.md` says more.
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
//!                        └─► proxy::shared: phases, which wake every connection
//! ```
//!
//! # Modules
//!
//! | | |
//! |---|---|
//! | [`cli`], [`config`] | what was typed, and the environment → checked settings |
//! | [`app`] | the only place that wires: bind, run, drain, exit code |
//! | [`proxy`] | the data plane: one thread per core, one task per connection |
//! | [`upstream`] | the app's servers: looked up, balanced; connections made, kept, retired before the app would close them |
//! | [`tls`] | certificates, watched; the TLS stream of either side |
//! | [`drain`] | the pure machine, the gate that counts, the ledger of what is in flight |
//! | [`control`] | the task that runs the machine, and what its callers hold |
//! | [`admin`], [`readiness`], [`metrics`] | what the probe and control listeners answer |
//! | [`client`] | `lameduck drain`, `resume`, `status`, `hold`, `swap`, `switch` |
//! | [`supervise`], [`signal`] | `lameduck run`'s child; our own signals |
//! | [`inject`] | `lameduck inject`: a pure patch of a pod, and YAML edited in place |
//! | [`webhook`] | `lameduck webhook`: that patch as a mutating admission webhook, and its certificates |
//! | [`telemetry`], [`answer`] | logs; the whole answers of the listeners above |
//! | [`allocator`] | freed memory at hand for the data plane |
//! | [`descriptors`], [`repeated`] | who may open how many files; lines in the log that may come often |
//!
//! # Layers
//!
//! A module uses only what stands below it, or its own parts: `ARCHITECTURE.md` draws the layers, `tests/tidy` holds them.

pub mod admin;
pub mod allocator;
pub mod answer;
pub mod app;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod descriptors;
pub mod drain;
pub mod inject;
pub mod metrics;
pub mod proxy;
pub mod readiness;
pub mod repeated;
pub mod signal;
pub mod supervise;
pub mod telemetry;
pub mod tls;
pub mod upstream;
pub mod webhook;
