//! What `lameduck run` writes into its own copy of the object. A variable would show in the app's environment.

use crate::sys;

/// Number of ports of lameduck's own that are told apart.
const OWN_PORTS: usize = 8;

/// Whose app this is, and which ports are lameduck's.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// By this lameduck finds the place (`src/capture/object.rs`).
    mark: [u8; 16],
    /// Number of the run; 0 in a pod.
    pub number: u16,
    /// The app's `PORT`, if lameduck has chosen it, or 0.
    pub given: u16,
    /// Ports that lameduck itself listens on, or 0.
    own: [u16; OWN_PORTS],
}

/// For lameduck to write to, so the compiler must not know the values.
#[used]
static RUN: Run = Run::of(0, 0, [0; OWN_PORTS]);

impl Run {
    const fn of(number: u16, given: u16, own: [u16; OWN_PORTS]) -> Self {
        Self { mark: *b"\0lameduck's run\0", number, given, own }
    }

    /// As lameduck has written it.
    pub fn read() -> Self {
        sys::fresh(&RUN)
    }

    pub fn is_pod(&self) -> bool {
        self.number == 0
    }

    /// Whether lameduck itself listens on this port.
    pub fn owns(&self, port: u16) -> bool {
        self.own.contains(&port)
    }

    /// For tests.
    #[cfg(test)]
    pub const fn test(number: u16, given: u16, own: u16) -> Self {
        Self::of(number, given, [own, 0, 0, 0, 0, 0, 0, 0])
    }
}
