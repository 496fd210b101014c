//! The text of one document with its tree and value: what it says, and its objects edited. Pure.

use std::ops::Range;

use granit_parser::StructureStyle;
use serde_json::Value;

use super::diff::{Pointer, diff};
use super::edit::{column, edit, find, is_json, line_end, written};
use super::model::Written;
use super::yaml::{self, Kind, Node};

/// A document that has a value.
pub struct Document<'a> {
    text: &'a str,
    root: Node,
    /// Its value.
    pub value: Value,
    /// Whether it has directives (`%TAG`), without which a part of it may mean something else.
    directives: bool,
}

/// Bytes to replace, and the text that replaces them.
pub type Edit = (Range<usize>, String);

impl<'a> Document<'a> {
    /// Parses it; none if it has nothing but comments.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn parse(text: &'a str) -> Result<Option<Self>, String> {
        // Folders hold a lot of JSON that is no manifest.
        if text.trim_start().starts_with(['{', '[']) && !text.contains("kind") {
            return Ok(None);
        }
        let parsed = yaml::parse(text).and_then(|root| {
            let Some(root) = root else { return Ok(None) };
            let value = root.to_json()?;
            let directives = text.lines().any(|line| line.starts_with('%'));
            Ok(Some(Self { text, root, value, directives }))
        });
        let template = text.contains("{{") && text.contains("}}");
        parsed.map_err(|why| if template { HELM.to_owned() } else { why })
    }

    /// The edit that turns the object at this location into `after`. `sources` are texts to put back, by their location
    /// in the object.
    ///
    /// # Errors
    /// It can't be edited in place.
    pub fn edit(&self, at: &Pointer, after: &Value, sources: &Written) -> Result<Edit, String> {
        let before = self.value.pointer(&at.to_string()).ok_or("it is not there")?;
        let node = find(&self.root, &at.0)?;
        let span = if at.0.is_empty() { 0..self.text.len() } else { whole_lines(self.text, node) };
        if at.0.is_empty() || self.directives || is_shared(node) {
            let mut expected = self.value.clone();
            *expected.pointer_mut(&at.to_string()).ok_or("it is not there")? = after.clone();
            let sources = sources.iter().map(|(place, text)| (format!("{at}{place}"), text.clone()));
            let all = edit(self.text, &diff(at, before, after), &sources.collect(), &expected)?;
            let behind = self.text.len() - span.end;
            let new = all.get(span.start..all.len() - behind).ok_or("an edit outside of it")?;
            return Ok((span, new.to_owned()));
        }
        // Alone, so that a List takes no longer than its objects. The first line gets the column that the others have.
        let indent = if is_flow(node) { 0 } else { column(self.text, span.start) };
        let alone = format!("{:indent$}{}", "", &self.text[span.clone()]);
        let edited = edit(&alone, &diff(&Pointer::default(), before, after), sources, after)?;
        Ok((span, edited[indent..].to_owned()))
    }

    /// Source text of the values that this change replaces and that couldn't be written the same again, by their
    /// location in the object.
    pub fn sources(&self, at: &Pointer, after: &Value) -> Written {
        let Some(before) = self.value.pointer(&at.to_string()) else { return Written::new() };
        let all = written(self.text, &self.root, &diff(at, before, after));
        let prefix = at.to_string();
        let inside = |(place, text): (String, String)| Some((place.strip_prefix(&prefix)?.to_owned(), text));
        all.into_iter().filter_map(inside).collect()
    }

    /// The text with these edits, which don't overlap and stand in the order of the text.
    ///
    /// # Errors
    /// The result would not parse as `expected`.
    pub fn with(&self, edits: &[Edit], expected: &Value) -> Result<String, String> {
        let (mut new, mut at) = (String::with_capacity(self.text.len()), 0);
        for (span, text) in edits {
            new += self.text.get(at..span.start).ok_or("edits that overlap")?;
            new += text;
            at = span.end;
        }
        new += &self.text[at..];
        match yaml::parse(&new)?.map(|root| root.to_json()) {
            Some(Ok(value)) if value == *expected => Ok(new),
            _ => Err("its unusual style keeps it from being edited in place".to_owned()),
        }
    }
}

const HELM: &str =
    "it looks like a Helm template: render it first: helm template NAME CHART | lameduck inject";

/// Splits a manifest into its documents. A YAML document begins at a `---` line; comments and directives (`%YAML`)
/// before that line belong to it. JSON values follow each other without anything in between.
pub fn split(text: &str) -> Vec<&str> {
    if let Some(values) = json_values(text) {
        return values;
    }
    let (mut documents, mut start, mut at, mut content) = (Vec::new(), 0, 0, false);
    for line in text.split_inclusive('\n') {
        let marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marker && content {
            documents.push(&text[start..at]);
            start = at;
        }
        content |= marker || !(line.trim().is_empty() || line.starts_with(['#', '%', '\u{feff}']));
        at += line.len();
    }
    documents.push(&text[start..]);
    documents
}

/// The JSON values in this text, if it is nothing but JSON.
fn json_values(text: &str) -> Option<Vec<&str>> {
    if !text.trim_start().starts_with('{') {
        return None;
    }
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<serde::de::IgnoredAny>();
    let (mut documents, mut start) = (Vec::new(), 0);
    while let Some(value) = values.next() {
        value.ok()?;
        documents.push(&text[start..values.byte_offset()]);
        start = values.byte_offset();
    }
    // What follows the last one is space: it belongs to it.
    let last = documents.pop()?;
    documents.push(&text[start - last.len()..]);
    Some(documents)
}

/// Whether the text is a JSON value or several.
pub fn is_all_json(text: &str) -> bool {
    json_values(text).is_some() || is_json(text)
}

/// The bytes of a node; of a block collection up to the end of its last line, with the comment there.
fn whole_lines(text: &str, node: &Node) -> Range<usize> {
    let Range { start, end } = node.span;
    if is_flow(node) || text[..end].ends_with('\n') { start..end } else { start..line_end(text, end) }
}

fn is_flow(node: &Node) -> bool {
    !matches!(&node.kind, Kind::Map(_, StructureStyle::Block) | Kind::Seq(_, StructureStyle::Block))
}

/// Whether an anchor or an alias ties it to the rest of the document.
fn is_shared(node: &Node) -> bool {
    let inside = match &node.kind {
        Kind::Alias(_) => true,
        Kind::Scalar(..) => false,
        Kind::Map(entries, _) => entries.iter().any(|(key, value)| is_shared(key) || is_shared(value)),
        Kind::Seq(items, _) => items.iter().any(is_shared),
    };
    inside || node.is_anchored()
}
