//! Difference between two JSON values, as JSON Patch operations (RFC 6902). Pure.

use serde::Serialize;
use serde_json::{Map, Value};

use super::names::PROBES;

/// One operation. Operations are applied in order.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Op {
    /// Adds a member to an object, or an element to an array; later elements move up.
    Add {
        /// Location.
        path: Pointer,
        /// New value.
        value: Value,
    },
    /// Replaces an existing value.
    Replace {
        /// Location.
        path: Pointer,
        /// New value.
        value: Value,
    },
    /// Removes a member or an element.
    Remove {
        /// Location.
        path: Pointer,
    },
}

impl Op {
    /// Location that the operation changes.
    pub fn path(&self) -> &Pointer {
        match self {
            Self::Add { path, .. } | Self::Replace { path, .. } | Self::Remove { path } => path,
        }
    }
}

/// Location in a document: object keys and array indexes, from the root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pointer(pub Vec<String>);

impl Pointer {
    /// Location of a member or element of this one.
    pub fn join(&self, key: impl ToString) -> Self {
        let mut keys = self.0.clone();
        keys.push(key.to_string());
        Self(keys)
    }

    /// Location of what is at `inner` within the value here.
    pub fn append(&self, inner: &Self) -> Self {
        Self([self.0.as_slice(), &inner.0].concat())
    }
}

impl std::fmt::Display for Pointer {
    /// Formatted as in RFC 6901: `/spec/containers/0`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|key| write!(f, "/{}", key.replace('~', "~0").replace('/', "~1")))
    }
}

impl Serialize for Pointer {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Operations that turn `before`, located at `at`, into `after`. Empty if they are equal.
pub fn diff(at: &Pointer, before: &Value, after: &Value) -> Vec<Op> {
    let mut ops = Vec::new();
    walk(at, before, after, &mut ops);
    ops
}

fn walk(at: &Pointer, before: &Value, after: &Value, ops: &mut Vec<Op>) {
    match (before, after) {
        _ if before == after => {}
        _ if is_another_handler(at, before, after) => {
            ops.push(Op::Replace { path: at.clone(), value: after.clone() });
        }
        (Value::Object(before), Value::Object(after)) => objects(at, before, after, ops),
        (Value::Array(before), Value::Array(after)) => arrays(at, before, after, ops),
        _ => ops.push(Op::Replace { path: at.clone(), value: after.clone() }),
    }
}

/// Whether this is a preStop hook or a probe that becomes another one: it is replaced as a whole, so that it can be put
/// back as it was. A longer command is still the same hook.
fn is_another_handler(at: &Pointer, before: &Value, after: &Value) -> bool {
    let both = |kind: &str| !before[kind].is_null() && !after[kind].is_null();
    match at.0.last().map(String::as_str) {
        Some("preStop") => !both("exec"),
        Some(key) if PROBES.contains(&key) => before["tcpSocket"].is_null() != after["tcpSocket"].is_null(),
        _ => false,
    }
}

/// Members are added before others are removed, so that a YAML block mapping is never empty in between.
fn objects(at: &Pointer, before: &Map<String, Value>, after: &Map<String, Value>, ops: &mut Vec<Op>) {
    for (key, new) in after {
        match before.get(key) {
            Some(old) => walk(&at.join(key), old, new, ops),
            None => ops.push(Op::Add { path: at.join(key), value: new.clone() }),
        }
    }
    for key in before.keys().filter(|key| !after.contains_key(*key)) {
        ops.push(Op::Remove { path: at.join(key) });
    }
}

fn arrays(at: &Pointer, before: &[Value], after: &[Value], ops: &mut Vec<Op>) {
    let mut now: Vec<&Value> = before.iter().collect();
    for (n, new) in after.iter().enumerate() {
        match (n..now.len()).find(|&m| same(now[m], new)) {
            Some(m) => {
                for _ in n..m {
                    ops.push(Op::Remove { path: at.join(n) });
                    now.remove(n);
                }
                walk(&at.join(n), now[n], new, ops);
            }
            None if n < now.len() && !after[n + 1..].iter().any(|later| same(now[n], later)) => {
                walk(&at.join(n), now[n], new, ops);
            }
            None => {
                ops.push(Op::Add { path: at.join(n), value: new.clone() });
                now.insert(n, new);
            }
        }
    }
    for n in (after.len()..now.len()).rev() {
        ops.push(Op::Remove { path: at.join(n) });
    }
}

/// Kubernetes merges most lists by the names of their elements.
fn same(a: &Value, b: &Value) -> bool {
    match (a.get("name"), b.get("name")) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn members_and_named_elements_change_in_place() {
        let before = json!({"a": [{"name": "x", "v": 1}, {"name": "y"}], "gone": 1, "k/~": 1});
        let after = json!({"a": [{"name": "w"}, {"name": "x", "v": 2}], "new": {}, "k/~": 2});
        let ops = serde_json::to_value(diff(&Pointer::default(), &before, &after)).unwrap();
        let expected = json!([
            {"op": "add", "path": "/a/0", "value": {"name": "w"}},
            {"op": "replace", "path": "/a/1/v", "value": 2},
            {"op": "remove", "path": "/a/2"},
            {"op": "replace", "path": "/k~1~0", "value": 2},
            {"op": "add", "path": "/new", "value": {}},
            {"op": "remove", "path": "/gone"},
        ]);
        assert_eq!(ops, expected);
    }
}
