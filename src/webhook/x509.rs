//! Creates certificates, and verifies them as the API server's Go does. Pure except for random keys.

use std::ops::Range;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::{ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, Error, RootCertStore};
use time::OffsetDateTime;

pub use crate::tls::certificate::{Root, Seconds, Served, roots};
pub use crate::tls::provider;

/// Issuer name of all certificates that lameduck creates. CAs are told apart by their keys, not by this name.
const CA_NAME: &str = "lameduck webhook CA";

impl Root {
    /// Whether this PEM text is the private key of the certificate.
    pub fn has_key(&self, pem: &str) -> bool {
        // The public key of an elliptic curve is a point, and appears in the certificate byte by byte.
        let key = KeyPair::from_pem(pem);
        key.is_ok_and(|key| self.der.windows(key.public_key_raw().len()).any(|at| at == key.public_key_raw()))
    }
}

/// Certificates as PEM text.
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

impl Served {
    /// Whether a client that trusts `roots` accepts this certificate for `name` at time `now`. As in Go, a root must be
    /// valid at that time too, and a trusted certificate needs no issuer.
    pub fn verified_by(&self, roots: &[Root], name: &str, now: Seconds) -> bool {
        self.verify(roots, name, now).is_ok()
    }

    /// As [`Self::verified_by`], with the reason.
    ///
    /// # Errors
    /// Says why not, in words that don't change over time.
    pub fn verify(&self, roots: &[Root], name: &str, now: Seconds) -> Result<(), String> {
        let explain = |why: rustls::Error| match why {
            Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                "none of its authorities has signed it".to_owned()
            }
            Error::InvalidCertificate(
                CertificateError::ExpiredContext { .. } | CertificateError::NotValidYetContext { .. },
            ) => "a certificate in its chain has expired or is not valid yet".to_owned(),
            why => why.to_string(),
        };
        if !self.valid.contains(&now) {
            return Err("the certificate has expired, or is not valid yet".to_owned());
        }
        let name = ServerName::try_from(name).map_err(|why| why.to_string())?;
        let parsed = ParsedCertificate::try_from(self.der()).map_err(explain)?;
        verify_server_name(&parsed, &name).map_err(explain)?;
        let mut store = RootCertStore::empty();
        for root in roots.iter().filter(|root| root.valid.contains(&now)) {
            if root.der == *self.der() {
                return Ok(());
            }
            // An unusable root must not affect the others.
            let _ = store.add(root.der.clone());
        }
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider()).build();
        let verifier = verifier.map_err(|_| "it has no CA that is valid now".to_owned())?;
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now));
        let verified = verifier.verify_server_cert(self.der(), &self.key.cert[1..], &name, &[], now);
        verified.map(drop).map_err(explain)
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

/// Creates a CA that signs nothing but server certificates.
///
/// # Errors
/// The kernel provides no randomness.
pub fn make_ca(valid: Range<Seconds>) -> Result<Made, String> {
    let key = KeyPair::generate().map_err(|why| why.to_string())?;
    let certificate = ca_params(valid)?.self_signed(&key).map_err(|why| why.to_string())?;
    Ok(Made { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// Creates a server certificate for these DNS names, signed by the CA that `make_ca` created with this key.
///
/// # Errors
/// The key can't be parsed, or the kernel provides no randomness.
pub fn make_leaf(ca_key: &str, names: &[String], valid: Range<Seconds>) -> Result<Made, String> {
    let explain = |why: rcgen::Error| why.to_string();
    let ca_key = KeyPair::from_pem(ca_key).map_err(explain)?;
    // Only the issuer's name and key go into the certificates that it signs.
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

/// Current time in seconds since 1970.
pub fn now() -> Seconds {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
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
        let alone = [Root { der: leaf.der().clone(), valid: leaf.valid.clone() }];
        assert!(leaf.verified_by(&alone, NAME, 1_500_000), "trusted itself");
        let other = leaf.verify(&alone, "other", 1_500_000).unwrap_err();
        assert!(other.contains("not valid for name \"other\"") && other.contains(NAME), "{other}");
        assert_eq!(
            leaf.verify(&others, NAME, 1_500_000).unwrap_err(),
            "none of its authorities has signed it"
        );
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
}
