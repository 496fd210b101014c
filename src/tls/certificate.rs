//! Certificates and keys in files, and the few fields that are read from inside them.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use time::{Date, Month};

use super::provider;

/// Seconds since 1970 in UTC.
pub type Seconds = u64;

/// A trusted root certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// The certificate in DER.
    pub der: CertificateDer<'static>,
    /// Its validity.
    pub valid: Range<Seconds>,
}

/// Returns the certificates of a PEM text, in order. Skips everything else.
pub fn roots(pem: &[u8]) -> Vec<Root> {
    let ders = CertificateDer::pem_slice_iter(pem).filter_map(Result::ok);
    ders.filter_map(|der| Some(Root { valid: validity(&der)?, der })).collect()
}

/// A server's certificate with its chain and its key.
#[derive(Clone, Debug)]
pub struct Served {
    /// The chain and key for rustls.
    pub key: Arc<CertifiedKey>,
    /// The certificate's validity.
    pub valid: Range<Seconds>,
}

impl Served {
    /// Reads `tls.crt` (chain) and `tls.key`.
    ///
    /// # Errors
    /// If one of them is not PEM, or the key does not match the certificate.
    pub fn read(chain: &[u8], key: &[u8]) -> Result<Self, String> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
        let chain = chain.map_err(|why| format!("tls.crt: {why}"))?;
        let first = chain.first().ok_or("tls.crt has no certificate")?;
        let valid = validity(first).ok_or("tls.crt: not a certificate")?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|why| format!("tls.key: {why}"))?;
        let key = CertifiedKey::from_der(chain, key, &provider());
        let key = key.map_err(|why| format!("tls.crt and tls.key: {why}"))?;
        Ok(Self { key: Arc::new(key), valid })
    }

    /// Reads the pair in a folder, as Kubernetes mounts a Secret of type `kubernetes.io/tls`.
    ///
    /// # Errors
    /// What is wrong, with the folder's name.
    pub fn read_dir(dir: &Path) -> Result<Self, String> {
        let read = |name: &str| fs::read(dir.join(name)).map_err(|why| format!("{name}: {why}"));
        let read = read("tls.crt").and_then(|crt| Self::read(&crt, &read("tls.key")?));
        read.map_err(|why| format!("{}: {why}", dir.display()))
    }

    /// Returns the certificate's DNS names in lower case; `*.` stands for any one label (RFC 9525 §6.3).
    pub fn names(&self) -> Vec<String> {
        names(self.der()).unwrap_or_default()
    }

    /// Returns the certificate itself, without its chain.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.key.cert[0]
    }
}

/// The parts of a certificate in DER (RFC 5280 §4.1): `SEQUENCE { tbs SEQUENCE { [0] version?, serial, algorithm,
/// issuer, SEQUENCE { notBefore, notAfter }, subject SEQUENCE, key, … [3] { SEQUENCE extensions } } … }`.
pub(super) struct CertFields<'d> {
    times: &'d [u8],
    /// The contents of the subject's SEQUENCE.
    pub subject: &'d [u8],
    /// The contents of the extensions' SEQUENCE.
    extensions: &'d [u8],
}

pub(super) fn parts(der: &[u8]) -> Option<CertFields<'_>> {
    let (tbs, _) = enter(der, 0x30)?;
    let (mut fields, _) = enter(tbs, 0x30)?;
    if fields.first() == Some(&0xa0) {
        fields = element(fields)?.2;
    }
    for _ in ["serial", "algorithm", "issuer"] {
        fields = element(fields)?.2;
    }
    let (times, fields) = enter(fields, 0x30)?;
    let (subject, fields) = enter(fields, 0x30)?;
    let (_, _, mut fields) = element(fields)?;
    let mut extensions: &[u8] = &[];
    while let Some((tag, inside, rest)) = element(fields) {
        if tag == 0xa3 {
            extensions = enter(inside, 0x30)?.0;
        }
        fields = rest;
    }
    Some(CertFields { times, subject, extensions })
}

