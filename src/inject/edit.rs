//! Edits a YAML document in place: every byte outside the edits stays as it is.

use std::ops::Range;

use granit_parser::{ScalarStyle, StructureStyle};
use serde_json::Value;

use super::diff::{Op, Pointer};
use super::emit::{self, Style};
use super::model::Written;
use super::yaml::{self, Kind, Node};

/// Returns `text` with the operations applied.
///
/// # Errors
/// The document can't be edited in place, or the result would not parse as `expected`.
pub fn edit(text: &str, ops: &[Op], written: &Written, expected: &Value) -> Result<String, String> {
    let json = is_json(text);
    match apply(text, ops, written, json, expected) {
        // The owner has changed the text around it.
        Err(_) if !written.is_empty() => apply(text, ops, &Written::new(), json, expected),
        result => result,
    }
}

fn apply(text: &str, ops: &[Op], written: &Written, json: bool, expected: &Value) -> Result<String, String> {
    let mut edited = text.to_owned();
    for op in ops {
        let root = parse(&edited)?;
        let style = style_of(&edited, &root, json);
        let place = op.path().to_string();
        let source = written.get(&place).map(String::as_str).filter(|source| says(source, op));
        let splice = splice(&edited, &root, op, source, style).map_err(|why| format!("{place}: {why}"))?;
        edited.replace_range(splice.0, &splice.1);
    }
    // An edit to an anchored node changes every alias, and a merged key has no text of its own: this check catches
    // both.
    match parse(&edited)?.to_json() {
        Ok(value) if value == *expected => Ok(edited),
        _ => Err("its anchors, aliases or unusual style keep it from being edited in place".to_owned()),
    }
}

/// Whether this source text, alone or with its key, still has the operation's value.
fn says(source: &str, op: &Op) -> bool {
    let Op::Replace { path, value } = op else { return false };
    let read = yaml::parse(source).ok().map(|root| root.map_or(Ok(Value::Null), |root| root.to_json()));
    let key = path.0.last().map_or("", String::as_str);
    // A tag before it may have made a number of quoted text.
    let tagged = |read: &Value| read.as_str().is_some_and(|text| yaml::plain(text) == *value);
    matches!(read, Some(Ok(read)) if read == *value || read.get(key) == Some(value) || tagged(&read))
}

/// Source text of the values that these operations replace, unless it is the text that an edit would write.
pub fn written(text: &str, root: &Node, ops: &[Op]) -> Written {
    let style = style_of(text, root, is_json(text));
    let source = |op: &Op| {
        let Op::Replace { path, value } = op else { return None };
        let (last, above) = path.0.split_last()?;
        let parent = find(root, above).ok()?;
        let old = child(parent, last).ok()?.to_json().ok()?;
        let (place, _) = replace(text, parent, last, value, None, style).ok()?;
        // A null's text is written behind the lines that replace it, so it has none of its own.
        let (_, usual) = replace(text, parent, last, &old, None, style).ok()?;
        let source = &text[place];
        (source != usual).then(|| (path.to_string(), source.to_owned()))
    };
    ops.iter().filter_map(source).collect()
}

/// Whether the text is JSON: what is written into it must be JSON as well.
pub fn is_json(text: &str) -> bool {
    let start = text.trim_start_matches(['\u{feff}', ' ', '\t', '\r', '\n']);
    start.starts_with('{') && serde_json::from_str::<serde::de::IgnoredAny>(start).is_ok()
}

type Splice = (Range<usize>, String);

fn parse(text: &str) -> Result<Node, String> {
    yaml::parse(text)?.ok_or_else(|| "nothing is left of it".to_owned())
}

fn splice(text: &str, root: &Node, op: &Op, source: Option<&str>, style: Style) -> Result<Splice, String> {
    let Pointer(path) = op.path();
    let (last, above) = path.split_last().ok_or("the whole document can't be replaced")?;
    let parent = find(root, above)?;
    match (op, &parent.kind) {
        (Op::Add { value, .. }, Kind::Map(..)) => add_member(text, parent, last, value, style),
        (Op::Add { value, .. }, Kind::Seq(..)) => add_element(text, parent, index(last)?, value, style),
        (Op::Replace { value, .. }, _) => replace(text, parent, last, value, source, style),
        (Op::Remove { .. }, Kind::Map(entries, flow)) => {
            let (n, key, value) = parent.entry(last).ok_or("it is merged in from elsewhere")?;
            let next = entries.get(n + 1).map(|(key, _)| key.span.start);
            let before = n.checked_sub(1).map(|n| entries[n].1.span.end);
            remove(text, key.span.start..value.span.end, next, before, *flow)
        }
        (Op::Remove { .. }, Kind::Seq(items, flow)) => {
            let n = index(last)?;
            let item = items.get(n).ok_or("there is no such element")?;
            let start = match flow {
                StructureStyle::Block => dash(text, item)?,
                StructureStyle::Flow => item.span.start,
            };
            let next = items.get(n + 1).filter(|_| *flow == StructureStyle::Flow).map(|item| item.span.start);
            let before = n.checked_sub(1).map(|n| items[n].span.end);
            remove(text, start..item.span.end, next, before, *flow)
        }
        _ => Err("its parent is neither a mapping nor a list".to_owned()),
    }
}

