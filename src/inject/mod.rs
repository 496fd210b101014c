//! The sidecar in a pod: what changes in its JSON (pure; the webhook sends it, the CLI applies it), and in its YAML.
//!
//! ```text
//! command   files in, files or stdout out, the report
//! manifest    documents, Lists, workloads, Services
//! patch         the pod as it should be    ← annotations, hooks, ports, resources, sidecar; restore, what it was before
//! edit          that change in the text    ← diff, yaml, emit
//! model, names  what these hand to each other, and agree on; json reads and changes a pod
//! share     the files that the running sidecar shares with the app's container
//! ```

pub mod annotations;
pub mod command;
pub mod diff;
pub mod edit;
pub mod emit;
pub mod hooks;
pub mod json;
pub mod manifest;
pub mod model;
pub mod names;
pub mod patch;
pub mod ports;
pub mod resources;
pub mod restore;
pub mod service;
pub mod share;
pub mod sidecar;
pub mod yaml;

pub use self::model::{Services, Settings};
pub use self::patch::{Patch, Skip, patch};
