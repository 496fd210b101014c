//! Module layers: modules use only those below them, and no files depend on each other in a circle.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{expect_none, files};

/// Module layers: a module uses only those below it, or its own submodules. One line is one layer.
const LAYERS: &[&[&str]] = &[
    &["app"],
    &["capture::watch"],
    &["capture::run"],
    &["admin", "client", "signal", "supervise", "telemetry", "webhook"],
    &["proxy::threads"],
    &["proxy::accept", "proxy::downstream", "proxy::tunnel"],
    &["proxy::request"],
    &["proxy::http2"],
    &["proxy::worker"],
    &["proxy::parking"],
    &["proxy::close", "proxy::connection"],
    &["proxy::shared"],
    &["proxy::route"],
    &["proxy::captured", "proxy::hold_queue", "proxy::request_log", "proxy::stream"],
    &["proxy::http1"],
    &["proxy::buffer", "proxy::first_bytes", "proxy::socket"],
    &["control::runner"],
    &["control::app_stop"],
    &["control::handle"],
    &["control::switch", "control::telling", "control::verdict"],
    &["control::data_plane"],
    &["control::leases"],
    &["control::clock"],
    &["readiness"],
    &["upstream"],
    &["tls"],
    &["metrics"],
    &["drain::ledger"],
    &["drain::gate"],
    &["drain::machine", "drain::quiet"],
    &["cli"],
    &["inject"],
    &["inject::command"],
    &["inject::audit", "inject::manifest"],
    &["inject::text"],
    &["inject::edit", "inject::patch", "inject::service"],
    &["inject::emit", "inject::restore", "inject::sidecar"],
    &["inject::capture"],
    &[
        "inject::annotations",
        "inject::hints",
        "inject::hooks",
        "inject::kinds",
        "inject::ports",
        "inject::protocols",
        "inject::resources",
        "inject::yaml",
    ],
    &["inject::diff", "inject::json", "inject::model", "inject::quantity", "inject::share"],
    &["inject::names"],
    &["capture::listeners", "capture::word"],
    &["capture::object", "capture::place"],
    &[
        "allocator",
        "answer",
        "config",
        "descriptors",
        "drain::atomic",
        "netlink",
        "repeated",
        "termination_log",
    ],
];

/// Pure or nearly pure modules: they use no module of this crate except those listed.
const PURE: &[(&str, &[&str])] = &[
    ("config", &[]),
    ("metrics", &[]),
    ("drain::machine", &["config"]),
    ("drain::quiet", &[]),
    ("drain::gate", &["drain::atomic", "drain::machine"]),
    ("drain::ledger", &[]),
    ("proxy::http1", &["config"]),
    ("proxy::buffer", &[]),
    ("proxy::first_bytes", &[]),
    ("capture::place", &["config"]),
    ("proxy::tunnel::websocket", &[]),
    ("proxy::request::long_poll", &["config"]),
    ("tls::certificate", &["tls"]),
    ("tls::subject", &["tls::certificate"]),
    ("client::view", &[]),
    ("webhook::review", &["inject"]),
    ("webhook::certs", &["webhook::x509"]),
    ("webhook::x509", &["tls"]),
];

/// A file's module and the modules that its code names, without its tests and comments.
struct Module {
    name: String,
    uses: Vec<String>,
}

/// The library's modules, without `main.rs`, which is above all, and `lib.rs`, which only lists them.
fn modules() -> Vec<Module> {
    let sources = files("src", ".rs").into_iter().map(|(path, text)| (module_of(&path), text));
    let modules =
        sources.filter(|(name, _)| !["lib", "main"].contains(&name.as_str()) && !name.ends_with("::tests"));
    modules.map(|(name, text)| Module { uses: uses(&name, &text), name }).collect()
}

/// `src/drain/gate.rs` → `drain::gate`.
fn module_of(path: &str) -> String {
    let path = PathBuf::from(path.trim_start_matches("src/")).with_extension("");
    path.to_string_lossy().trim_end_matches("/mod").replace('/', "::")
}

/// Names of this crate's items in a file's code, as paths from the crate's root.
fn uses(module: &str, text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code = lines.collect::<Vec<_>>().join("\n");
    let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
    let mut uses = Vec::new();
    for (start, base) in [("crate::", ""), ("super::", parent), ("self::", module)] {
        for (at, _) in code.match_indices(start) {
            // Not `mycrate::`, nor the second part of `super::super::`, nor `pub(in crate::…)`.
            let before = &code[..at];
            let inside = before.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
            if !inside && !before.ends_with("(in ") {
                paths(&code[at + start.len()..], base, &mut uses);
            }
        }
    }
    uses
}