/// The node at this location.
///
/// # Errors
/// It has no text of its own.
pub fn find<'a>(root: &'a Node, path: &[String]) -> Result<&'a Node, String> {
    path.iter().try_fold(root, |node, key| child(node, key))
}

fn child<'a>(node: &'a Node, key: &str) -> Result<&'a Node, String> {
    match &node.kind {
        Kind::Map(..) => node.get(key).ok_or_else(|| format!("'{key}' is merged in from elsewhere")),
        Kind::Seq(items, _) => items.get(index(key)?).ok_or_else(|| "there is no such element".to_owned()),
        Kind::Alias(_) => Err(format!("'{key}' is inside an alias")),
        Kind::Scalar(..) => Err(format!("the parent of '{key}' is a plain value")),
    }
}

fn index(key: &str) -> Result<usize, String> {
    key.parse().map_err(|_| format!("'{key}' is not an index"))
}

fn add_member(text: &str, parent: &Node, key: &str, value: &Value, style: Style) -> Result<Splice, String> {
    match &parent.kind {
        Kind::Map(entries, StructureStyle::Flow) => {
            let new = format!("{}: {}", emit::json(&key.into()), emit::json(value));
            Ok(append_flow(parent, entries.last().map(|(_, value)| value.span.end), new))
        }
        Kind::Map(entries, StructureStyle::Block) => {
            let (first, last) = entries.first().zip(entries.last()).ok_or("an empty block mapping")?;
            let column = column(text, first.0.span.start);
            Ok(after_line(text, last.1.span.end, emit::member(key, value, column, style), style))
        }
        _ => Err("it is not a mapping".to_owned()),
    }
}

fn add_element(text: &str, parent: &Node, n: usize, value: &Value, style: Style) -> Result<Splice, String> {
    match &parent.kind {
        Kind::Seq(items, StructureStyle::Flow) => match items.get(n) {
            Some(next) => Ok((next.span.start..next.span.start, format!("{}, ", emit::json(value)))),
            None => Ok(append_flow(parent, items.last().map(|item| item.span.end), emit::json(value))),
        },
        Kind::Seq(items, StructureStyle::Block) => {
            let first = dash(text, items.first().ok_or("an empty block list")?)?;
            let column = column(text, first);
            let new = emit::element(value, column, style);
            match n.checked_sub(1) {
                Some(before) => Ok(after_line(text, items[before].span.end, new, style)),
                // The first line belongs to the dash, unless the list starts behind another dash.
                None if text[line_start(text, first)..first].trim().is_empty() => {
                    let at = line_start(text, first);
                    Ok((at..at, new))
                }
                None => Err("a list within a list's line".to_owned()),
            }
        }
        _ => Err("it is not a list".to_owned()),
    }
}

fn append_flow(parent: &Node, last: Option<usize>, new: String) -> Splice {
    match last {
        Some(end) => (end..end, format!(", {new}")),
        None => (parent.span.start + 1..parent.span.start + 1, new),
    }
}

/// Inserts lines after the line that contains this offset; a trailing comment stays on that line.
fn after_line(text: &str, place: usize, new: String, style: Style) -> Splice {
    let at_line_start = place > 0 && text[..place].ends_with('\n');
    let end = if at_line_start { place } else { line_end(text, place) };
    let torn = end > 0 && !text[..end].ends_with('\n');
    if torn {
        // The last line had no newline, so the new last line gets none.
        let new = new.strip_suffix(style.newline).unwrap_or(&new);
        return (end..end, format!("{}{new}", style.newline));
    }
    (end..end, new)
}

