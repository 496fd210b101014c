//! Where the head that is passed on is written.

use std::ops::Range;

use http::{HeaderName, HeaderValue};

use super::message::{put, put_field};

/// Takes the head that is passed on, line by line: as text for HTTP/1.1, or as fields for HTTP/2, which has no lines
/// about the connection.
pub trait HeadOut {
    /// Empty again.
    fn clear(&mut self);
    /// A request's first line; the target is in two parts.
    fn request_line(&mut self, method: &str, target: [&str; 2]);
    /// A response's first line.
    fn status_line(&mut self, status: u16, reason: &[u8]);
    /// A request's `Host`. Returns where its value is in a text.
    fn host(&mut self, name: &str, value: &[u8]) -> Range<usize>;
    /// A field, whose value is in parts.
    fn field(&mut self, name: &str, value: &[&[u8]]);
    /// A field that came by HTTP/1.1, in `buf`.
    fn line(&mut self, buf: &[u8], name: &str, value: &[u8]) {
        let _ = buf;
        self.field(name, &[value]);
    }
    /// A field that came by HTTP/2.
    fn typed(&mut self, name: &HeaderName, value: &HeaderValue) {
        self.field(name.as_str(), &[value.as_bytes()]);
    }
    /// Lines about the connection and the framing, as text, or the empty line at the end.
    fn connection(&mut self, lines: &[&[u8]]);
}

impl HeadOut for Vec<u8> {
    fn clear(&mut self) {
        self.clear();
    }

    #[inline]
    fn request_line(&mut self, method: &str, [start, rest]: [&str; 2]) {
        put(self, &[method.as_bytes(), b" ", start.as_bytes(), rest.as_bytes(), b" HTTP/1.1\r\n"]);
    }

    #[inline]
    fn status_line(&mut self, status: u16, reason: &[u8]) {
        let digits = [status / 100, status / 10 % 10, status % 10].map(|digit| b'0' + digit as u8);
        put(self, &[b"HTTP/1.1 ", &digits, b" ", reason, b"\r\n"]);
    }

    fn host(&mut self, name: &str, value: &[u8]) -> Range<usize> {
        put_field(self, name, value);
        let end = self.len() - b"\r\n".len();
        end - value.len()..end
    }

    fn field(&mut self, name: &str, value: &[&[u8]]) {
        match value {
            [value] => put_field(self, name, value),
            parts => {
                put(self, &[name.as_bytes(), b": "]);
                put(self, parts);
                self.extend_from_slice(b"\r\n");
            }
        }
    }

    /// One copy for a line that is already as we write it, as most are.
    #[inline]
    fn line(&mut self, buf: &[u8], name: &str, value: &[u8]) {
        let (start, length) = (name.as_ptr() as usize - buf.as_ptr() as usize, name.len() + 2 + value.len());
        let follows = value.as_ptr() as usize == name.as_ptr() as usize + name.len() + 2;
        match buf.get(start..start + length + 2) {
            Some(line) if follows && line[name.len() + 1] == b' ' && line[length..] == *b"\r\n" => {
                self.extend_from_slice(line);
            }
            _ => put_field(self, name, value),
        }
    }

    fn connection(&mut self, lines: &[&[u8]]) {
        put(self, lines);
    }
}
