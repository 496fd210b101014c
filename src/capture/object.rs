//! The shim's object, which this program carries.

/// The shim for this program's architecture; empty if there is none (`build.rs`).
pub const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shim.so"));

/// Begins the place in the object that is for `lameduck run` (`shim/src/run.rs`).
const MARK: &[u8; 16] = b"\0lameduck's run\0";
/// Most ports of our own that the object has room for.
const OWN_PORTS: usize = 8;

/// Returns the object for the app of one run. `given` is the `PORT` that we chose for the app, if any; `own` are ports
/// that we listen on ourselves: an app that asks for one of them gets `given` instead.
///
/// Returns `None` if there is no shim for this architecture.
pub fn for_run(number: u16, given: Option<u16>, own: &[u16]) -> Option<Vec<u8>> {
    let mut object = OBJECT.to_vec();
    let at = object.windows(MARK.len()).position(|bytes| bytes == MARK)? + MARK.len();
    let own = own.iter().copied().chain(std::iter::repeat(0)).take(OWN_PORTS);
    let values = [number, given.unwrap_or(0)].into_iter().chain(own);
    for (place, value) in object.get_mut(at..)?.chunks_exact_mut(2).zip(values) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
    Some(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_runs_own_values_differ() {
        let Some(object) = for_run(0x0102, Some(0x0304), &[0x0506]) else { return };
        assert_eq!(object.windows(MARK.len()).filter(|bytes| bytes == MARK).count(), 1);
        let changed: Vec<_> = object.iter().zip(OBJECT).filter(|(new, old)| new != old).collect();
        assert_eq!((object.len(), changed.len()), (OBJECT.len(), 6));
    }
}
