//! SIGTERM ends a PID 1 that has no handler of its own.
//!
//! The kernel drops a signal to a PID 1 that has not handled it (signal(7)), so `node server.js` or `sh -c` as a container's first process
//! runs until SIGKILL. Here "default" means a handler of ours: it passes SIGTERM on to all other processes and ends with
//! them. The program must not see it, or it would restore "the old handler" later as if that were somebody's: so every
//! `sigaction` and `signal` for SIGTERM goes through here, and finds the default where ours is.
//!
//! A handler for one signal only (SA_RESETHAND) is called as it asks for, and then the default is ours again: Node's default is one that
//! raises the signal anew.

#![allow(unsafe_code, reason = "signal handlers, and what libc has for them")]

use core::ffi::c_void;
use core::mem::transmute;
use core::ptr::{null, null_mut};
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering::Relaxed};

use crate::sys::{self, weak};

const SIGTERM: i32 = 15;
const SIG_DFL: usize = 0;
const SIG_IGN: usize = 1;
const SIG_ERR: usize = usize::MAX;
const SA_SIGINFO: i32 = 4;
const SA_RESTART: i32 = 0x1000_0000;
const SA_RESETHAND: i32 = i32::MIN;

/// `struct sigaction`, the same in glibc and musl.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Action {
    handler: usize,
    mask: [u64; 16],
    flags: i32,
    restorer: usize,
}

impl Action {
    const fn new(handler: usize, flags: i32, mask: u64) -> Self {
        let mut all = [0; 16];
        all[0] = mask;
        Self { handler, mask: all, flags, restorer: 0 }
    }

    const fn is_one_shot(&self) -> bool {
        self.flags & SA_RESETHAND != 0 && self.handler != SIG_DFL && self.handler != SIG_IGN
    }
}

type Sigaction = unsafe extern "C" fn(i32, *const Action, *mut Action) -> i32;
type Signal = unsafe extern "C" fn(i32, usize) -> usize;

/// Whether a PID 1 is cared for.
static ON: AtomicBool = AtomicBool::new(false);
/// libc's `sigaction`, once found.
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// The app's handler for one signal only, and its flags; ours stands in for it.
static ONE_SHOT: AtomicUsize = AtomicUsize::new(0);
static ONE_SHOT_FLAGS: AtomicI32 = AtomicI32::new(0);

/// libc's `sigaction`: glibc also calls it `__sigaction`; musl, which does not, always has `dlsym`.
fn next() -> Option<Sigaction> {
    const RTLD_NEXT: usize = usize::MAX;
    let mut found = NEXT.load(Relaxed);
    if found == 0 {
        let (direct, dlsym) = (weak!("__sigaction"), weak!("dlsym"));
        found = direct;
        if direct == 0 && dlsym != 0 {
            // SAFETY: dlsym(3).
            found = unsafe {
                let dlsym: extern "C" fn(usize, *const u8) -> usize = transmute(dlsym);
                dlsym(RTLD_NEXT, c"sigaction".as_ptr().cast())
            };
        }
        NEXT.store(found, Relaxed);
    }
    // SAFETY: it is libc's function of this type, or none.
    (found != 0).then(|| unsafe { transmute::<usize, Sigaction>(found) })
}

fn ours() -> usize {
    on_term as *const () as usize
}

/// Our handler. Nothing interrupts it: it ends the process.
fn our_action() -> Action {
    Action::new(ours(), SA_SIGINFO | SA_RESTART, u64::MAX)
}

/// From now on a PID 1 is cared for.
pub fn begin() {
    ON.store(true, Relaxed);
    care();
}

/// Sets our handler if this is PID 1 and SIGTERM does nothing. Called again when a socket listens: a program may have reset its signals by
/// calls that don't come here.
pub fn care() {
    if !ON.load(Relaxed) || sys::getpid() != 1 {
        return;
    }
    let Some(next) = next() else { return };
    let mut was = our_action();
    // SAFETY: sigaction(2) with our own structures.
    unsafe {
        if next(SIGTERM, null(), &raw mut was) == 0 && was.handler == SIG_DFL {
            next(SIGTERM, &our_action(), null_mut());
        }
    }
}

