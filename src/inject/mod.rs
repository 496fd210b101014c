//! Adds the sidecar to a pod: a JSON patch of the pod (pure; the webhook sends it, the CLI applies it), and edits of
//! YAML in place.
//!
//! ```text
//! command   reads files, writes files or stdout, reports
//! audit       running pods that should have the sidecar
//! manifest    documents, Lists, workloads, Services     ← kinds
//! patch         the desired pod              ← annotations, capture, hints, hooks, ports, protocols, resources, sidecar; restore undoes it
//! text          that change in the text      ← edit, diff, yaml, emit
//! model, names  data and names that the modules above share; json reads and changes a pod
//! share         files that the running sidecar shares with the app's container
//! ```

pub mod annotations;
pub mod audit;
pub mod capture;
pub mod command;
pub mod diff;
pub mod edit;
pub mod emit;
pub mod hints;
pub mod hooks;
pub mod json;
pub mod kinds;
pub mod manifest;
pub mod model;
pub mod names;
pub mod patch;
pub mod ports;
pub mod protocols;
pub mod quantity;
pub mod resources;
pub mod restore;
pub mod service;
pub mod share;
pub mod sidecar;
pub mod text;
pub mod yaml;

pub use self::model::{PatchSettings, Services};
pub use self::patch::{Patch, Skip, patch};