/// Replaces a member or an element by the value, or by its source text. A block collection, and a null that becomes
/// one, is replaced with its key up to the end of its last line.
fn replace(
    text: &str,
    parent: &Node,
    key: &str,
    value: &Value,
    source: Option<&str>,
    style: Style,
) -> Result<Splice, String> {
    let node = child(parent, key)?;
    let block = match &node.kind {
        Kind::Scalar(_, ScalarStyle::Literal | ScalarStyle::Folded) => {
            return Err("it is a block scalar: write it on one line".to_owned());
        }
        Kind::Alias(_) => return Err("it is an alias".to_owned()),
        Kind::Map(_, style) | Kind::Seq(_, style) => *style == StructureStyle::Block,
        Kind::Scalar(..) => {
            let within = matches!(&parent.kind, Kind::Map(_, StructureStyle::Block));
            within && node.is_nothing() && is_collection(value)
        }
    };
    if block && let Some((_, name, _)) = parent.entry(key) {
        let end =
            if text[..node.span.end].ends_with('\n') { node.span.end } else { line_end(text, node.span.end) };
        let end = text[..end].trim_end_matches(['\r', '\n']).len();
        let column = column(text, name.span.start);
        let usual = || emit::member(key, value, column, style).trim().to_owned();
        return Ok((name.span.start..end, source.map_or_else(usual, str::to_owned)));
    }
    let usual = if style.json { emit::json(value) } else { emit::inline(value) };
    let new = source.map_or(usual, str::to_owned);
    match (node.is_nothing(), new.is_empty()) {
        _ if block => Err("a block can't be replaced at once".to_owned()),
        (true, false) => Ok((node.span.clone(), format!(" {new}"))),
        // The space before it was not there either.
        (false, true) => {
            let space = usize::from(text[..node.span.start].ends_with(' '));
            Ok((node.span.start - space..node.span.end, new))
        }
        _ => Ok((node.span.clone(), new)),
    }
}

fn is_collection(value: &Value) -> bool {
    value.as_array().is_some_and(|items| !items.is_empty())
        || value.as_object().is_some_and(|members| !members.is_empty())
}

/// Removes `span`: in flow style with one adjacent comma, in block style with its lines.
fn remove(
    text: &str,
    span: Range<usize>,
    next: Option<usize>,
    before: Option<usize>,
    style: StructureStyle,
) -> Result<Splice, String> {
    let cut = match (style, next, before) {
        (StructureStyle::Flow, Some(next), _) => span.start..next,
        (StructureStyle::Flow, None, Some(before)) => before..span.end,
        (StructureStyle::Flow, None, None) => span,
        (StructureStyle::Block, next, _) => {
            let line = line_start(text, span.start);
            let alone = text[line..span.start].trim().is_empty();
            let end = if text[..span.end].ends_with('\n') { span.end } else { line_end(text, span.end) };
            match (alone, next) {
                (true, _) if end == text.len() && !text.ends_with('\n') && line > 0 => {
                    let newline = if text[..line].ends_with("\r\n") { 2 } else { 1 };
                    line - newline..end
                }
                (true, _) => line..end,
                // First key behind a dash: the next key moves into its place.
                (false, Some(next)) => span.start..next,
                (false, None) => return Err("it is alone on its line".to_owned()),
            }
        }
    };
    Ok((cut, String::new()))
}

/// Offset of the dash of this block element. Between the two are only spaces, line ends, comments, a tag and an anchor.
fn dash(text: &str, item: &Node) -> Result<usize, String> {
    let mut before = text[..item.span.start].trim_end();
    loop {
        let line = line_start(before, before.len());
        let comment = before[line..].match_indices('#').map(|(at, _)| line + at);
        let comment = comment.into_iter().find(|at| *at == line || before[..*at].ends_with([' ', '\t']));
        let word = before.rfind([' ', '\t', '\n']).map_or(0, |at| at + 1);
        let cut = match (comment, before.strip_suffix('-')) {
            (Some(at), _) => at,
            (None, Some(rest)) => return Ok(rest.len()),
            (None, None) if before[word..].starts_with(['&', '!']) => word,
            (None, None) => return Err("an element whose dash can't be found".to_owned()),
        };
        before = before[..cut].trim_end();
    }
}

/// Column of this offset, in characters.
pub fn column(text: &str, at: usize) -> usize {
    text[line_start(text, at)..at].chars().count()
}

fn line_start(text: &str, at: usize) -> usize {
    text[..at].rfind('\n').map_or(0, |n| n + 1)
}

/// Offset just past the line's newline, or the end of the text.
pub fn line_end(text: &str, at: usize) -> usize {
    text[at..].find('\n').map_or(text.len(), |n| at + n + 1)
}

