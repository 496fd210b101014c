//! Decides which certificate to create, to serve and to have trusted: a pure function of the time, the Secret that all
//! replicas share, and the API server's caBundles. Every replica decides on its own; the first write wins.
//!
//! ```text
//! a year       CA 1 ────────────────────────────┐ expires: removed from the Secret and the bundles
//!              leaf, leaf, … of 30 days each    │
//! 90 d before    CA 2 into Secret and bundles ──┼──────────── …
//! 5 min later    leaf of CA 2 into the Secret: served as soon as every bundle has CA 2
//! ```
//!
//! No CA leaves a bundle before it expires, so no replica, however late, serves a certificate that its bundle can't
//! verify.

use std::ops::Range;

use super::x509::{Made, Root, Seconds, Served, make_ca, make_leaf, roots, to_pem};

const DAY: Seconds = 24 * 3600;
/// Validity of a CA.
pub const CA_LIFE: Seconds = 365 * DAY;
/// Validity of a leaf.
pub const LEAF_LIFE: Seconds = 30 * DAY;
/// Remaining validity at which a CA is replaced. A CA outlives every leaf that it may still sign.
pub const CA_RENEW: Seconds = 90 * DAY;
/// Remaining validity at which a leaf is replaced.
pub const LEAF_RENEW: Seconds = 10 * DAY;
/// Certificates are valid from this long before their creation, since clocks differ.
pub const BACKDATE: Seconds = 3600;
/// Time after which all API servers and replicas have seen a changed bundle, with clocks up to a minute apart.
pub const SETTLE: Seconds = 300;
/// Limit on the CAs in a bundle.
const MAX_CAS: usize = 8;

/// Contents of the Secret, as PEM; missing keys are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredCerts {
    /// `ca.crt`: every CA that has not expired; the first one signs.
    pub ca_crt: String,
    /// `ca.key`: key of the first CA.
    pub ca_key: String,
    /// `tls.crt`: the leaf.
    pub tls_crt: String,
    /// `tls.key`: key of the leaf.
    pub tls_key: String,
}

impl StoredCerts {
    /// Parses the leaf.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn served(&self) -> Result<Served, String> {
        Served::read(self.tls_crt.as_bytes(), self.tls_key.as_bytes())
    }
}

/// A write to do. After it, decide again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Replaces the Secret that was read.
    Secret(StoredCerts),
    /// Replaces every caBundle that differs (PEM).
    Bundles(String),
}

/// The next write for a certificate that we create ourselves; none if there is nothing to write. `names` are the
/// server's DNS names, first the one that the API server uses. `bundles` are the trusted CAs of each of our webhooks,
/// read before `kept`.
///
/// # Errors
/// The kernel provides no randomness.
/// When the kernel gives no randomness.
pub fn next(
    now: Seconds,
    names: &[String],
    kept: &StoredCerts,
    bundles: &[Vec<Root>],
) -> Result<Option<Write>, String> {
    let written = roots(kept.ca_crt.as_bytes());
    let cas: Vec<Root> = written.iter().filter(|ca| now < ca.valid.end).cloned().collect();
    let leaf = kept.served().ok();
    let leaf = leaf.filter(|leaf| names.iter().all(|name| leaf.verified_by(&cas, name, now)));
    // A certificate from a clock that runs fast is not accepted yet.
    let usable = |ca: &&Root| ca.valid.contains(&now) && ca.valid.end - now > CA_RENEW;
    let signer = cas.first().filter(usable).filter(|ca| ca.has_key(&kept.ca_key));
    let Some(signer) = signer.cloned() else {
        return new_ca(now, names, kept, cas, leaf.is_some()).map(|kept| Some(Write::Secret(kept)));
    };
    let trusted = trusted(now, &cas, bundles);
    if bundles.iter().any(|bundle| !same(bundle, &trusted)) {
        return Ok(Some(Write::Bundles(to_pem(&trusted))));
    }
    let settled = now >= signer.valid.start + BACKDATE + SETTLE;
    let stale = |leaf: &Served| {
        settled
            && (leaf.valid.end < now + LEAF_RENEW
                || !leaf.verified_by(std::slice::from_ref(&signer), &names[0], now))
    };
    if leaf.as_ref().is_none_or(stale) {
        let Made { certificate, key } = make_leaf(&kept.ca_key, names, leaf_life(now, &signer))?;
        return Ok(Some(Write::Secret(StoredCerts {
            ca_crt: to_pem(&cas),
            ca_key: kept.ca_key.clone(),
            tls_crt: certificate,
            tls_key: key,
        })));
    }
    let expired = cas.len() < written.len();
    Ok(expired.then(|| Write::Secret(StoredCerts { ca_crt: to_pem(&cas), ..kept.clone() })))
}

