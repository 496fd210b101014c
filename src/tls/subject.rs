//! Formats a certificate's subject as text (RFC 4514). Pure. ASCII only, so that it fits into a header field: all
//! other bytes are written as `\` and two hexadecimal digits (§2.4).

use std::fmt::Write;

use super::certificate::{element, enter, parts};

/// The short names of RFC 4514 §3, by their object identifiers in DER.
const SHORT: [(&[u8], &str); 9] = [
    (&[0x55, 4, 3], "CN"),
    (&[0x55, 4, 7], "L"),
    (&[0x55, 4, 8], "ST"),
    (&[0x55, 4, 10], "O"),
    (&[0x55, 4, 11], "OU"),
    (&[0x55, 4, 6], "C"),
    (&[0x55, 4, 9], "STREET"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 25], "DC"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 1], "UID"),
];

/// Returns the subject of a certificate in DER, most specific part first, as in `CN=ada,O=Shop`; empty if it has
/// none, `None` if this is no certificate.
pub fn subject(der: &[u8]) -> Option<String> {
    let mut rest = parts(der)?.subject;
    let mut sets = Vec::new();
    while !rest.is_empty() {
        let (set, others) = enter(rest, 0x31)?;
        sets.push(set);
        rest = others;
    }
    let mut text = String::new();
    for (n, mut set) in sets.into_iter().rev().enumerate() {
        let mut separator = if n > 0 { "," } else { "" };
        while !set.is_empty() {
            let (attribute, others) = enter(set, 0x30)?;
            let (id, value) = enter(attribute, 0x06)?;
            text += separator;
            put_attribute(&mut text, id, value)?;
            (set, separator) = (others, "+");
        }
    }
    Some(text)
}

fn put_attribute(text: &mut String, id: &[u8], der: &[u8]) -> Option<()> {
    let (tag, value, _) = element(der)?;
    let short = SHORT.iter().find(|(known, _)| *known == id);
    match (short, string(tag, value)) {
        (Some((_, name)), Some(value)) => {
            let _ = write!(text, "{name}=");
            put_escaped(text, &value);
        }
        // A type without a short name is written as its number, its value as DER (§2.4).
        _ => {
            put_number(text, id);
            *text += "=#";
            for byte in der {
                let _ = write!(text, "{byte:02x}");
            }
        }
    }
    Some(())
}

/// Converts a DER string to text; `None` for other types and for invalid text.
fn string(tag: u8, value: &[u8]) -> Option<String> {
    match tag {
        // UTF8String, and the ASCII types: NumericString, PrintableString, IA5String.
        0x0c | 0x12 | 0x13 | 0x16 => String::from_utf8(value.to_vec()).ok(),
        // TeletexString, treated as Latin-1 by common practice.
        0x14 => Some(value.iter().map(|byte| char::from(*byte)).collect()),
        // BMPString.
        0x1e if value.len().is_multiple_of(2) => {
            let units: Vec<_> =
                value.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
            String::from_utf16(&units).ok()
        }
        _ => None,
    }
}

fn put_escaped(text: &mut String, value: &str) {
    let last = value.len().saturating_sub(1);
    for (at, byte) in value.bytes().enumerate() {
        let special = matches!(byte, b'"' | b'+' | b',' | b';' | b'<' | b'>' | b'\\')
            || byte == b'#' && at == 0
            || byte == b' ' && (at == 0 || at == last);
        match byte {
            _ if special => text.extend(['\\', char::from(byte)]),
            b' '..=b'~' => text.push(char::from(byte)),
            _ => {
                let _ = write!(text, "\\{byte:02x}");
            }
        }
    }
}

/// Writes an object identifier with dots: seven bits per byte, the first two numbers combined (X.690 §8.19).
fn put_number(text: &mut String, id: &[u8]) {
    let (mut arc, mut first) = (0u64, true);
    for byte in id {
        arc = arc.wrapping_shl(7) | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            let _ = match first {
                true => write!(text, "{}.{}", (arc / 40).min(2), arc - 40 * (arc / 40).min(2)),
                false => write!(text, ".{arc}"),
            };
            (arc, first) = (0, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;

    fn of(parts: &[(DnType, &str)]) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in parts {
            params.distinguished_name.push(kind.clone(), *value);
        }
        subject(params.self_signed(&KeyPair::generate().unwrap()).unwrap().der()).unwrap()
    }

    #[test]
    fn the_most_special_part_comes_first() {
        let parts = [
            (DnType::CountryName, "DE"),
            (DnType::OrganizationName, "Shop"),
            (DnType::OrganizationalUnitName, "Till"),
            (DnType::CommonName, "ada"),
        ];
        assert_eq!(of(&parts), "CN=ada,OU=Till,O=Shop,C=DE");
        assert_eq!(of(&[]), "");
    }

    #[test]
    fn nothing_in_a_name_can_be_taken_for_another_part_or_another_field() {
        let cn = |value: &str| of(&[(DnType::CommonName, value)]);
        assert_eq!(cn("ada,CN=root"), "CN=ada\\,CN=root");
        assert_eq!(cn("a+b\"c\\d<e>f;g"), "CN=a\\+b\\\"c\\\\d\\<e\\>f\\;g");
        assert_eq!(cn(" #a "), "CN=\\ #a\\ ");
        assert_eq!(cn("#a"), "CN=\\#a");
        assert_eq!(cn("a\r\nX-Admin: 1\0"), "CN=a\\0d\\0aX-Admin: 1\\00");
        assert_eq!(cn("Lučić"), "CN=Lu\\c4\\8di\\c4\\87", "the example of RFC 4514 §4");
    }

    #[test]
    fn a_part_without_a_short_name_is_written_by_its_number() {
        let title = DnType::CustomDnType(vec![2, 5, 4, 12]);
        assert_eq!(of(&[(title, "Dr")]), "2.5.4.12=#0c024472");
        let far = DnType::CustomDnType(vec![1, 3, 6, 1, 4, 1, 1466]);
        assert!(of(&[(far, "x")]).starts_with("1.3.6.1.4.1.1466=#"));
    }
}