fn style_of(text: &str, root: &Node, json: bool) -> Style {
    let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
    Style { dash: dash_indent(text, root).unwrap_or(0), newline, json }
}

/// Indentation of the document's first list relative to its key.
fn dash_indent(text: &str, node: &Node) -> Option<usize> {
    match &node.kind {
        Kind::Map(entries, StructureStyle::Block) => {
            entries.iter().find_map(|(key, value)| match &value.kind {
                Kind::Seq(items, StructureStyle::Block) => {
                    let dash = dash(text, items.first()?).ok()?;
                    column(text, dash).checked_sub(column(text, key.span.start))
                }
                _ => dash_indent(text, value),
            })
        }
        Kind::Seq(items, StructureStyle::Block) => items.iter().find_map(|item| dash_indent(text, item)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::diff::diff;
    use super::*;

    /// Applies `change` to the value and returns the edited text.
    fn changed(text: &str, change: impl Fn(&mut Value)) -> Result<String, String> {
        let before = parse(text).unwrap().to_json().unwrap();
        let mut after = before.clone();
        change(&mut after);
        edit(text, &diff(&Pointer::default(), &before, &after), &Written::new(), &after)
    }

    #[test]
    fn new_members_and_elements_take_the_style_around_them() {
        let text =
            "a: # why\n    x: 1   # one\n    l:\n      - q\n      # tail\n\nb: {c: d, e: }\nf: []\ng: {}";
        let edited = changed(text, |v| {
            v["a"]["l"] = json!(["p", "q", {"name": "on", "v": [1]}]);
            v["a"]["y"] = json!({"z": "0777"});
            v["b"]["n"] = json!("x y");
            v["f"] = json!([{"name": "k"}]);
            v["g"]["h"] = json!(1);
            v["i"] = json!(true);
        });
        let expected = "a: # why\n    x: 1   # one\n    l:\n      - p\n      - q\n      - name: \"on\"\n        v:\n          - 1\n    \"y\":\n      z: \"0777\"\n      # tail\n\nb: {c: d, e:, \"n\": \"x y\" }\nf: [{\"name\": \"k\"}]\ng: {\"h\": 1}\ni: true";
        assert_eq!(edited.unwrap(), expected);
    }

    #[test]
    fn what_is_put_in_comes_out_without_a_trace() {
        let text = "a:\r\n- name: f # one\r\n  y: [1, 2]\r\n- 'z'\r\nb: |\r\n  text\r\n\r\nc: {d: 1}\r\n";
        let before = parse(text).unwrap().to_json().unwrap();
        let mut after = before.clone();
        after["a"][0]["w"] = json!({"v": ["on"]});
        after["a"][0]["y"] = json!([0, 1, 2, 3]);
        after["a"].as_array_mut().unwrap().insert(1, json!({"name": "new"}));
        after["c"]["e"] = json!("n");
        after["z"] = json!([1]);
        let there = edit(text, &diff(&Pointer::default(), &before, &after), &Written::new(), &after).unwrap();
        assert!(!there.replace("\r\n", "").contains('\n'));
        let back =
            edit(&there, &diff(&Pointer::default(), &after, &before), &Written::new(), &before).unwrap();
        assert_eq!(back, text);
    }

    #[test]
    fn scalars_change_and_keep_their_comments() {
        let text = "- name: x # the name\n  n: 30 # thirty\n  e:   # nothing\n  s: \"q\" # quoted\n";
        let edited = changed(text, |v| {
            v[0]["n"] = json!(60);
            v[0]["s"] = json!("http");
            v[0]["e"] = json!("off");
        });
        let expected =
            "- name: x # the name\n  n: 60 # thirty\n  e: \"off\"   # nothing\n  s: http # quoted\n";
        assert_eq!(edited.unwrap(), expected);
        let edited = changed("- name: x\n  # about n\n  n: 1\n", |v| {
            v[0].as_object_mut().unwrap().remove("name").unwrap();
        });
        assert_eq!(edited.unwrap(), "- n: 1\n");
    }

    #[test]
    fn what_stands_in_two_places_is_left_alone() {
        let text = "a: &x {n: 1}\nb: *x\n";
        assert!(changed(text, |v| v["a"]["n"] = json!(2)).unwrap_err().contains("anchors"));
        assert!(changed(text, |v| v["b"]["n"] = json!(2)).unwrap_err().contains("alias"));
        assert!(changed("a: |\n  x\n", |v| v["a"] = json!("y")).unwrap_err().contains("block scalar"));
    }
}
