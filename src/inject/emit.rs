//! YAML for inserted values: block style; a string is quoted if any YAML reader could take it for another type.

use std::fmt::Write;

use serde_json::{Map, Value};

use super::yaml;

/// Keys that are written first, in this order; the others follow by name.
const FIRST: [&str; 5] = ["name", "image", "imagePullPolicy", "restartPolicy", "args"];

/// Style of the surrounding text.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Spaces from a key to the dash of the list below it.
    pub dash: usize,
    /// Line terminator.
    pub newline: &'static str,
    /// Whether the text is JSON.
    pub json: bool,
}

/// One member as lines indented by `column`, each with its terminator.
pub fn member(key: &str, value: &Value, column: usize, style: Style) -> String {
    let mut lines = String::new();
    write_member(&mut lines, key, value, column, style);
    lines
}

/// One list element as lines, with the dash at `column`.
pub fn element(value: &Value, column: usize, style: Style) -> String {
    let mut lines = String::new();
    write_element(&mut lines, value, column, style);
    lines
}

/// The value on one line.
pub fn inline(value: &Value) -> String {
    match value {
        Value::String(text) => string(text),
        Value::Array(items) => format!("[{}]", items.iter().map(json).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => json(&Value::Object(map.clone())),
        other => other.to_string(),
    }
}

/// Formatted as JSON, which is valid flow style: plain scalars have more pitfalls there.
pub fn json(value: &Value) -> String {
    match value {
        Value::String(text) => quoted(text),
        Value::Array(items) => format!("[{}]", items.iter().map(json).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let members =
                ordered(map).into_iter().map(|(key, value)| format!("{}: {}", quoted(key), json(value)));
            format!("{{{}}}", members.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

fn write_member(lines: &mut String, key: &str, value: &Value, column: usize, style: Style) {
    let _ = write!(lines, "{:column$}{}:", "", string(key));
    match value {
        Value::Object(map) if !map.is_empty() => {
            lines.push_str(style.newline);
            for (key, value) in ordered(map) {
                write_member(lines, key, value, column + 2, style);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            lines.push_str(style.newline);
            for item in items {
                write_element(lines, item, column + style.dash, style);
            }
        }
        leaf => {
            let _ = write!(lines, " {}{}", inline(leaf), style.newline);
        }
    }
}

fn write_element(lines: &mut String, value: &Value, column: usize, style: Style) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            let from = lines.len();
            for (key, value) in ordered(map) {
                write_member(lines, key, value, column + 2, style);
            }
            lines.replace_range(from + column..from + column + 1, "-");
        }
        leaf => {
            let _ = write!(lines, "{:column$}- {}{}", "", inline(leaf), style.newline);
        }
    }
}

fn ordered(map: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut members: Vec<_> = map.iter().collect();
    members.sort_by_key(|(key, _)| FIRST.iter().position(|first| first == key).unwrap_or(FIRST.len()));
    members
}

fn string(text: &str) -> String {
    let word = text.trim_start_matches("--");
    let plain = word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-=?:".contains(&b))
        && !text.ends_with(':')
        && yaml::plain(text).is_string();
    let printable = text.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'\'');
    match (plain, printable && text.contains(['"', '\\'])) {
        (true, _) => text.to_owned(),
        (false, true) => format!("'{text}'"),
        (false, false) => quoted(text),
    }
}

/// A JSON string is a valid double-quoted scalar, except for control characters that YAML requires escaped (YAML 1.2,
/// 5.1).
fn quoted(text: &str) -> String {
    let json = Value::from(text).to_string();
    let mut yaml = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}' => {
                let _ = write!(yaml, "\\u{:04x}", u32::from(c));
            }
            c => yaml.push(c),
        }
    }
    yaml
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_written_reads_back_as_it_was() {
        let strings = [
            "on",
            "n",
            "0777",
            "~",
            "",
            "- x",
            "a: b",
            "é",
            "\u{85}\u{feff}\n\t\"\\",
            "1e3",
            "null",
            "--a=b",
            "#",
            "x #y",
        ];
        let value = json!({"name": "x", "strings": strings, "nested": [{"b": [[], {}, [1]], "a": {"on": null}}, true, 1.5]});
        for style in
            [Style { dash: 0, newline: "\n", json: false }, Style { dash: 2, newline: "\r\n", json: false }]
        {
            for text in [member("on", &value, 4, style), format!("{{{}: {}}}", quoted("on"), json(&value))] {
                let root = yaml::parse(&text).unwrap().unwrap_or_else(|| panic!("{text}"));
                assert_eq!(root.to_json().unwrap(), json!({"on": value}), "{text}");
            }
        }
    }
}
