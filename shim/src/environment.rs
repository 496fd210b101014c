//! The process's environment: our variables, and what Node is told by its own.

#![allow(unsafe_code, reason = "strings and the vector of C")]

use crate::sys;

/// The environment's vector (environ(7)) as the process got it.
#[derive(Clone, Copy)]
pub struct Environment(*mut *mut u8);

impl Environment {
    /// # Safety
    /// The vector ends with null, its strings with zero. It is the one that the kernel made, so the arguments stand before it.
    pub unsafe fn new(vector: *mut *mut u8) -> Self {
        Self(vector)
    }

    /// Place of the variable in the vector; `name` ends with `=`.
    fn find(self, name: &[u8]) -> Option<*mut *mut u8> {
        let mut at = self.0;
        // SAFETY: up to the vector's null, whose strings are not read past their zero.
        unsafe {
            while !at.read().is_null() {
                if begins(at.read(), name) {
                    return Some(at);
                }
                at = at.add(1);
            }
        }
        None
    }

    fn value(self, name: &[u8]) -> Option<*const u8> {
        // SAFETY: the string begins with the name.
        self.find(name).map(|at| unsafe { at.read().add(name.len()).cast_const() })
    }

    /// Whether the variable has this value, which ends with zero; `name` ends with `=`.
    pub fn says(self, name: &[u8], value: &[u8]) -> bool {
        // SAFETY: its string ends with zero.
        self.value(name).is_some_and(|text| unsafe { begins(text, value) })
    }

    /// The command's arguments: on the stack they stand before the environment, and their number before them.
    fn arguments(self) -> impl Iterator<Item = *const u8> {
        let mut number = 0;
        // SAFETY: no string has so low an address as its number in the vector.
        unsafe {
            while self.0.sub(number + 2).read() as usize != number {
                number += 1;
            }
            (0..number).map(move |at| self.0.sub(at + 2).read().cast_const())
        }
    }
}

/// Whether the string begins with these bytes. If they end with zero, whether it is the same.
///
/// # Safety
/// The string ends with zero.
unsafe fn begins(text: *const u8, with: &[u8]) -> bool {
    // SAFETY: the comparison ends at the first byte that differs, so at the string's zero at the latest.
    with.iter().enumerate().all(|(at, byte)| unsafe { text.add(at).read() } == *byte)
}

/// # Safety
/// The string ends with zero.
unsafe fn length(text: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: up to its zero.
    while unsafe { text.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}

/// Whether `word` stands anywhere in the string.
///
/// # Safety
/// Both end with zero.
unsafe fn contains(text: *const u8, word: *const u8) -> bool {
    // SAFETY: within both strings.
    unsafe {
        let (all, part) = (length(text), length(word));
        let word = core::slice::from_raw_parts(word, part);
        (0..=all).any(|at| begins(text.add(at), word))
    }
}

fn is_node() -> bool {
    let mut buffer = [0; 256];
    let Some(path) = sys::program(&mut buffer) else { return false };
    let name = path.rsplit(|byte| *byte == b'/').next();
    // Also `nodejs`, `node-22`.
    name.is_some_and(|name| name.starts_with(b"node"))
}

/// Appends `--require FILE` to `NODE_OPTIONS` if this is Node. It changes the vector's entry, so whatever the image set is kept. Where
/// the image set nothing, our own variable's place is used, since the vector can't grow.
pub fn preload_node(environment: Environment) {
    const OPTIONS: &[u8] = b"NODE_OPTIONS=";
    const REQUIRE: &[u8] = b" --require ";
    const FILE: &[u8] = b"LAMEDUCK_NODE_PRELOAD=";
    let Some(file) = environment.value(FILE) else { return };
    let options = environment.value(OPTIONS).unwrap_or(c"".as_ptr().cast());
    // SAFETY: all strings end with zero; the new one is as long as its parts.
    unsafe {
        // Its permissions would forbid the file, and it would not start.
        let restricted = |text| contains(text, c"-permission".as_ptr().cast());
        if file.read() == 0
            || contains(options, file)
            || !is_node()
            || restricted(options)
            || environment.arguments().any(restricted)
        {
            return;
        }
        let parts = [(OPTIONS.as_ptr(), OPTIONS.len()), (options, length(options))];
        let parts = parts.into_iter().chain([(REQUIRE.as_ptr(), REQUIRE.len()), (file, length(file) + 1)]);
        let size = parts.clone().map(|(_, size)| size).sum();
        let place = environment.find(OPTIONS).or_else(|| environment.find(FILE));
        let (Some(new), Some(place)) = (sys::memory(size), place) else { return };
        let mut to = new;
        for (from, size) in parts {
            for at in 0..size {
                to.write_volatile(from.add(at).read());
                to = to.add(1);
            }
        }
        place.write(new);
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;
    use std::ptr::null_mut;

    use super::*;

    /// A stack as the kernel makes it: the number of arguments, the arguments, null, the environment, null.
    fn stack(arguments: &[&'static CStr], variables: &[&'static CStr]) -> Vec<*mut u8> {
        let pointer = |text: &&'static CStr| text.as_ptr().cast_mut().cast::<u8>();
        let mut stack = vec![arguments.len() as *mut u8];
        stack.extend(arguments.iter().map(pointer));
        stack.push(null_mut());
        stack.extend(variables.iter().map(pointer));
        stack.push(null_mut());
        stack
    }

    #[test]
    fn variables_and_arguments_are_found() {
        let mut stack = stack(&[c"node", c"--permission"], &[c"A=1", c"AB=off", c"B=offer", c"C="]);
        // SAFETY: as the kernel's.
        let environment = unsafe { Environment::new(stack.as_mut_ptr().add(4)) };
        assert!(environment.says(b"AB=", b"off\0") && environment.says(b"C=", b"\0"));
        assert!(!environment.says(b"B=", b"off\0") && !environment.says(b"D=", b"\0"));
        // SAFETY: as above.
        let found: Vec<_> =
            environment.arguments().map(|text| unsafe { CStr::from_ptr(text.cast()) }).collect();
        assert_eq!(found, [c"--permission", c"node"]);
    }

    #[test]
    fn a_word_is_found_wherever_it_stands() {
        let found = |text: &CStr, word: &CStr| {
            // SAFETY: both end with zero.
            unsafe { contains(text.as_ptr().cast(), word.as_ptr().cast()) }
        };
        assert!(found(c"--require /a.js", c"/a.js") && found(c"/a.js -x", c"/a.js") && found(c"a", c""));
        assert!(!found(c"--require /a.j", c"/a.js") && !found(c"", c"a"));
    }
}
