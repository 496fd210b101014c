//! The sidecar in manifests: the patch, YAML files, the preload, the project's own manifests.

#[path = "../common/mod.rs"]
mod common;

mod audit_lists;
mod inject_captures;
mod inject_hooks;
mod inject_keeps_every_byte;
mod inject_kinds;
mod inject_preload;
mod inject_rules;
mod inject_says;
mod inject_text;
mod manifests;
