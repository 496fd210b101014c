//! Certificates: read from PEM, made, checked as the API server's Go does. Pure but for the keys' randomness.

use std::ops::Range;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use time::{Date, Month, OffsetDateTime};

/// Seconds since 1970 in UTC.
pub type Seconds = u64;

/// The issuer's name of all certificates that lameduck makes. The key tells two CAs apart, not the name.
const CA_NAME: &str = "lameduck webhook CA";

/// The cryptography that everything here uses.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// A certificate to trust.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// As it is on the wire.
    pub der: CertificateDer<'static>,
    /// When it is valid.
    pub valid: Range<Seconds>,
}

impl Root {
    /// Whether this PEM text is its private key.
    pub fn has_key(&self, pem: &str) -> bool {
        // An elliptic curve's public key is a point, and stands in its certificate byte by byte.
        let key = KeyPair::from_pem(pem);
        key.is_ok_and(|key| self.der.windows(key.public_key_raw().len()).any(|at| at == key.public_key_raw()))
    }
}

/// The certificates of a PEM text, in order. What isn't one is left out.
pub fn roots(pem: &[u8]) -> Vec<Root> {
    let ders = CertificateDer::pem_slice_iter(pem).filter_map(Result::ok);
    ders.filter_map(|der| Some(Root { valid: validity(&der)?, der })).collect()
}

/// The PEM text of certificates.
pub fn to_pem<'a>(roots: impl IntoIterator<Item = &'a Root>) -> String {
    use base64::Engine;
    let mut text = String::new();
    for root in roots {
        text += "-----BEGIN CERTIFICATE-----\n";
        let base64 = base64::engine::general_purpose::STANDARD.encode(&root.der);
        for line in base64.as_bytes().chunks(64) {
            text.extend(line.iter().map(|byte| char::from(*byte)));
            text.push('\n');
        }
        text += "-----END CERTIFICATE-----\n";
    }
    text
}

/// A server's certificate with its chain and its key.
#[derive(Clone, Debug)]
pub struct Served {
    /// What rustls shows to clients.
    pub key: Arc<CertifiedKey>,
    /// When it is valid.
    pub valid: Range<Seconds>,
}

impl Served {
    /// Reads `tls.crt` (chain) and `tls.key`.
    ///
    /// # Errors
    /// What is wrong: one of them is no PEM, or they don't belong together.
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

    /// The certificate itself, without its chain.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.key.cert[0]
    }

    /// Whether a client that trusts `roots` accepts this for `name` at that time. As in Go, a root must be in its
    /// own time too, and a certificate that is itself trusted needs no other.
    pub fn verified_by(&self, roots: &[Root], name: &str, now: Seconds) -> bool {
        let mut store = RootCertStore::empty();
        for root in roots.iter().filter(|root| root.valid.contains(&now)) {
            if root.der == *self.der() {
                return self.valid.contains(&now);
            }
            // One that can't be used must not spoil the others.
            let _ = store.add(root.der.clone());
        }
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider()).build();
        let (Ok(verifier), Ok(name)) = (verifier, ServerName::try_from(name)) else { return false };
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now));
        verifier.verify_server_cert(self.der(), &self.key.cert[1..], &name, &[], now).is_ok()
    }
}

/// A new certificate and its key, both as PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// The certificate.
    pub certificate: String,
    /// PKCS #8.
    pub key: String,
}