/// sigaction(2): see the module.
///
/// # Safety
/// As sigaction(3).
pub unsafe fn sigaction(signal: i32, asked: *const Action, old: *mut Action) -> i32 {
    let Some(next) = next() else { return -1 };
    if signal != SIGTERM {
        // SAFETY: the caller's promise.
        return unsafe { next(signal, asked, old) };
    }
    let (one_shot, flags) = (ONE_SHOT.load(Relaxed), ONE_SHOT_FLAGS.load(Relaxed));
    // SAFETY: libc reads and writes the same structures.
    unsafe {
        let instead = asked.as_ref().and_then(instead);
        if !asked.is_null() {
            let shot = asked.read();
            ONE_SHOT_FLAGS.store(shot.flags, Relaxed);
            ONE_SHOT.store(if instead.is_some() && shot.is_one_shot() { shot.handler } else { 0 }, Relaxed);
        }
        let result = next(signal, instead.as_ref().map_or(asked, |action| action), old);
        if result != 0 && !asked.is_null() {
            ONE_SHOT.store(one_shot, Relaxed);
        }
        if let (0, Some(old)) = (result, old.as_mut())
            && old.handler == ours()
        {
            *old = if one_shot == 0 {
                Action::new(SIG_DFL, 0, 0)
            } else {
                Action { handler: one_shot, flags, ..*old }
            };
        }
        result
    }
}

/// What a PID 1 gets instead of the default, or of a handler after which the default would be back.
fn instead(asked: &Action) -> Option<Action> {
    if !ON.load(Relaxed) || sys::getpid() != 1 {
        return None;
    }
    if asked.is_one_shot() {
        let flags = asked.flags & !SA_RESETHAND | SA_SIGINFO;
        return Some(Action { handler: ours(), flags, ..*asked });
    }
    (asked.handler == SIG_DFL).then(our_action)
}

/// signal(2): for SIGTERM the same as both libcs make of it.
///
/// # Safety
/// As signal(3).
pub unsafe fn signal(signal: i32, handler: usize) -> usize {
    let next = weak!("bsd_signal");
    if signal != SIGTERM && next != 0 {
        // SAFETY: libc's other name for it, in glibc and musl.
        return unsafe { transmute::<usize, Signal>(next)(signal, handler) };
    }
    let asked = Action::new(handler, SA_RESTART, 1 << (SIGTERM - 1));
    let mut old = asked;
    // SAFETY: our own structures; the handler is the caller's.
    if unsafe { sigaction(signal, &asked, &raw mut old) } == 0 { old.handler } else { SIG_ERR }
}

/// SIGTERM where the app has no handler, or one for this signal only.
extern "C" fn on_term(signal: i32, info: *mut c_void, context: *mut c_void) {
    // No exchange: for those, aarch64's compilers want a libc.
    let one_shot = ONE_SHOT.load(Relaxed);
    if one_shot != 0 {
        ONE_SHOT.store(0, Relaxed);
        // SAFETY: a handler of either type takes these (sigaction(2)); the simpler one ignores the last two.
        return unsafe {
            transmute::<usize, extern "C" fn(i32, *mut c_void, *mut c_void)>(one_shot)(signal, info, context);
        };
    }
    if sys::getpid() == 1 {
        sys::kill(-1, SIGTERM);
        // Until there are no children, orphans among them.
        loop {
            match sys::wait() {
                0.. | sys::EINTR => {}
                _ => sys::exit(128 + SIGTERM),
            }
        }
    }
    // A fork of PID 1 has inherited our handler, and dies of the signal like any process, once this handler returns.
    if let Some(next) = next() {
        // SAFETY: sigaction(2) with our own structure.
        unsafe { next(SIGTERM, &Action::new(SIG_DFL, 0, 0), null_mut()) };
        sys::kill(sys::getpid(), SIGTERM);
    }
}
