//! Parses YAML into a tree that knows the bytes of each node and its value as `kubectl` reads it. Never writes.

use std::collections::HashMap;
use std::ops::Range;

use granit_parser::{Event, Options, Parser, ScalarStyle, StructureStyle};
use serde_json::{Map, Number, Value};

/// Maximum nesting depth. Kubernetes objects stay far below it; it bounds the parser's stack.
const MAX_DEPTH: usize = 100;
/// Maximum number of nodes, each with some 150 bytes. Aliases of aliases can expand without end (the "billion laughs"
/// attack).
const MAX_NODES: usize = 1_000_000;

const TOO_LARGE: &str = "it is too large: over 1,000,000 values, aliases included";

/// A node and its location.
#[derive(Debug)]
pub struct Node {
    /// Its bytes. A block scalar starts after its header; a block collection spans its first child to its last, without
    /// the first dash.
    pub span: Range<usize>,
    /// Its type and value.
    pub kind: Kind,
    tag: Option<String>,
    anchor: usize,
}

/// Type and value of a node.
#[derive(Debug)]
pub enum Kind {
    /// Scalar with its style: plain, quoted, block.
    Scalar(String, ScalarStyle),
    /// Keys and values in document order.
    Map(Vec<(Node, Node)>, StructureStyle),
    /// Elements.
    Seq(Vec<Node>, StructureStyle),
    /// Alias (`*name`), by the number of its anchor.
    Alias(usize),
}

/// Parses the only document in this text; none if it has nothing but comments.
///
/// # Errors
/// Says what is wrong, and in which line.
pub fn parse(text: &str) -> Result<Option<Node>, String> {
    let mut options = Options::default();
    options.emit_comments = false;
    let mut builder =
        Builder { text, events: Parser::new_from_str_with_options(text, options), left: MAX_NODES };
    let mut root = None;
    while let Some((event, span)) = builder.next()? {
        match event {
            Event::StreamStart | Event::StreamEnd | Event::DocumentStart(..) | Event::DocumentEnd => {}
            event if root.is_none() => root = Some(builder.node(event, span, 0)?),
            _ => return Err("a second document without a --- line before it".to_owned()),
        }
    }
    Ok(root.filter(|root| !(root.is_nothing() && root.span.is_empty())))
}

struct Builder<'a> {
    text: &'a str,
    events: Parser<'a, granit_parser::StrInput<'a>>,
    left: usize,
}

impl<'a> Builder<'a> {
    fn next(&mut self) -> Result<Option<(Event<'a>, Range<usize>)>, String> {
        match self.events.next() {
            None => Ok(None),
            Some(Err(error)) => Err(error.to_string()),
            Some(Ok((event, span))) => {
                let bytes = span.byte_range().ok_or("an unknown position")?;
                Ok(Some((event, bytes)))
            }
        }
    }

    /// Position of an omitted value.
    fn behind_colon(&self, key: &Node) -> Range<usize> {
        let rest = self.text.get(key.span.end..).unwrap_or_default();
        let colon = rest.trim_start_matches([' ', '\t']);
        let at = key.span.end + if colon.starts_with(':') { rest.len() - colon.len() + 1 } else { 0 };
        at..at
    }

    fn inner(&mut self) -> Result<(Event<'a>, Range<usize>), String> {
        self.next()?.ok_or_else(|| "it ends too early".to_owned())
    }

    fn node(&mut self, event: Event<'a>, span: Range<usize>, depth: usize) -> Result<Node, String> {
        if depth > MAX_DEPTH {
            return Err(format!("nested over {MAX_DEPTH} deep"));
        }
        self.left = self.left.checked_sub(1).ok_or(TOO_LARGE)?;
        match event {
            Event::Alias(anchor) => Ok(Node { span, kind: Kind::Alias(anchor), tag: None, anchor: 0 }),
            Event::Scalar(text, style, anchor, tag) => {
                let tag = tag.map(|tag| tag.to_string());
                Ok(Node { span, kind: Kind::Scalar(text.into_owned(), style), tag, anchor })
            }
            Event::SequenceStart(style, anchor, tag) => {
                let mut items = Vec::new();
                let end = loop {
                    match self.inner()? {
                        (Event::SequenceEnd, end) => break end,
                        (event, span) => items.push(self.node(event, span, depth + 1)?),
                    }
                };
                let end = end_of(style, &span, &end, items.last());
                let tag = tag.map(|tag| tag.to_string());
                Ok(Node { span: span.start..end, kind: Kind::Seq(items, style), tag, anchor })
            }
            Event::MappingStart(style, anchor, tag) => {
                let mut entries = Vec::new();
                let end = loop {
                    let key = match self.inner()? {
                        (Event::MappingEnd, end) => break end,
                        (event, span) => self.node(event, span, depth + 1)?,
                    };
                    let (event, span) = self.inner()?;
                    let mut value = self.node(event, span, depth + 1)?;
                    if value.is_nothing() {
                        value.span = self.behind_colon(&key);
                    }
                    entries.push((key, value));
                };
                let end = end_of(style, &span, &end, entries.last().map(|(_, value)| value));
                let tag = tag.map(|tag| tag.to_string());
                Ok(Node { span: span.start..end, kind: Kind::Map(entries, style), tag, anchor })
            }
            _ => Err("an event that is not a node".to_owned()),
        }
    }
}