/// A CA that signs nothing but servers' certificates.
///
/// # Errors
/// When the kernel gives no randomness.
pub fn make_ca(valid: Range<Seconds>) -> Result<Made, String> {
    let key = KeyPair::generate().map_err(|why| why.to_string())?;
    let certificate = ca_params(valid)?.self_signed(&key).map_err(|why| why.to_string())?;
    Ok(Made { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// A server's certificate for these DNS names, signed by the CA that `make_ca` made with this key.
///
/// # Errors
/// When the key isn't one, or the kernel gives no randomness.
pub fn make_leaf(ca_key: &str, names: &[String], valid: Range<Seconds>) -> Result<Made, String> {
    let explain = |why: rcgen::Error| why.to_string();
    let ca_key = KeyPair::from_pem(ca_key).map_err(explain)?;
    // Only name and key of the issuer go into what it signs.
    let issuer = Issuer::new(ca_params(valid.clone())?, ca_key);
    let mut params = CertificateParams::new(names).map_err(explain)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "lameduck webhook");
    (params.not_before, params.not_after) = (date(valid.start)?, date(valid.end)?);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().map_err(explain)?;
    let certificate = params.signed_by(&key, &issuer).map_err(explain)?;
    Ok(Made { certificate: certificate.pem(), key: key.serialize_pem() })
}

fn ca_params(valid: Range<Seconds>) -> Result<CertificateParams, String> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, CA_NAME);
    (params.not_before, params.not_after) = (date(valid.start)?, date(valid.end)?);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn date(at: Seconds) -> Result<OffsetDateTime, String> {
    let at = i64::try_from(at).map_err(|why| why.to_string())?;
    OffsetDateTime::from_unix_timestamp(at).map_err(|why| why.to_string())
}

/// A certificate's validity (RFC 5280 §4.1): SEQUENCE { tbs SEQUENCE { [0] version?, serial, algorithm, issuer,
/// SEQUENCE { notBefore, notAfter }, … } … }. The last second is in it.
fn validity(der: &[u8]) -> Option<Range<Seconds>> {
    let (tbs, _) = enter(der, 0x30)?;
    let (mut fields, _) = enter(tbs, 0x30)?;
    if fields.first() == Some(&0xa0) {
        fields = element(fields)?.2;
    }
    for _ in ["serial", "algorithm", "issuer"] {
        fields = element(fields)?.2;
    }
    let (times, _) = enter(fields, 0x30)?;
    let (tag, before, rest) = element(times)?;
    let (end_tag, after, _) = element(rest)?;
    let range = seconds(tag, before)?..seconds(end_tag, after)?.checked_add(1)?;
    Some(range)
}

/// What is inside a DER element of this tag, and what comes after it.
fn enter(der: &[u8], wanted: u8) -> Option<(&[u8], &[u8])> {
    let (tag, inside, rest) = element(der)?;
    (tag == wanted).then_some((inside, rest))
}

/// The first DER element: tag, content, and what comes after it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
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

/// UTCTime `YYMMDDHHMMSSZ` or GeneralizedTime `YYYYMMDDHHMMSSZ`; times before 1970 count as 1970.
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

    const NAME: &str = "lameduck-webhook.lameduck-system.svc";

    fn pair(valid: Range<Seconds>) -> (Vec<Root>, Made) {
        let ca = make_ca(valid).unwrap();
        (roots(ca.certificate.as_bytes()), ca)
    }

    fn served(ca: &Made, valid: Range<Seconds>) -> Served {
        let leaf = make_leaf(&ca.key, &[NAME.to_owned()], valid).unwrap();
        Served::read(leaf.certificate.as_bytes(), leaf.key.as_bytes()).unwrap()
    }

    #[test]
    fn a_certificate_is_verified_by_its_own_ca_and_in_time_only() {
        let (trusted, ca) = pair(1_000_000..2_000_000);
        let (others, _) = pair(1_000_000..2_000_000);
        let leaf = served(&ca, 1_100_000..1_900_000);
        assert_eq!(leaf.valid, 1_100_000..1_900_001);
        assert!(leaf.verified_by(&trusted, NAME, 1_500_000));
        assert!(leaf.verified_by(&[others.clone(), trusted.clone()].concat(), NAME, 1_500_000));
        assert!(!leaf.verified_by(&others, NAME, 1_500_000));
        assert!(!leaf.verified_by(&[], NAME, 1_500_000));
        assert!(!leaf.verified_by(&trusted, "other.lameduck-system.svc", 1_500_000));
        assert!(!leaf.verified_by(&trusted, NAME, 1_000_001) && !leaf.verified_by(&trusted, NAME, 1_950_000));
        let long = served(&ca, 1_100_000..3_000_000);
        assert!(!long.verified_by(&trusted, NAME, 2_500_000), "its CA has expired");
        assert!(leaf.verified_by(&roots(to_pem(&trusted).as_bytes()), NAME, 1_500_000));
    }

    #[test]
    fn times_after_2049_are_read() {
        let (trusted, _) = pair(1_700_000_000..4_000_000_000);
        assert_eq!(trusted[0].valid, 1_700_000_000..4_000_000_001);
    }

    #[test]
    fn keys_that_do_not_belong_together_are_refused() {
        let (_, ca) = pair(0..2_000_000);
        let [a, b] = [0; 2].map(|_| make_leaf(&ca.key, &[NAME.to_owned()], 0..1_000_000).unwrap());
        assert!(Served::read(a.certificate.as_bytes(), b.key.as_bytes()).is_err());
        assert!(Served::read(b"", a.key.as_bytes()).unwrap_err().contains("no certificate"));
        assert!(Served::read(a.certificate.as_bytes(), b"x").unwrap_err().starts_with("tls.key"));
    }

    #[test]
    fn what_is_no_certificate_has_no_validity() {
        let (trusted, _) = pair(0..2_000_000);
        let der = trusted[0].der.to_vec();
        for cut in 0..100 {
            assert_eq!(validity(&der[..cut]), None);
        }
        let mut seed = 1u64;
        for _ in 0..20_000 {
            let mut bad = der.clone();
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = (seed >> 33) as usize % 140;
            bad[at] = (seed >> 20) as u8;
            let _ = validity(&bad);
        }
    }
}