/// Returns a certificate's validity, including its last second.
fn validity(der: &[u8]) -> Option<Range<Seconds>> {
    let (tag, before, rest) = element(parts(der)?.times)?;
    let (end_tag, after, _) = element(rest)?;
    Some(seconds(tag, before)?..seconds(end_tag, after)?.checked_add(1)?)
}

/// Returns the dNSName entries of subjectAltName (RFC 5280 §4.2.1.6): the extension with that id holds an OCTET
/// STRING with a SEQUENCE of names, of which those tagged `[2]` are DNS names.
fn names(der: &[u8]) -> Option<Vec<String>> {
    const SUBJECT_ALT_NAME: [u8; 3] = [0x55, 0x1d, 0x11];
    let mut extensions = parts(der)?.extensions;
    while !extensions.is_empty() {
        let (extension, others) = enter(extensions, 0x30)?;
        extensions = others;
        let (id, mut value) = enter(extension, 0x06)?;
        if id != SUBJECT_ALT_NAME {
            continue;
        }
        if value.first() == Some(&0x01) {
            value = element(value)?.2; // whether it is critical
        }
        let (mut entries, _) = enter(enter(value, 0x04)?.0, 0x30)?;
        let mut names = Vec::new();
        while let Some((tag, name, rest)) = element(entries) {
            if let (0x82, Ok(name)) = (tag, std::str::from_utf8(name)) {
                names.push(name.to_ascii_lowercase());
            }
            entries = rest;
        }
        return Some(names);
    }
    Some(Vec::new())
}

/// Returns the contents of a DER element with this tag, and what follows it.
pub(super) fn enter(der: &[u8], wanted: u8) -> Option<(&[u8], &[u8])> {
    let (tag, inside, rest) = element(der)?;
    (tag == wanted).then_some((inside, rest))
}

/// Returns the first DER element: tag, contents, and what follows it.
pub(super) fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let mut length = usize::from(first);
    if first >= 0x80 {
        let (bytes, after) =
            rest.split_at_checked(usize::from(first & 0x7f)).filter(|(b, _)| b.len() <= 4)?;
        length = bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        rest = after;
    }
    let (inside, rest) = rest.split_at_checked(length)?;
    Some((tag, inside, rest))
}

/// Parses UTCTime `YYMMDDHHMMSSZ` or GeneralizedTime `YYYYMMDDHHMMSSZ`; times before 1970 count as 1970.
fn seconds(tag: u8, text: &[u8]) -> Option<Seconds> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    let (year, rest) = match tag {
        0x17 => {
            let year: i32 = text.get(..2)?.parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, text.get(2..)?)
        }
        0x18 => (text.get(..4)?.parse().ok()?, text.get(4..)?),
        _ => return None,
    };
    let part = |n: usize| rest.get(2 * n..2 * n + 2)?.parse::<u8>().ok();
    let date = Date::from_calendar_date(year, Month::try_from(part(0)?).ok()?, part(1)?).ok()?;
    let time = date.with_hms(part(2)?, part(3)?, part(4)?).ok()?;
    Some(time.assume_utc().unix_timestamp().try_into().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(names: &[&str]) -> rcgen::CertifiedKey<rcgen::KeyPair> {
        rcgen::generate_simple_self_signed(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
            .unwrap()
    }

    #[test]
    fn the_dns_names_are_read_and_nothing_else() {
        let of = |all: &[&str]| names(made(all).cert.der()).unwrap();
        assert_eq!(of(&["Shop.test", "*.b.test", "10.0.0.1"]), ["shop.test", "*.b.test"]);
        assert_eq!(of(&["10.0.0.1"]), [""; 0]);
        assert_eq!(of(&[]), [""; 0], "without the extension");
    }

    #[test]
    fn what_is_no_certificate_has_neither_validity_nor_names() {
        let der = made(&["a.test"]).cert.der().to_vec();
        for cut in 0..100 {
            assert_eq!((validity(&der[..cut]), names(&der[..cut])), (None, None));
        }
        let mut seed = 1u64;
        for _ in 0..20_000 {
            let mut bad = der.clone();
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = (seed >> 33) as usize % bad.len();
            bad[at] = (seed >> 20) as u8;
            let _ = (validity(&bad), names(&bad), crate::tls::subject::subject(&bad));
        }
    }
}
