//! Which certificate to make, to serve and to have trusted: a pure function of the time, the Secret that all replicas
//! share, and the API server's caBundles. Every replica works it out for itself; whoever writes first wins.
//!
//! ```text
//! a year       CA 1 ────────────────────────────┐ expires: taken out of the Secret and the bundles
//!              leaf, leaf, … of 30 days each    │
//! 90 d before    CA 2 into Secret and bundles ──┼──────────── …
//! 5 min later    leaf of CA 2 into the Secret: served as soon as every bundle has CA 2
//! ```
//!
//! No CA leaves a bundle before it expires, so no replica, however late, serves what its bundle doesn't verify.

use std::ops::Range;

use super::x509::{Made, Root, Seconds, Served, make_ca, make_leaf, roots, to_pem};

const DAY: Seconds = 24 * 3600;
/// How long a CA and a leaf are valid.
pub const CA_LIFE: Seconds = 365 * DAY;
/// See [`CA_LIFE`].
pub const LEAF_LIFE: Seconds = 30 * DAY;
/// With how much time left they are replaced. A CA outlives all leaves that it may still sign.
pub const CA_RENEW: Seconds = 90 * DAY;
/// See [`CA_RENEW`].
pub const LEAF_RENEW: Seconds = 10 * DAY;
/// Certificates are valid from so long before they were made: clocks differ.
pub const BACKDATE: Seconds = 3600;
/// From a bundle's change until all API servers and replicas have surely seen it, clocks a minute apart included.
pub const SETTLE: Seconds = 300;
/// CAs in a bundle, so that it can't grow without end.
const MOST_CAS: usize = 8;

/// What the Secret holds, as PEM; empty where it has nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// `ca.crt`: every CA that has not expired; the first one signs.
    pub ca_crt: String,
    /// `ca.key`: the first one's key.
    pub ca_key: String,
    /// `tls.crt`: the leaf.
    pub tls_crt: String,
    /// `tls.key`: its key.
    pub tls_key: String,
}

impl Kept {
    /// The leaf.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn served(&self) -> Result<Served, String> {
        Served::read(self.tls_crt.as_bytes(), self.tls_key.as_bytes())
    }
}

/// What is to be written. After it has been, look again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// The Secret, in the place of the one that was read.
    Secret(Kept),
    /// Every caBundle that differs (as PEM).
    Bundles(String),
}

/// The next step of a certificate that we make ourselves. `names` are the server's DNS names, the first of them the
/// one that the API server asks for; `bundles` what it trusts for each of our webhooks, read before `kept` was.
///
/// # Errors
/// When the kernel gives no randomness.
pub fn next(
    now: Seconds,
    names: &[String],
    kept: &Kept,
    bundles: &[Vec<Root>],
) -> Result<Option<Write>, String> {
    let written = roots(kept.ca_crt.as_bytes());
    let cas: Vec<Root> = written.iter().filter(|ca| now < ca.valid.end).cloned().collect();
    let leaf = kept.served().ok();
    let leaf = leaf.filter(|leaf| names.iter().all(|name| leaf.verified_by(&cas, name, now)));
    // One from a clock that ran ahead isn't accepted by anybody yet.
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
        return Ok(Some(Write::Secret(Kept {
            ca_crt: to_pem(&cas),
            ca_key: kept.ca_key.clone(),
            tls_crt: certificate,
            tls_key: key,
        })));
    }
    let expired = cas.len() < written.len();
    Ok(expired.then(|| Write::Secret(Kept { ca_crt: to_pem(&cas), ..kept.clone() })))
}

fn leaf_life(now: Seconds, ca: &Root) -> Range<Seconds> {
    now.saturating_sub(BACKDATE)..(now + LEAF_LIFE).min(ca.valid.end.saturating_sub(1))
}

/// A new CA before the others. A leaf that is still good stays until every bundle has the new one.
fn new_ca(
    now: Seconds,
    names: &[String],
    kept: &Kept,
    others: Vec<Root>,
    leaf_is_good: bool,
) -> Result<Kept, String> {
    let ca = make_ca(now.saturating_sub(BACKDATE)..now + CA_LIFE)?;
    let mut cas = roots(ca.certificate.as_bytes());
    cas.extend(others);
    cas.truncate(MOST_CAS);
    let (tls_crt, tls_key) = if leaf_is_good {
        (kept.tls_crt.clone(), kept.tls_key.clone())
    } else {
        let leaf = make_leaf(&ca.key, names, leaf_life(now, &cas[0]))?;
        (leaf.certificate, leaf.key)
    };
    Ok(Kept { ca_crt: to_pem(&cas), ca_key: ca.key, tls_crt, tls_key })
}

/// What every bundle is to have: the Secret's CAs, and all that one of the bundles has and that has not expired. Should
/// the Secret be lost, replicas may still serve what those have signed.
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
    all.truncate(MOST_CAS);
    all
}

/// Whether both are the same certificates, in whatever order.
fn same(a: &[Root], b: &[Root]) -> bool {
    a.len() == b.len() && a.iter().all(|root| b.contains(root))
}

/// Whether the API server accepts this for every webhook of ours. Without webhooks to look at: whether it is in time.
pub fn accepted(now: Seconds, name: &str, bundles: &[Vec<Root>], served: &Served) -> bool {
    served.valid.contains(&now) && refusal(now, name, bundles, served).is_none()
}

/// Why the API server doesn't accept this for one of our webhooks at least.
pub fn refusal(now: Seconds, name: &str, bundles: &[Vec<Root>], served: &Served) -> Option<String> {
    bundles.iter().find_map(|bundle| served.verify(bundle, name, now).err())
}

/// Whether to go over from what is served to `candidate`. `ours` says that we made it: such a one waits until it is
/// [`SETTLE`] old, since it may have been signed by a CA as new as itself.
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