fn leaf_life(now: Seconds, ca: &Root) -> Range<Seconds> {
    now.saturating_sub(BACKDATE)..(now + LEAF_LIFE).min(ca.valid.end.saturating_sub(1))
}

/// A new CA, followed by the others. A valid leaf stays until every bundle has the new CA.
fn new_ca(
    now: Seconds,
    names: &[String],
    kept: &StoredCerts,
    others: Vec<Root>,
    leaf_is_good: bool,
) -> Result<StoredCerts, String> {
    let ca = make_ca(now.saturating_sub(BACKDATE)..now + CA_LIFE)?;
    let mut cas = roots(ca.certificate.as_bytes());
    cas.extend(others);
    cas.truncate(MAX_CAS);
    let (tls_crt, tls_key) = if leaf_is_good {
        (kept.tls_crt.clone(), kept.tls_key.clone())
    } else {
        let leaf = make_leaf(&ca.key, names, leaf_life(now, &cas[0]))?;
        (leaf.certificate, leaf.key)
    };
    Ok(StoredCerts { ca_crt: to_pem(&cas), ca_key: ca.key, tls_crt, tls_key })
}

/// CAs for every bundle: those of the Secret, and all unexpired ones of any bundle. If the Secret is lost, replicas may
/// still serve leaves of the latter.
fn trusted(now: Seconds, cas: &[Root], bundles: &[Vec<Root>]) -> Vec<Root> {
    let mut all = cas.to_vec();
    let mut others: Vec<Root> = Vec::new();
    for root in bundles.iter().flatten().filter(|root| now < root.valid.end) {
        if !all.contains(root) && !others.contains(root) {
            others.push(root.clone());
        }
    }
    others.sort_by_key(|root| std::cmp::Reverse(root.valid.start));
    all.extend(others);
    all.truncate(MAX_CAS);
    all
}

/// Whether both hold the same certificates, in any order.
fn same(a: &[Root], b: &[Root]) -> bool {
    a.len() == b.len() && a.iter().all(|root| b.contains(root))
}

/// Whether the API server accepts this certificate for all of our webhooks. If there are none: whether it is within its
/// validity.
pub fn accepted(now: Seconds, name: &str, bundles: &[Vec<Root>], served: &Served) -> bool {
    served.valid.contains(&now) && refusal(now, name, bundles, served).is_none()
}

/// Why the API server rejects this certificate for at least one of our webhooks.
pub fn refusal(now: Seconds, name: &str, bundles: &[Vec<Root>], served: &Served) -> Option<String> {
    bundles.iter().find_map(|bundle| served.verify(bundle, name, now).err())
}

/// Whether to replace the served certificate with `candidate`. One that we created (`ours`) must be [`SETTLE`] old
/// first, since the CA that signed it may be just as new.
pub fn go_over(
    now: Seconds,
    name: &str,
    bundles: &[Vec<Root>],
    served: Option<&Served>,
    candidate: &Served,
    ours: bool,
) -> bool {
    let settled = !ours || bundles.is_empty() || now >= candidate.valid.start + BACKDATE + SETTLE;
    let good = |served: &Served| accepted(now, name, bundles, served);
    match served.is_some_and(good) {
        true => settled && good(candidate),
        false => true,
    }
}