/// Adds the path at the beginning of `text`, or the paths of a group in braces.
fn paths(text: &str, base: &str, found: &mut Vec<String>) {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':').unwrap_or(text.len());
    let path = text[..end].trim_end_matches(':');
    let (path, base) = match path.strip_prefix("super::") {
        Some(rest) => (rest, base.rsplit_once("::").map_or("", |(parent, _)| parent)),
        None => (path, base),
    };
    let path = [base, path].join("::").trim_matches(':').to_owned();
    if !text[end..].starts_with('{') {
        return found.push(path);
    }
    let (mut depth, mut start) = (0, end + 1);
    for (at, c) in text[end..].char_indices().map(|(at, c)| (end + at, c)) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if (c == ',' && depth == 1) || depth == 0 {
            let item = text[start..at].trim();
            if !item.is_empty() {
                paths(item, &path, found);
            }
            start = at + 1;
        }
        if depth == 0 {
            return;
        }
    }
}

fn within(path: &str, module: &str) -> bool {
    path == module || path.strip_prefix(module).is_some_and(|rest| rest.starts_with("::"))
}

/// Number of the layer that `path` belongs to, and its module in that layer.
fn layer(path: &str) -> Option<(usize, &'static str)> {
    let all = LAYERS.iter().enumerate().flat_map(|(n, names)| names.iter().map(move |name| (n, *name)));
    all.filter(|(_, name)| within(path, name)).max_by_key(|(_, name)| name.len())
}

#[test]
fn a_module_uses_only_modules_below_it() {
    let mut broken = Vec::new();
    for Module { name: module, uses } in modules().iter().filter(|module| !module.uses.is_empty()) {
        let Some((own, name)) = layer(module) else {
            broken.push(format!("{module} is not in LAYERS"));
            continue;
        };
        for path in uses {
            match layer(path) {
                None => broken.push(format!("{module} uses {path}, which is not in LAYERS")),
                Some((theirs, other)) if theirs <= own && other != name => {
                    broken.push(format!("{module} uses {path}, which is not below it"));
                }
                Some(_) => {}
            }
        }
    }
    expect_none("the direction of `use`", &broken);
}

#[test]
fn pure_modules_use_only_what_is_listed() {
    let modules = modules();
    let mut broken = Vec::new();
    for (pure, may_use) in PURE.iter().copied() {
        let parts: Vec<_> = modules.iter().filter(|module| within(&module.name, pure)).collect();
        if parts.is_empty() {
            broken.push(format!("{pure} is gone"));
        }
        let allowed =
            |path: &&String| within(path, pure) || may_use.iter().any(|module| within(path, module));
        let uses = parts.iter().flat_map(|module| &module.uses);
        broken.extend(uses.filter(|path| !allowed(path)).map(|path| format!("{pure} uses {path}")));
    }
    expect_none("pure modules", &broken);
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    let modules = modules();
    // A path belongs to the file whose module name is its longest prefix.
    let file = |path: &str| {
        let held = modules.iter().filter(|module| within(path, &module.name));
        held.max_by_key(|module| module.name.len()).map(|module| module.name.as_str())
    };
    let mut left: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for module in &modules {
        let used = module.uses.iter().filter_map(|path| file(path)).filter(|used| *used != module.name);
        left.insert(&module.name, used.collect());
    }
    // Remove files that use no remaining file, and files that no remaining file uses, until only circles are left.
    loop {
        let before = left.len();
        let names: Vec<_> = left.keys().copied().collect();
        left.retain(|_, used| used.iter().any(|used| names.contains(used)));
        let used: Vec<_> = left.values().flatten().copied().collect();
        left.retain(|name, _| used.contains(name));
        if left.len() == before {
            break;
        }
    }
    let arrow = |(name, used): (&&str, &Vec<&str>)| {
        let mut used: Vec<_> = used.iter().filter(|used| left.contains_key(*used)).copied().collect();
        used.sort_unstable();
        used.dedup();
        format!("{name} → {}", used.join(", "))
    };
    expect_none("files in a circle", &left.iter().map(arrow).collect::<Vec<_>>());
}
