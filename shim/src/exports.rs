//! What the app's processes find here instead of in their libc, and what runs before their `main`.

#![allow(unsafe_code, reason = "C's calling convention and names")]

use core::ffi::c_void;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::environment::{self, Environment};
use crate::pid1::Action;
use crate::sys::{self, weak};
use crate::{bind, pid1, word};

/// Whether sockets are moved: not before `begin` knows.
static CAPTURES: AtomicBool = AtomicBool::new(false);

/// Run by the loader.
#[used]
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn(i32, *const *const u8, *mut *mut u8) = begin;

/// musl passes no arguments but has set `environ`; glibc passes them, and may not have set it yet.
extern "C" fn begin(_: i32, _: *const *const u8, vector: *mut *mut u8) {
    let environ = weak!("environ") as *const *mut *mut u8;
    // SAFETY: either is the environment that the kernel made.
    let environment = unsafe {
        let set = if environ.is_null() { core::ptr::null_mut() } else { environ.read() };
        Environment::new(if set.is_null() { vector } else { set })
    };
    CAPTURES.store(!environment.says(b"LAMEDUCK_CAPTURE=", b"off\0"), Relaxed);
    if !environment.says(b"LAMEDUCK_PID1=", b"leave\0") {
        pid1::begin();
    }
    environment::preload_node(environment);
}

/// bind(2), elsewhere if the rule says so.
#[unsafe(no_mangle)]
unsafe extern "C" fn bind(fd: i32, addr: *const c_void, len: u32) -> i32 {
    sys::returned(if CAPTURES.load(Relaxed) {
        // SAFETY: the caller's promise.
        unsafe { bind::bind(fd, addr, len) }
    } else {
        sys::bind(fd, addr.cast(), len)
    })
}

/// listen(2); returns once the proxy listens too.
#[unsafe(no_mangle)]
extern "C" fn listen(fd: i32, backlog: i32) -> i32 {
    pid1::care();
    let result = sys::listen(fd, backlog);
    sys::returned(if result == 0 && CAPTURES.load(Relaxed) { word::tell(fd) } else { result })
}

/// sigaction(2), in which a PID 1 never has the default for SIGTERM.
#[unsafe(no_mangle)]
unsafe extern "C" fn sigaction(signal: i32, asked: *const Action, old: *mut Action) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { pid1::sigaction(signal, asked, old) }
}

/// signal(2), likewise.
#[unsafe(no_mangle)]
unsafe extern "C" fn signal(signal: i32, handler: usize) -> usize {
    // SAFETY: the caller's promise.
    unsafe { pid1::signal(signal, handler) }
}

// What the compiler may make of a copy or of zeros. As assembly, for whatever is written in Rust under these names
// would be exported, and the app would find it.
#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".section .text.memcpy, \"ax\", @progbits",
    ".globl memcpy",
    "memcpy: mov rax, rdi",
    "mov rcx, rdx",
    "rep movsb",
    "ret",
    ".section .text.memset, \"ax\", @progbits",
    ".globl memset",
    "memset: mov r8, rdi",
    "mov eax, esi",
    "mov rcx, rdx",
    "rep stosb",
    "mov rax, r8",
    "ret",
    ".text",
);
#[cfg(target_arch = "aarch64")]
core::arch::global_asm!(
    ".section .text.memcpy, \"ax\", @progbits",
    ".globl memcpy",
    "memcpy: mov x3, x0",
    "0: cbz x2, 1f",
    "ldrb w4, [x1], #1",
    "strb w4, [x3], #1",
    "sub x2, x2, #1",
    "b 0b",
    "1: ret",
    ".section .text.memset, \"ax\", @progbits",
    ".globl memset",
    "memset: mov x3, x0",
    "2: cbz x2, 3f",
    "strb w1, [x3], #1",
    "sub x2, x2, #1",
    "b 2b",
    "3: ret",
    ".text",
);

unsafe extern "C" {
    /// Nobody has it: the object does not link if anything in it could panic.
    safe fn lameduck_shim_never_panics() -> !;
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    lameduck_shim_never_panics()
}