/// The end event of a block collection is located at the next token.
fn end_of(style: StructureStyle, start: &Range<usize>, end: &Range<usize>, last: Option<&Node>) -> usize {
    match style {
        StructureStyle::Flow => end.end,
        StructureStyle::Block => last.map_or(start.end, |node| node.span.end),
    }
}

impl Node {
    /// Value of this key in a mapping; the last one if the key is repeated, as parsers do.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.entry(key).map(|(_, _, value)| value)
    }

    /// Index of the entry, its key and its value.
    pub fn entry(&self, wanted: &str) -> Option<(usize, &Node, &Node)> {
        let Kind::Map(entries, _) = &self.kind else { return None };
        let found = entries.iter().rposition(|(key, _)| key.text() == Some(wanted))?;
        Some((found, &entries[found].0, &entries[found].1))
    }

    fn text(&self) -> Option<&str> {
        match &self.kind {
            Kind::Scalar(text, _) => Some(text),
            _ => None,
        }
    }

    /// Whether the value is empty, as in `key:`.
    pub fn is_nothing(&self) -> bool {
        self.span.is_empty() && matches!(&self.kind, Kind::Scalar(_, ScalarStyle::Plain))
    }

    /// Whether aliases can refer to it.
    pub fn is_anchored(&self) -> bool {
        self.anchor != 0
    }

    /// The value as `kubectl` reads it: scalars by YAML 1.1, aliases and merge keys resolved.
    ///
    /// # Errors
    /// The value exceeds a limit, or refers to itself.
    pub fn to_json(&self) -> Result<Value, String> {
        let mut anchors = HashMap::new();
        self.collect_anchors(&mut anchors);
        Resolver { anchors, left: MAX_NODES }.value(self, 0)
    }

    fn collect_anchors<'a>(&'a self, anchors: &mut HashMap<usize, &'a Node>) {
        if self.anchor != 0 {
            anchors.insert(self.anchor, self);
        }
        match &self.kind {
            Kind::Map(entries, _) => entries.iter().for_each(|(key, value)| {
                key.collect_anchors(anchors);
                value.collect_anchors(anchors);
            }),
            Kind::Seq(items, _) => items.iter().for_each(|item| item.collect_anchors(anchors)),
            Kind::Scalar(..) | Kind::Alias(_) => {}
        }
    }
}

struct Resolver<'a> {
    anchors: HashMap<usize, &'a Node>,
    left: usize,
}

impl<'a> Resolver<'a> {
    fn value(&mut self, node: &'a Node, depth: usize) -> Result<Value, String> {
        self.left = self.left.checked_sub(1).ok_or(TOO_LARGE)?;
        if depth > 2 * MAX_DEPTH {
            return Err("an alias that refers to itself".to_owned());
        }
        match &node.kind {
            Kind::Alias(anchor) => {
                let target = *self.anchors.get(anchor).ok_or("an unknown alias")?;
                self.value(target, depth + 1)
            }
            Kind::Scalar(text, style) => Ok(scalar(text, *style, node)),
            Kind::Seq(items, _) => items.iter().map(|item| self.value(item, depth + 1)).collect(),
            Kind::Map(entries, _) => self.map(entries, depth + 1),
        }
    }

    fn map(&mut self, entries: &'a [(Node, Node)], depth: usize) -> Result<Value, String> {
        let (mut map, mut own) = (Map::new(), Map::new());
        for (key, value) in entries {
            let value = self.value(value, depth)?;
            match &key.kind {
                Kind::Scalar(text, ScalarStyle::Plain) if text == "<<" => {
                    let merged = match value {
                        Value::Array(several) => several,
                        one => vec![one],
                    };
                    for (key, value) in merged.into_iter().filter_map(as_object).flatten() {
                        map.entry(key).or_insert(value);
                    }
                }
                Kind::Scalar(text, _) => drop(own.insert(text.clone(), value)),
                _ => return Err("a key that is not text".to_owned()),
            }
        }
        // The mapping's own keys win over merged ones, wherever the merge key is.
        map.extend(own);
        Ok(Value::Object(map))
    }
}

fn as_object(value: Value) -> Option<Map<String, Value>> {
    match value {
        Value::Object(map) => Some(map),
        _ => None,
    }
}

fn scalar(text: &str, style: ScalarStyle, node: &Node) -> Value {
    let tag = node.tag.as_deref().and_then(|tag| tag.rsplit([':', '!']).next());
    let as_written = style == ScalarStyle::Plain && tag != Some("str");
    if !as_written && !tag.is_some_and(|tag| ["int", "float", "bool", "null"].contains(&tag)) {
        return Value::String(text.to_owned());
    }
    if node.is_nothing() {
        return Value::Null;
    }
    plain(text)
}

/// Value of a plain scalar by YAML 1.1 with Go's rules, as `kubectl` reads it.
pub fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            return Value::Bool(true);
        }
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return Value::Bool(false);
        }
        _ => {}
    }
    if !text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c)) {
        return Value::String(text.to_owned());
    }
    let digits = text.replace('_', "");
    let number = integer(&digits).map(Number::from).or_else(|| {
        let looks_right = digits.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
        digits.parse().ok().filter(|_| looks_right).and_then(Number::from_f64)
    });
    number.map_or_else(|| Value::String(text.to_owned()), Value::Number)
}

fn integer(digits: &str) -> Option<i64> {
    let (sign, bare) = match digits.strip_prefix('-') {
        Some(bare) => (-1, bare),
        None => (1, digits.strip_prefix('+').unwrap_or(digits)),
    };
    let (radix, bare) = match bare.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, &bare[2..]),
        [b'0', b'o' | b'O', ..] => (8, &bare[2..]),
        [b'0', b'b' | b'B', ..] => (2, &bare[2..]),
        [b'0', _, ..] => (8, &bare[1..]),
        _ => (10, bare),
    };
    let plain = !bare.is_empty() && bare.bytes().all(|b| b.is_ascii_hexdigit());
    i64::from_str_radix(bare, radix).ok().filter(|_| plain).map(|n| sign * n)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn yaml_1_1_is_read_as_kubectl_reads_it() {
        let text = "a: on\nb: n\nc: 0777\nd: 'on'\ne: 1_000\nf: 0x1F\ng: 1e3\nh: .5\ni: ~\nj:\nk: !!str 1\nl: 1.2.3\nm: -\u{e9}\nn: !!int \"8080\"\n";
        let json = parse(text).unwrap().unwrap().to_json().unwrap();
        let expected = json!({"a": true, "b": false, "c": 511, "d": "on", "e": 1000, "f": 31, "g": 1000.0,
            "h": 0.5, "i": null, "j": null, "k": "1", "l": "1.2.3", "m": "-\u{e9}", "n": 8080});
        assert_eq!(json, expected);
    }

    #[test]
    fn merge_keys_yield_to_what_stands_there() {
        let text = "base: &b {x: 1, y: 2}\nthis:\n  <<: *b\n  y: 3\n";
        let json = parse(text).unwrap().unwrap().to_json().unwrap();
        assert_eq!(json["this"], json!({"x": 1, "y": 3}));
    }

    #[test]
    fn aliases_of_aliases_end() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..9 {
            let all = vec![format!("*a{}", n - 1); 10].join(", ");
            text += &format!("a{n}: &a{n} [{all}]\n");
        }
        let error = parse(&text).unwrap().unwrap().to_json().unwrap_err();
        assert!(error.contains("too large"), "{error}");
        let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
        assert!(parse(&deep).is_err());
    }

    #[test]
    fn nodes_know_their_bytes() {
        let text = "a: {b: 'x'}\nl:\n- n: 1\n  m:\n- 2 # c\n";
        let root = parse(text).unwrap().unwrap();
        assert_eq!(&text[root.get("a").unwrap().span.clone()], "{b: 'x'}");
        assert_eq!(&text[root.get("l").unwrap().span.clone()], "n: 1\n  m:\n- 2");
        assert!(parse("# nothing\n---\n").unwrap().is_none());
    }
}
